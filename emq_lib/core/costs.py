"""Tables over (slot, choice): reading a configuration's entries, and the costs that are such tables (size, BOPs).

Explained in chapters 01 and 04.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from emq_lib.core.errors import ConfigLengthError, InvalidBitsError

SCALE_BYTES, ZERO_POINT_BYTES, BIAS_BYTES = 4, 1, 4


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
        InvalidBitsError: a width is not among the choices.

    >>> choice_indices([2, 4, 3], choices=(2, 3, 4), slots=3)
    array([[0, 2, 1]])
    """
    configs = np.atleast_2d(np.asarray(configs))
    if configs.ndim != 2 or configs.shape[1] != slots:
        raise ConfigLengthError(
            f"A configuration needs {slots} bit widths, one per searchable layer; got shape {configs.shape[1:]}."
        )
    if not (allowed := np.isin(configs, choices)).all():
        row, slot = np.argwhere(~allowed)[0]
        raise InvalidBitsError(
            f"Configuration {row} has {configs[row, slot]} bits in slot {slot}; the choices are {tuple(choices)}."
        )
    return np.searchsorted(choices, configs)


def selected(table: np.ndarray, configs: np.ndarray | Sequence, choices: Sequence[int]) -> np.ndarray:
    """Return the entries of a table (S, B) that each configuration selects, one per slot, float64, shape (N, S)."""
    indices = choice_indices(configs, choices, len(table))
    return np.take_along_axis(np.asarray(table, dtype=np.float64)[None], indices[:, :, None], axis=2)[:, :, 0]


def gather(table: np.ndarray, configs: np.ndarray | Sequence, choices: Sequence[int]) -> np.ndarray:
    """Return the sum of the table entries that each configuration selects: one gather, however many configurations.

    Args:
        table: shape (S, B).
        configs: bits, shape (N, S).
        choices: the B allowed widths.

    Returns:
        float64 array of shape (N,).

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
        """Return the cost of each configuration, shape (N,)."""
        return self.fixed + gather(self.table, configs, choices)

    @property
    def smallest(self) -> float:
        """The smallest cost that any configuration reaches."""
        return self.fixed + float(self.table.min(axis=1).sum())


def weight_bytes(parameters: int, bits: int) -> int:
    """Return the bytes of a layer's weights packed at `bits` bits, rounded up to a whole byte."""
    return -(-int(parameters) * int(bits) // 8)


def size_cost(layers: pd.DataFrame, choices: Sequence[int]) -> CostTable:
    """Return the packed size in bytes: weights, a float32 scale and a uint8 zero point per channel, float32 biases.

    Args:
        layers: layer table of :func:`emq_lib.core.graphs.layer_table`.
        choices: the B allowed widths.
    """
    overhead = layers["channels"] * (SCALE_BYTES + ZERO_POINT_BYTES) + layers["biases"] * BIAS_BYTES
    return _cost(
        "size", "bytes", layers, choices, lambda layer, bits: weight_bytes(layer.parameters, bits), overhead.sum()
    )


def bops_cost(layers: pd.DataFrame, choices: Sequence[int], *, activation_bits: int) -> CostTable:
    """Return the bit operations of one image: sum of MACs x weight bits x activation bits."""
    return _cost("BOPs", "bit operations", layers, choices, lambda layer, bits: layer.macs * bits * activation_bits, 0)


def average_bits_cost(layers: pd.DataFrame, choices: Sequence[int]) -> CostTable:
    """Return the average bits: bits of the searchable weights divided by their number."""
    free = layers[layers["searchable"]]
    weights = free["parameters"].sum()
    return _cost("average bits", "bits", free, choices, lambda layer, bits: layer.parameters * bits / weights, 0)


def _cost(name: str, unit: str, layers: pd.DataFrame, choices: Sequence[int], entry, overhead: float) -> CostTable:
    """Tabulate `entry(layer, bits)` by slot; the pinned layers and the overhead are fixed."""
    table = np.zeros((layers["slot"].max() + 1, len(choices)))
    for layer in layers.itertuples():
        if layer.searchable:
            table[layer.slot] += [entry(layer, bits) for bits in choices]
        else:
            overhead += entry(layer, layer.pinned_bits)
    return CostTable(name, unit, float(overhead), table)
