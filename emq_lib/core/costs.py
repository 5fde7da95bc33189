"""Tables over (slot, choice): reading a configuration's entries, and the costs that are such tables (size, BOPs).

Explained in chapters 01 and 04.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from emq_lib.core.checks import bit_choices, bit_width, real_number, real_numbers, whole_number
from emq_lib.core.errors import ConfigLengthError, InvalidBitsError, InvalidParameterError, InvalidScoreError

SCALE_BYTES, ZERO_POINT_BYTES, BIAS_BYTES = 4, 1, 4
WIDEST_CHOICE = 32  # bits: tables may have a column for floating point


def choice_indices(configs: np.ndarray | Sequence, choices: Sequence[int], slots: int) -> np.ndarray:
    """Return the position of every bit width among the choices.

    Args:
        configs: bits, shape (N, S), or one configuration of shape (S,).
        choices: the B allowed widths, increasing.
        slots: S, the number of searchable layers.

    Returns:
        intp array of shape (N, S).

    Raises:
        ConfigLengthError: a configuration does not have S entries.
        InvalidBitsError: a width is not among the choices, or no number; or the choices do not increase.

    >>> choice_indices([2, 4, 3], choices=(2, 3, 4), slots=3)
    array([[0, 2, 1]])
    """
    choices = bit_choices(choices, widest=WIDEST_CHOICE)
    try:
        configs = np.atleast_2d(np.asarray(configs))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigLengthError(f"These are no configurations: their lengths differ ({error}).") from error
    if configs.dtype.kind not in "iuf":
        raise InvalidBitsError(f"The bits of a configuration are whole numbers, as [2, 4, 3]; got {configs.dtype}.")
    if configs.ndim != 2 or configs.shape[1] != slots:
        raise ConfigLengthError(
            f"A configuration needs {slots} bit widths, one per searchable layer; got shape {configs.shape[1:]}."
        )
    if not (allowed := np.isin(configs, choices)).all():
        row, slot = np.argwhere(~allowed)[0]
        raise InvalidBitsError(
            f"Configuration {row} has {configs[row, slot]} bits in slot {slot}; the choices are {choices}."
        )
    return np.searchsorted(choices, configs)


def selected(table: np.ndarray, configs: np.ndarray | Sequence, choices: Sequence[int]) -> np.ndarray:
    """Return the entries of a table that each configuration selects, one per slot, float64, shape (N, S).

    Args:
        table: shape (S, B).
        configs: bits, shape (N, S).
        choices: the B allowed widths.

    Raises:
        ConfigLengthError, InvalidBitsError: see :func:`choice_indices`.
        InvalidScoreError: the table is none of finite numbers with B columns.
    """
    table = real_numbers(table, "entries of the table", ndim=2)
    indices = choice_indices(configs, choices, len(table))
    if table.shape[1] != len(choices):
        raise InvalidScoreError(f"The table has {table.shape[1]} columns; it needs {len(choices)}, one per choice.")
    return np.take_along_axis(table[None], indices[:, :, None], axis=2)[:, :, 0]


def gather(table: np.ndarray, configs: np.ndarray | Sequence, choices: Sequence[int]) -> np.ndarray:
    """Return the sum of the table entries that each configuration selects: one gather, however many configurations.

    Args:
        table: shape (S, B).
        configs: bits, shape (N, S).
        choices: the B allowed widths.

    Returns:
        float64 array of shape (N,).

    Raises:
        ConfigLengthError, InvalidBitsError, InvalidScoreError: see :func:`selected`.

    >>> gather(np.array([[1.0, 2.0], [10.0, 20.0]]), [[2, 3], [3, 3]], choices=(2, 3))
    array([21., 22.])
    """
    return selected(table, configs, choices).sum(axis=1)


@dataclass(frozen=True)
class CostTable:
    """A cost that is linear in the configuration: a fixed part (pinned layers) plus one entry per searchable layer.

    Attributes:
        name: what is counted, e.g. "size".
        unit: its unit, e.g. "bytes".
        fixed: cost of the layers outside the search.
        table: shape (S, B), cost of slot s at choice b.
    """

    name: str
    unit: str
    fixed: float
    table: np.ndarray

    def total(self, configs: np.ndarray | Sequence, choices: Sequence[int]) -> np.ndarray:
        """Return the cost of each configuration, shape (N,).

        Raises:
            ConfigLengthError, InvalidBitsError: see :func:`choice_indices`.
            InvalidParameterError: the table is none of finite numbers with a column per choice.
        """
        fixed = real_number(self.fixed, f"the fixed part of the cost {self.name!r}")
        try:
            return fixed + gather(self.table, configs, choices)
        except InvalidScoreError as error:
            raise InvalidParameterError(f"The cost {self.name!r} needs a finite table: {error}") from error

    @property
    def smallest(self) -> float:
        """The smallest cost that any configuration reaches."""
        return self.fixed + float(self.table.min(axis=1).sum())


def weight_bytes(parameters: int, bits: int) -> int:
    """Return the bytes of a layer's weights packed at `bits` bits, rounded up to a whole byte.

    Raises:
        InvalidBitsError: a width that is no whole number from 1 to 8.
        InvalidParameterError: a number of weights that is negative or no whole number.
    """
    return -(-whole_number(parameters, "the number of weights", 0) * bit_width(bits, "bits") // 8)


def size_cost(layers: pd.DataFrame, choices: Sequence[int]) -> CostTable:
    """Return the packed size in bytes: weights, a float32 scale and a uint8 zero point per channel, float32 biases.

    Args:
        layers: layer table of :func:`emq_lib.core.graphs.describe_layers`.
        choices: the B allowed widths.

    Raises:
        InvalidBitsError: choices that do not increase, or a width outside 1 to 8.
        InvalidParameterError: no layer table.
    """
    layers = _checked(layers, ("parameters", "channels", "biases"))
    overhead = layers["channels"] * (SCALE_BYTES + ZERO_POINT_BYTES) + layers["biases"] * BIAS_BYTES
    return _cost(
        "size", "bytes", layers, choices, lambda layer, bits: weight_bytes(layer.parameters, bits), overhead.sum()
    )


def bops_cost(layers: pd.DataFrame, choices: Sequence[int], *, activation_bits: int) -> CostTable:
    """Return the bit operations of one image: sum of MACs x weight bits x activation bits.

    Args:
        layers: layer table.
        choices: the B allowed widths.
        activation_bits: width of every layer's input.

    Raises:
        InvalidBitsError, InvalidParameterError: see :func:`size_cost`.
    """
    layers, width = _checked(layers, ("macs",)), bit_width(activation_bits, "activation_bits")
    return _cost("BOPs", "bit operations", layers, choices, lambda layer, bits: layer.macs * bits * width, 0)


def average_bits_cost(layers: pd.DataFrame, choices: Sequence[int]) -> CostTable:
    """Return the average bits: bits of the searchable weights divided by their number.

    Args:
        layers: layer table.
        choices: the B allowed widths.

    Raises:
        InvalidBitsError, InvalidParameterError: see :func:`size_cost`.
    """
    layers = _checked(layers, ("parameters",))
    free = layers[layers["searchable"]]
    if not (weights := free["parameters"].sum()):
        raise InvalidParameterError("The layer table has no searchable weights, so that nothing has average bits.")
    return _cost("average bits", "bits", free, choices, lambda layer, bits: layer.parameters * bits / weights, 0)


def _checked(layers: pd.DataFrame, counts: Sequence[str]) -> pd.DataFrame:
    """Return a layer table after checking the columns that costs follow from.

    Raises:
        InvalidParameterError: no table, a column that is missing, a count that is none, or slots with gaps.
    """
    needed = {"searchable", "slot", "pinned_bits", *counts}
    if not isinstance(layers, pd.DataFrame) or not needed <= set(layers) or layers.empty:
        raise InvalidParameterError(f"A cost needs a layer table with the columns {sorted(needed)}, and layers in it.")
    for column, least in {**dict.fromkeys(counts, 0), "slot": -1, "pinned_bits": 0}.items():
        for value in layers[column]:
            whole_number(value, f"{column} of the layer table", least)
    slots = set(layers.loc[layers["searchable"].astype(bool), "slot"])
    if slots != set(range(len(slots))):
        raise InvalidParameterError(f"The slots of searchable layers run from 0 without gaps; got {sorted(slots)}.")
    return layers


def _cost(
    name: str,
    unit: str,
    layers: pd.DataFrame,
    choices: Sequence[int],
    entry: Callable[[Any, int], float],
    overhead: float,
) -> CostTable:
    """Tabulate `entry(layer, bits)` by slot; the pinned layers and the overhead are fixed."""
    choices = bit_choices(choices)
    table = np.zeros((layers["slot"].max() + 1, len(choices)))
    for layer in layers.itertuples():
        if layer.searchable:
            table[layer.slot] += [entry(layer, bits) for bits in choices]
        else:
            overhead += entry(layer, bit_width(layer.pinned_bits, f"layer {layer.Index} of the layer table"))
    return CostTable(name, unit, float(overhead), table)
