"""The bench: the table of measured configurations.

Explained in chapter 01.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from book.studies.bench import load_layers
from book.studies.study import checked_path
from emq_lib.core.costs import CostTable, bops_cost, choice_indices, size_cost
from emq_lib.core.errors import (
    ConfigNotFoundError,
    CorruptArtefactError,
    InfeasibleBudgetError,
    InvalidParameterError,
    MissingArtefactError,
)
from emq_lib.core.profiles import Profile, get_profile

COLUMNS = (
    "key",
    "config_id",
    "quantizer",
    "sample",
    "bits",
    "top1",
    "loss",
    "correct_a",
    "correct_b",
    "n_a",
    "n_b",
    "size_bytes",
    "bops",
)
SAMPLES = ("random", "stratified", "one-off", "uniform", "one-bit")
MEASURED = ("top1", "loss", "correct_a", "correct_b", "n_a", "n_b")


@dataclass(frozen=True)
class Bench:
    """The measured configurations of one study.

    Attributes:
        profile: the study.
        table: one row per configuration, columns as in :data:`COLUMNS`.
    """

    profile: Profile
    table: pd.DataFrame

    @classmethod
    def load(cls, profile: Profile | str, quantizer: str | None = None) -> Bench:
        """Load a study's bench after checking it against the manifest.

        Args:
            profile: the study or its name.
            quantizer: "rtn" or "adaround"; by default the profile's.

        Raises:
            UnknownProfileError: no such profile.
            MissingArtefactError: the bench was not built, or not with this quantizer.
            CorruptArtefactError: the file is truncated or altered.
        """
        profile = get_profile(profile) if isinstance(profile, str) else profile
        profile = dataclasses.replace(profile, quantizer=quantizer or profile.quantizer)
        table = _read_table(checked_path(profile, "bench.parquet"))
        chosen = table[table["quantizer"] == profile.quantizer]
        if chosen.empty:
            raise MissingArtefactError(
                f"The bench of {profile.name!r} has no rows of {profile.quantizer!r}, only of "
                f"{', '.join(table['quantizer'].unique())}. Measure them: build_bench(quantizer=...)."
            )
        return cls(profile, chosen.reset_index(drop=True))

    def __len__(self) -> int:
        """Return the number of configurations."""
        return len(self.table)

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
            ConfigLengthError: the configuration does not have one entry per searchable layer.
            InvalidBitsError: a width is not among the choices.
            ConfigNotFoundError: it was not measured.
        """
        configs = self.configs
        choice_indices(config, self.profile.choices, configs.shape[1])
        rows = np.flatnonzero((configs == np.asarray(config)).all(axis=1))
        if not len(rows):
            raise ConfigNotFoundError(
                f"{tuple(map(int, config))} is not among the {len(self)} configurations of {self.profile.name!r}. "
                "Measure it with emq_lib.bench.measure."
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
            raise InvalidParameterError(f"the bench of {self.profile.name!r} has no sample {sample!r}; it has {known}.")
        return Bench(self.profile, chosen.reset_index(drop=True))

    def within(self, *, size: tuple[float, float] | None = None, bops: tuple[float, float] | None = None) -> Bench:
        """Return the configurations whose packed size (bytes) and bit operations lie in the ranges, ends included."""
        table = self.table
        for column, bounds in (("size_bytes", size), ("bops", bops)):
            if bounds is not None:
                table = table[table[column].between(*bounds)]
        return Bench(self.profile, table.reset_index(drop=True))

    def sample(self, count: int, *, rng: np.random.Generator) -> Bench:
        """Return `count` of the configurations, drawn without repetition, in the order of the table.

        Raises:
            InvalidParameterError: there are fewer.
        """
        if count > len(self):
            raise InvalidParameterError(f"asked for {count} of {len(self)} configurations.")
        rows = np.sort(rng.choice(len(self), size=count, replace=False))
        return Bench(self.profile, self.table.iloc[rows].reset_index(drop=True))

    def best(self, *, size: float = np.inf, bops: float = np.inf) -> pd.Series:
        """Return the row with the highest top-1 whose packed size (bytes) and bit operations keep the budgets.

        Raises:
            InfeasibleBudgetError: no measured configuration does.
        """
        fits = self.within(size=(0, size), bops=(0, bops)).table
        if fits.empty:
            raise InfeasibleBudgetError(
                f"None of the {len(self)} configurations has at most {size} bytes and {bops} bit operations; the "
                f"smallest has {self.table['size_bytes'].min()} bytes, the cheapest {self.table['bops'].min()}."
            )
        return fits.loc[fits["top1"].idxmax()]

    def to_pandas(self) -> pd.DataFrame:
        """Return a copy of the table, to change at will."""
        return self.table.copy()

    def split(self, sample: str = "random", *, rng: np.random.Generator | None = None) -> tuple[Bench, Bench]:
        """Return the search half and the held-out half of a sample's configurations.

        Args:
            sample: one of :data:`SAMPLES`.
            rng: source of the split; by default the study's own stream, so that every chapter sees the same halves.
        """
        table = self.select(sample).table
        order = (rng or self.profile.rng("split")).permutation(len(table))
        halves = np.sort(order[: len(table) // 2]), np.sort(order[len(table) // 2 :])
        search, heldout = (Bench(self.profile, table.iloc[half].reset_index(drop=True)) for half in halves)
        return search, heldout

    def cost(self, name: str) -> CostTable:
        """Return the study's cost table "size" or "BOPs"."""
        layers = load_layers(self.profile)
        tables = {
            "size": size_cost(layers, self.profile.choices),
            "BOPs": bops_cost(layers, self.profile.choices, activation_bits=self.profile.activation_bits),
        }
        return tables[name]


def _read_table(path: pathlib.Path) -> pd.DataFrame:
    """Read a bench and check its columns."""
    try:
        table = pd.read_parquet(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptArtefactError(f"{path} is not a parquet file ({error}). Restore or rebuild it.") from error
    if absent := sorted(set(COLUMNS) - {"key"} - set(table.columns)):  # a key is needed to extend, not to read
        raise CorruptArtefactError(f"{path} lacks the columns {absent}. Restore or rebuild it.")
    return table
