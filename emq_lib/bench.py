"""The bench: sampling configurations, having them measured, and the table of what was measured.

Explained in chapter 01.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.optimize import brentq
from scipy.special import softmax

from emq_lib.artefacts import atomic_path, checked_path, read_manifest, record, sole_writer, study_folder
from emq_lib.costs import CostTable, bops_cost, choice_indices, size_cost
from emq_lib.datasets import ImageData
from emq_lib.errors import (
    ConfigNotFoundError,
    CorruptArtefactError,
    InfeasibleBudgetError,
    InvalidParameterError,
    MissingArtefactError,
)
from emq_lib.measuring import PARTIAL, load_network, measure_resumably
from emq_lib.profiles import QUANTIZERS, Profile, get_profile

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
ONE_BIT_LAYERS = 3  # at most, in a configuration of the sample "one-bit"
DRAWS = 2_000  # in each strip of the stratified sample
SAMPLES = ("random", "stratified", "one-off", "uniform", "one-bit")
MEASURED = ("top1", "loss", "correct_a", "correct_b", "n_a", "n_b")


def sample_configs(slots: int, choices: Sequence[int], count: int, *, rng: np.random.Generator) -> np.ndarray:
    """Return the uniform configurations followed by `count` distinct random ones that are not uniform.

    A larger count extends a smaller one: the first rows stay the same.

    Args:
        slots: S, the number of searchable layers.
        choices: the B allowed widths.
        count: how many random configurations.
        rng: source of randomness.

    Returns:
        int8 array of shape (B + count, S).

    Raises:
        InvalidParameterError: there are not that many different configurations.
    """
    possible = len(choices) ** int(slots) - len(choices)
    if count > possible:
        raise InvalidParameterError(f"asked for {count} configurations, but only {possible} are not uniform.")
    found = {(bits,) * slots: None for bits in choices}
    while len(found) < len(choices) + count:
        found.setdefault(tuple(int(bits) for bits in rng.choice(choices, size=slots)), None)
    return np.array(list(found), dtype=np.int8)


def one_off_configs(slots: int, choices: Sequence[int]) -> np.ndarray:
    """Return the configurations that change one layer of the uniform one at the middle choice, shape (S (B - 1), S)."""
    middle = choices[len(choices) // 2]
    configs = np.full((slots, len(choices) - 1, slots), middle, dtype=np.int8)
    for slot in range(slots):
        configs[slot, :, slot] = [bits for bits in choices if bits != middle]
    return configs.reshape(-1, slots)


def one_bit_configs(slots: int, choices: Sequence[int], count: int, *, rng: np.random.Generator) -> np.ndarray:
    """Return distinct random configurations in which one, two or three layers, as often each, have 1 bit instead.

    Few enough that the network still works: with every layer free to have 1 bit, most configurations guess. A larger
    count extends a smaller one.

    Args:
        slots: S, the number of searchable layers.
        choices: the B widths of the other layers, 1 not among them.
        count: how many.
        rng: source of randomness.

    Returns:
        int8 array of shape (count, S).

    Raises:
        InvalidParameterError: there are not that many different configurations.
    """
    slots = int(slots)
    most = min(ONE_BIT_LAYERS, slots)
    possible = sum(math.comb(slots, few) * len(choices) ** (slots - few) for few in range(1, most + 1))
    if count > possible // 2:
        raise InvalidParameterError(f"asked for {count} of {possible} configurations with 1 to {most} layers at 1 bit.")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        config = rng.choice(choices, size=slots)
        config[rng.choice(slots, size=rng.integers(1, most + 1), replace=False)] = 1
        found.setdefault(tuple(map(int, config)), None)
    return np.array(list(found), dtype=np.int8)


def stratified_configs(
    cost: CostTable, choices: Sequence[int], count: int, *, rng: np.random.Generator, exclude: Iterable = ()
) -> np.ndarray:
    """Return distinct configurations spread evenly over the cost, from the cheapest to the dearest.

    The range of the cost is cut into `count` strips. Each strip gives one configuration, drawn uniformly from those in
    it: entries are drawn independently with probabilities proportional to exp(t cost), where t makes the expected cost
    the middle of the strip, and the first new draw within the strip is taken. Given its cost, such a draw is uniform.
    If none of 2,000 draws lies in the strip, the new one that is closest to it is taken.

    Args:
        cost: its table has shape (S, B).
        choices: the B allowed widths.
        count: how many.
        rng: source of randomness.
        exclude: configurations that must not be among them.

    Returns:
        int8 array of shape (count, S), by increasing cost.

    Raises:
        InvalidParameterError: there are not that many different configurations.
    """
    table, taken = cost.table, {tuple(map(int, config)) for config in exclude}
    if count + len(taken) > len(choices) ** len(table):
        raise InvalidParameterError(f"asked for {count} more configurations than the {len(taken)} taken; too many.")
    edges = np.linspace(table.min(axis=1).sum(), table.max(axis=1).sum(), count + 1)
    found = []
    for left, right in itertools.pairwise(edges):
        cumulative = _tilted(table, (left + right) / 2).cumsum(axis=1)
        draws = (rng.random((DRAWS, len(table), 1)) > cumulative[:, :-1]).sum(axis=2)
        totals = np.take_along_axis(table[None], draws[:, :, None], axis=2).sum(axis=(1, 2))
        outside = np.maximum(np.maximum(left - totals, totals - right), 0)
        candidates = np.asarray(choices)[draws[np.argsort(outside, kind="stable")]]
        anywhere = (
            rng.choice(choices, size=len(table)) for _ in itertools.count()
        )  # once a strip's neighbourhood is used up
        new = (tuple(map(int, config)) for config in itertools.chain(candidates, anywhere))
        config = next(config for config in new if config not in taken)
        taken.add(config)
        found.append(config)
    configs = np.array(found, dtype=np.int8)
    return configs[np.argsort(cost.total(configs, choices), kind="stable")]


def _tilted(table: np.ndarray, mean: float) -> np.ndarray:
    """Return the probabilities proportional to exp(t table) in each row whose expected sum is `mean`, shape (S, B)."""
    scaled = table / table.max()

    def probabilities(t: float) -> np.ndarray:
        return softmax(t * scaled, axis=1)

    def excess(t: float) -> float:
        return (probabilities(t) * table).sum() - mean

    ends = (-1e6, 1e6)
    if excess(ends[0]) >= 0 or excess(ends[1]) <= 0:
        return probabilities(ends[0] if excess(ends[0]) >= 0 else ends[1])
    return probabilities(brentq(excess, *ends))


def design(profile: Profile, layers: pd.DataFrame) -> pd.DataFrame:
    """Return the configurations of a profile's bench, columns sample and bits; no configuration stands twice.

    Samples: "uniform", "random", "one-off" (one layer of the middle uniform configuration changed), "stratified"
    (evenly spread in size) and, if the profile asks for it and rounding is learned, "one-bit" (one to three layers at
    1 bit, the others random).
    """
    size = size_cost(layers, profile.choices)
    slots = len(size.table)
    random = sample_configs(slots, profile.choices, profile.bench_configs, rng=profile.rng("bench"))
    samples = {"uniform": random[: len(profile.choices)], "random": random[len(profile.choices) :]}
    samples["one-off"] = one_off_configs(slots, profile.choices)
    taken = np.concatenate(list(samples.values()))
    samples["stratified"] = stratified_configs(
        size, profile.choices, profile.stratified_configs, rng=profile.rng("stratified"), exclude=taken
    )
    if widths(profile) != profile.choices:
        count, rng = profile.one_bit_configs, profile.rng("one-bit")
        samples["one-bit"] = one_bit_configs(slots, profile.choices, count, rng=rng)
    rows = pd.DataFrame([(sample, config) for sample, configs in samples.items() for config in configs])
    rows.columns = ["sample", "bits"]
    return rows[~rows["bits"].map(bits_text).duplicated()].reset_index(drop=True)


def widths(profile: Profile) -> tuple[int, ...]:
    """Return the widths that a profile's bench measures: its choices, and 1 bit if it has the sample "one-bit"."""
    wider = profile.quantizer == "adaround" and profile.one_bit_configs > 0
    return tuple(sorted({1, *profile.choices})) if wider else profile.choices


