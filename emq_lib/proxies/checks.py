"""Numbers that come from outside: what is no finite real number is refused by name."""

from __future__ import annotations

import numbers

import numpy as np
from numpy.typing import ArrayLike

from emq_lib.core.errors import InvalidParameterError, InvalidScoreError


def real_numbers(values: ArrayLike, what: str, *, ndim: int | None = None) -> np.ndarray:
    """Return finite real numbers as a float64 array.

    Args:
        values: numbers in an array, a list, or what NumPy takes for one.
        what: plural noun for the message.
        ndim: number of axes; None: any.

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
    if not np.isfinite(found).all():
        place = np.argwhere(~np.isfinite(found))[0].tolist()
        where = place[0] if len(place) == 1 else tuple(place)
        raise InvalidScoreError(f"the {what} hold NaN or infinity at position {where}.")
    return found.astype(np.float64, copy=False)


def real_number(value: float, what: str, low: float, high: float) -> float:
    """Return a real number after checking that it lies inside low to high, ends excluded.

    Raises:
        InvalidParameterError: it does not, or is no number.
    """
    known = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if not (known and low < value < high):
        raise InvalidParameterError(f"{what} must lie above {low:g} and below {high:g}, got {value!r:.60}.")
    return float(value)


def whole_number(value: int, what: str, least: int) -> int:
    """Return a whole number after checking that it is at least so large.

    Raises:
        InvalidParameterError: it is not, or is no whole number.
    """
    known = isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
    if not (known and value >= least):
        raise InvalidParameterError(f"{what} must be {least} or more, got {value!r:.60}.")
    return int(value)
