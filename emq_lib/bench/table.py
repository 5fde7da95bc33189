"""The bench: the table of measured configurations.

Explained in chapter 01.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from emq_lib.core.checks import random_source, real_numbers, whole_number
from emq_lib.core.configs import bits_text
from emq_lib.core.costs import CostTable, bops_cost, choice_indices, size_cost
from emq_lib.core.errors import (
    ConfigLengthError,
    ConfigNotFoundError,
    CorruptArtefactError,
    InfeasibleBudgetError,
    InvalidParameterError,
    MissingArtefactError,
)
from emq_lib.core.files import read_table, vouched_path

SAMPLES = ("random", "stratified", "one-off", "uniform", "one-bit")
MEASURED = ("top1", "loss", "correct_a", "correct_b", "n_a", "n_b")
_CELLS = {
    "config_id": str,
    "quantizer": str,
    "sample": str,
    "bits": None,
    "top1": float,
    "loss": float,
    **dict.fromkeys(("correct_a", "correct_b", "n_a", "n_b", "size_bytes", "bops"), int),
}
COLUMNS = ("key", *_CELLS)  # a key is needed to extend a bench, not to read it
_LAYER_CELLS = {
    "name": str,  # which may look like a number
    "kind": str,
    **dict.fromkeys(("parameters", "channels", "biases", "macs", "slot", "pinned_bits"), int),
    "searchable": bool,
}
BENCH, LAYERS = "bench.parquet", "layers.csv"


@dataclass(frozen=True)
class Bench:
    """The measured configurations of one study under one quantizer.

    Attributes:
        name: of the study.
        table: one row per configuration, columns as in :data:`COLUMNS`.
        layers: the network's layer table, see :func:`emq_lib.core.graphs.describe_layers`.
    """

    name: str
    table: pd.DataFrame
    layers: pd.DataFrame

    @classmethod
    def read(cls, folder: pathlib.Path | str, quantizer: str = "rtn") -> Bench:
        """Read the bench of a study's folder after checking its files against the manifest there.

        Args:
            folder: e.g. ``data/cifar10-resnet20``.
            quantizer: "rtn" (to nearest) or "adaround" (learned rounding).

        Raises:
            MissingArtefactError: there is no bench, or none with this quantizer.
            CorruptArtefactError: a file is truncated or altered.
        """
        folder = pathlib.Path(folder)
        table = read_bench(vouched_path(folder, BENCH))
        chosen = table[table["quantizer"] == quantizer]
        if chosen.empty:
            raise MissingArtefactError(
                f"The bench of {folder.name!r} has no rows of {quantizer!r}, only of "
                f"{', '.join(table['quantizer'].unique())}. Measure them: build_bench(quantizer=...)."
            )
        return cls(folder.name, chosen.reset_index(drop=True), read_layers(vouched_path(folder, LAYERS)))

    def __len__(self) -> int:
        """Return the number of configurations."""
        return len(self.table)

    @property
    def quantizer(self) -> str:
        """How weights were rounded, "rtn" or "adaround"."""
        return str(self.table["quantizer"].iloc[0])

    @property
    def choices(self) -> tuple[int, ...]:
        """The widths that a proxy chooses from: all measured ones, without those that only the sample "one-bit" has."""
        return _widths(self.table[self.table["sample"] != "one-bit"])

    @property
    def configs(self) -> np.ndarray:
        """Bits of every configuration, int8, shape (N, S)."""
        return np.stack(self.table["bits"].to_numpy()).astype(np.int8)

    @property
    def top1(self) -> np.ndarray:
        """Top-1 in percent of every configuration, shape (N,)."""
        return self.table["top1"].to_numpy()

    @property
    def half_a(self) -> np.ndarray:
        """Top-1 in percent on half A of the test images, shape (N,)."""
        return 100 * (self.table["correct_a"] / self.table["n_a"]).to_numpy()

    @property
    def half_b(self) -> np.ndarray:
        """Top-1 in percent on half B of the test images, shape (N,)."""
        return 100 * (self.table["correct_b"] / self.table["n_b"]).to_numpy()

    def query(self, config: Sequence[int]) -> pd.Series:
        """Return the row of one configuration.

        Raises:
            ConfigLengthError: it is not one configuration with one entry per searchable layer.
            InvalidBitsError: a width that no configuration of the bench has.
            ConfigNotFoundError: it was not measured.
        """
        configs = self.configs
        if len(choice_indices(config, _widths(self.table), configs.shape[1])) != 1 or np.ndim(config) != 1:
            raise ConfigLengthError(
                f"query takes one configuration of {configs.shape[1]} widths, got {np.shape(config)}."
            )
        rows = np.flatnonzero((configs == np.asarray(config)).all(axis=1))
        if not len(rows):
            raise ConfigNotFoundError(
                f"{tuple(map(int, config))} is not among the {len(self)} configurations of {self.name!r}. "
                "Measure it with emq_lib.bench.engine.measure."
            )
        return self.table.iloc[rows[0]]

    def select(self, sample: str) -> Bench:
        """Return the configurations of one sample, one of :data:`SAMPLES`.

        Raises:
            InvalidParameterError: the bench holds no such sample.
        """
        chosen = self.table[self.table["sample"] == sample]
        if chosen.empty:
            known = ", ".join(sorted(self.table["sample"].unique()))
            raise InvalidParameterError(f"the bench of {self.name!r} has no sample {sample!r}; it has {known}.")
        return self._of(chosen)

    def within(self, *, size: tuple[float, float] | None = None, bops: tuple[float, float] | None = None) -> Bench:
        """Return the configurations whose packed size (bytes) and bit operations lie in the ranges, ends included.

        Raises:
            InvalidScoreError, InvalidParameterError: a range that is not two numbers, the smaller first.
        """
        table = self.table
        for column, bounds in (("size_bytes", size), ("bops", bops)):
            if bounds is not None:
                low, high = _range(bounds, column)
                table = table[table[column].between(low, high)]
        return self._of(table)

    def sample(self, count: int, *, rng: np.random.Generator) -> Bench:
        """Return `count` of the configurations, drawn without repetition, in the order of the table.

        Raises:
            InvalidParameterError: there are fewer, or the number is none, or no generator.
        """
        if whole_number(count, "count", 0) > len(self):
            raise InvalidParameterError(f"asked for {count} of {len(self)} configurations.")
        random_source(rng)
        return self._of(self.table.iloc[np.sort(rng.choice(len(self), size=count, replace=False))])

    def best(self, *, size: float = np.inf, bops: float = np.inf) -> pd.Series:
        """Return the row with the highest top-1 whose packed size (bytes) and bit operations keep the budgets.

        Raises:
            InfeasibleBudgetError: no measured configuration does.
        """
        fits = self.within(size=(-np.inf, size), bops=(-np.inf, bops)).table
        if fits.empty:
            raise InfeasibleBudgetError(
                f"None of the {len(self)} configurations has at most {size} bytes and {bops} bit operations; the "
                f"smallest has {self.table['size_bytes'].min()} bytes, the cheapest {self.table['bops'].min()}."
            )
        return fits.loc[fits["top1"].idxmax()]

    def to_pandas(self) -> pd.DataFrame:
        """Return a copy of the table, to change at will."""
        return self.table.copy()

    def split(self, sample: str = "random") -> tuple[Bench, Bench]:
        """Return the search half and the held-out half of a sample's configurations.

        A configuration's half follows from its bits alone (:func:`is_held_out`): a bench that grows keeps its halves,
        and a configuration that is held out is held out of every sample and under every quantizer.

        Args:
            sample: one of :data:`SAMPLES`.
        """
        part = self.select(sample)
        held = np.array([is_held_out(config) for config in part.configs])
        return part._of(part.table[~held]), part._of(part.table[held])

    def cost(self, name: str) -> CostTable:
        """Return the cost table "size" or "BOPs" of the bench's choices.

        Raises:
            InvalidParameterError: another name.
        """
        if name == "size":
            return size_cost(self.layers, self.choices)
        if name == "BOPs":
            return bops_cost(self.layers, self.choices, activation_bits=self._activation_bits())
        raise InvalidParameterError(f"unknown cost {name!r}; there are size and BOPs.")

    def _activation_bits(self) -> int:
        """Return the width of activations: bit operations are proportional to it."""
        row = self.table.iloc[0]
        widths = _widths(self.table)
        return int(row["bops"] // bops_cost(self.layers, widths, activation_bits=1).total([row["bits"]], widths)[0])

    def _of(self, rows: pd.DataFrame) -> Bench:
        return replace(self, table=rows.reset_index(drop=True))


def is_held_out(config: Sequence[int]) -> bool:
    """Return whether a configuration belongs to the held-out half: a bit of a hash of its widths.

    >>> [is_held_out(config) for config in [(2, 2), (2, 3), (3, 2), (3, 3)]]
    [True, True, False, True]
    """
    return bool(hashlib.blake2b(bits_text(config).encode(), digest_size=1).digest()[0] & 1)


def _range(bounds: tuple[float, float], what: str) -> tuple[float, float]:
    """Return the ends of a range, which may be infinite, after checking it."""
    ends = real_numbers(bounds, f"ends of the range of {what}", ndim=1, finite=False)
    if len(ends) != 2 or not ends[0] <= ends[1]:
        raise InvalidParameterError(f"the range of {what} must be two numbers, the smaller first; got {bounds}.")
    return float(ends[0]), float(ends[1])


def _widths(table: pd.DataFrame) -> tuple[int, ...]:
    return tuple(map(int, np.unique(np.concatenate(table["bits"].to_numpy()))))


def read_bench(path: pathlib.Path) -> pd.DataFrame:
    """Read the table of a bench, all quantizers, and check its columns and its numbers.

    Raises:
        CorruptArtefactError: not a parquet file, or a column is missing or holds what cannot be.
    """
    table = read_table(path, _CELLS, unique=("quantizer", "config_id"))
    odd = {
        "counts that cannot be, or do not give its top-1": not counts_agree(table),
        "a sample that is none": not table["sample"].isin(SAMPLES).all(),
        "configurations of different lengths": table["bits"].map(np.size).nunique() > 1,
        "widths other than those that name the configuration": any(map(_misnamed, table["bits"], table["config_id"])),
    }
    if found := [what for what, is_so in odd.items() if is_so]:
        raise CorruptArtefactError(f"{path} holds {', '.join(found)}. Restore it, or make it again.")
    return table


def counts_agree(table: pd.DataFrame) -> bool:
    """Return whether, of the images of each half, as many are correct as there can be, and as the top-1 says."""
    images, correct = (table[[f"{what}_a", f"{what}_b"]].to_numpy() for what in ("n", "correct"))
    if (images <= 0).any() or (correct < 0).any() or (correct > images).any():
        return False
    return np.allclose(table["top1"], 100 * correct.sum(axis=1) / images.sum(axis=1))


def _misnamed(bits: object, name: object) -> bool:
    """Return whether widths are not whole numbers from 1 to 8 with this text."""
    widths = np.atleast_1d(np.asarray(bits))
    known = len(widths) > 0 and widths.dtype.kind in "iu" and ((widths > 0) & (widths <= 8)).all()
    return not known or bits_text(widths) != name


def read_layers(path: pathlib.Path) -> pd.DataFrame:
    """Read a layer table.

    Raises:
        CorruptArtefactError: not such a table.
    """
    return read_table(path, _LAYER_CELLS, unique=("name",))
