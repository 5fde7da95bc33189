"""What comes from outside: numbers that are none, bit widths, generators are refused by name before anything runs."""

from __future__ import annotations

import numbers
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from emq_lib.core.errors import InvalidBitsError, InvalidParameterError, InvalidScoreError

WIDEST = 8  # of what is quantized


def real_numbers(values: ArrayLike, what: str, *, ndim: int | None = None, finite: bool = True) -> np.ndarray:
    """Return real numbers as a float64 array.

    Args:
        values: numbers in an array, a list, or what NumPy takes for one.
        what: plural noun for the message.
        ndim: number of axes; None: any.
        finite: whether NaN and infinity are refused.

    Raises:
        InvalidScoreError: text, None, complex numbers, NaN, infinity, rows of unequal length, or other axes.

    >>> real_numbers([1, 2], "scores")
    array([1., 2.])
    """
    try:
        found = np.asarray(values)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InvalidScoreError(f"the {what} make no array of numbers ({error}).") from error
    if found.dtype.kind not in "biuf":
        raise InvalidScoreError(f"the {what} must be real numbers, got an array of {found.dtype}.")
    if ndim is not None and found.ndim != ndim:
        raise InvalidScoreError(f"the {what} must have {ndim} axes, got shape {found.shape}.")
    if finite and not np.isfinite(found).all():
        place = np.argwhere(~np.isfinite(found))[0].tolist()
        where = place[0] if len(place) == 1 else tuple(place)
        raise InvalidScoreError(f"the {what} hold NaN or infinity at position {where}.")
    return found.astype(np.float64, copy=False)


def real_number(value: float, what: str, low: float = -np.inf, high: float = np.inf, *, ends: bool = False) -> float:
    """Return a finite real number after checking that it lies between two others.

    Args:
        value: the number.
        what: noun for the message.
        low: it must lie above this.
        high: and below this.
        ends: whether it may also be one of the two.

    Raises:
        InvalidParameterError: it does not, is not finite as a float, or is no number.
    """
    try:
        known = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
        if known and (low < value < high or (ends and value in (low, high))) and np.isfinite(float(value)):
            return float(value)
    except OverflowError:
        pass  # a whole number beyond all floats
    inside = f"lie from {low:g} to {high:g}" if ends else f"lie above {low:g} and below {high:g}"
    inside = inside if np.isfinite(low) else "be a finite number"
    raise InvalidParameterError(f"{what} must {inside}, got {_short(value)}.")


def whole_number(value: int, what: str, least: int) -> int:
    """Return a whole number after checking that it is at least so large.

    Raises:
        InvalidParameterError: it is not, or is no whole number.
    """
    if not (_is_whole(value) and value >= least):
        raise InvalidParameterError(f"{what} must be a whole number, {least} or more, got {_short(value)}.")
    return int(value)


def bit_width(value: int, what: str, *, widest: int = WIDEST) -> int:
    """Return a bit width after checking that it is a whole number from 1 to the widest.

    Raises:
        InvalidBitsError: it is not.

    >>> bit_width(np.int64(3), "default")
    3
    """
    if not (_is_whole(value) and 1 <= value <= widest):
        raise InvalidBitsError(f"{what}: bit widths are whole numbers from 1 to {widest}, got {_short(value)}.")
    return int(value)


def bit_choices(choices: Iterable[int], *, widest: int = WIDEST) -> tuple[int, ...]:
    """Return the allowed widths after checking that there are some, that they are widths, and that they increase.

    Raises:
        InvalidBitsError: they are not.

    >>> bit_choices([2, 3, 4])
    (2, 3, 4)
    """
    try:
        found = tuple(choices)
    except TypeError as error:
        raise InvalidBitsError(f"choices must be several widths, as (2, 3, 4); got {_short(choices)}.") from error
    widths = [bit_width(width, "choices", widest=widest) for width in found]
    if not widths or widths != sorted(set(widths)):
        raise InvalidBitsError(f"choices must be one or more widths that increase, as (2, 3, 4); got {_short(found)}.")
    return tuple(widths)


def random_source(rng: np.random.Generator) -> np.random.Generator:
    """Return a source of randomness after checking that it is one.

    Raises:
        InvalidParameterError: it is none, e.g. a seed.
    """
    if not isinstance(rng, np.random.Generator):
        raise InvalidParameterError(f"rng must be a numpy.random.Generator, as default_rng(0); got {_short(rng)}.")
    return rng


def file_path(path: pathlib.Path | str) -> pathlib.Path:
    """Return the path of a file after checking that it is one; whether it can be read or written shows later.

    Raises:
        InvalidParameterError: neither a text nor a path, or one that no file can have.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise InvalidParameterError(f"the path of a file must be a text or a pathlib.Path; got {_short(path)}.")
    return pathlib.Path(path)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _short(value: object) -> str:
    """Return an object in at most sixty characters; Python prints no whole number of thousands of digits."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "a number of thousands of digits"