def bits_text(config: Sequence[int]) -> str:
    """Return a configuration as text, one digit per slot.

    >>> bits_text([2, 4, 3])
    '243'
    """
    return "".join(str(int(bits)) for bits in config)


def parse_bits(text: str) -> tuple[int, ...]:
    """Undo :func:`bits_text`."""
    return tuple(int(digit) for digit in text)


def build_bench(
    profile: Profile, data: ImageData, *, quantizer: str | None = None, scheduler: str | None = None
) -> None:
    """Measure the profile's configurations on test images; write ``layers.csv`` and ``bench.parquet``.

    Can be interrupted and called again: see :func:`emq_lib.measuring.measure_resumably`. Rows of an earlier bench that
    still hold are taken over, so a profile that asks for more configurations extends what is there. Rows of other
    quantizers stay.

    Args:
        profile: the study; its checkpoint must exist.
        data: its images.
        quantizer: "rtn" or "adaround"; by default the profile's.
        scheduler: address of a ``dask.distributed`` scheduler; by default this process measures.

    Raises:
        StudyBusyError: another run is writing the study.
        DiskFullError: no room; what was measured is kept.
    """
    folder = study_folder(profile)
    profile = dataclasses.replace(profile, quantizer=quantizer or profile.quantizer)
    with sole_writer(profile):
        started = time.perf_counter()
        choices = widths(profile)
        network, layers = load_network(dataclasses.replace(profile, choices=choices), data)
        preparation = time.perf_counter() - started
        rows = design(profile, layers)
        configs = np.stack(rows["bits"].to_numpy())
        before, seconds_before = _present_table(profile)
        known = before.set_index("key")[list(MEASURED)].to_dict("index")
        measured, seconds = measure_resumably(
            profile, network, data, configs, images=profile.bench_images, known=known, scheduler=scheduler
        )
        size = size_cost(layers, choices)
        bit_operations = bops_cost(layers, choices, activation_bits=profile.activation_bits)
        table = measured.assign(
            config_id=rows["bits"].map(bits_text),
            quantizer=profile.quantizer,
            sample=rows["sample"],
            bits=list(configs),
            size_bytes=size.total(configs, choices).astype(np.int64),
            bops=bit_operations.total(configs, choices).astype(np.int64),
        )
        write_layers(profile, layers)
        others = before[before["quantizer"] != profile.quantizer]
        table = pd.concat([table, others] if profile.quantizer == QUANTIZERS[0] else [others, table])
        with atomic_path(folder / "bench.parquet") as path:
            table[list(COLUMNS)].to_parquet(path, index=False)
        command, seconds = f"emq_lib.bench.build_bench on {profile.name}", preparation + seconds + seconds_before
        record(profile, "bench.parquet", command=command, seconds=seconds, rows=len(table))
        (folder / PARTIAL).unlink(missing_ok=True)


def _present_table(profile: Profile) -> tuple[pd.DataFrame, float]:
    """Return the study's present bench, all quantizers, and the wall time it took; an empty one if there is none."""
    if has_study(profile, "bench.parquet"):
        table = _read_table(checked_path(profile, "bench.parquet"))
        if "key" in table:
            return table, read_manifest(profile)["bench.parquet"]["seconds"]
    return pd.DataFrame(columns=list(COLUMNS)), 0.0


def write_layers(profile: Profile, layers: pd.DataFrame) -> None:
    """Write the study's ``layers.csv``."""
    with atomic_path(study_folder(profile) / "layers.csv") as path:
        layers.to_csv(path, index=False)
    record(
        profile, "layers.csv", command=f"emq_lib.models.layer_table on {profile.name}", seconds=0.0, rows=len(layers)
    )


def load_layers(profile: Profile) -> pd.DataFrame:
    """Return the study's layer table."""
    return pd.read_csv(checked_path(profile, "layers.csv"), dtype={"name": str})  # names may look like numbers


def slot_names(layers: pd.DataFrame) -> pd.Index:
    """Return a name for every slot of a layer table: that of its first layer; others may share its width."""
    return pd.Index(layers.query("searchable").drop_duplicates("slot").sort_values("slot")["name"])


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
                f"{', '.join(table['quantizer'].unique())}. Measure them with emq_lib.bench.build_bench(quantizer=...)."
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


def has_study(profile: Profile, *filenames: str) -> bool:
    """Return whether every named file of the study is there and unaltered."""
    try:
        for filename in filenames:
            checked_path(profile, filename)
    except MissingArtefactError:
        return False
    return True
