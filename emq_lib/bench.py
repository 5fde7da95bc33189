"""The bench: sampling configurations, measuring them on real images, and the table of what was measured.

Explained in chapter 01.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from emq_lib.artefacts import atomic_path, checked_path, record, sha256, study_folder, to_json
from emq_lib.costs import CostTable, bops_cost, choice_indices, size_cost
from emq_lib.datasets import ImageData, Split
from emq_lib.errors import ConfigNotFoundError, CorruptArtefactError, InvalidParameterError, MissingArtefactError
from emq_lib.models import fold_batchnorm, layer_table, load_checkpoint, segments
from emq_lib.profiles import Profile, get_profile
from emq_lib.quantizers import QuantizedNetwork, quantize_network

BLOCK = 32
COLUMNS = (
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
    possible = len(choices) ** slots - len(choices)
    if count > possible:
        raise InvalidParameterError(f"asked for {count} configurations, but only {possible} are not uniform.")
    found = {(bits,) * slots: None for bits in choices}
    while len(found) < len(choices) + count:
        found.setdefault(tuple(int(bits) for bits in rng.choice(choices, size=slots)), None)
    return np.array(list(found), dtype=np.int8)


@dataclass(frozen=True)
class Measurement:
    """What one configuration does on a set of images.

    Attributes:
        config: the bits, S of them.
        correct: bool, shape (N,): whether each image is classified correctly, in the order of the split.
        loss: mean cross-entropy.
    """

    config: tuple[int, ...]
    correct: np.ndarray
    loss: float

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * float(self.correct.mean())


@torch.inference_mode()
def measure(
    network: QuantizedNetwork, split: Split, configs: np.ndarray, *, batch_size: int = 125
) -> Iterator[list[Measurement]]:
    """Measure configurations on every image of a split, block by block.

    Configurations are visited in lexicographic order. Within a block, neighbours that agree on the first layers share
    the computation up to the first piece of the network in which they differ; the result is the plain forward pass's.

    Args:
        network: the quantized network; its selected configuration changes.
        split: images and labels.
        configs: bits, shape (N, S).
        batch_size: images per forward pass.

    Yields:
        the measurements of up to 32 configurations.

    Raises:
        ConfigLengthError, InvalidBitsError: see :func:`emq_lib.costs.choice_indices`.
    """
    choice_indices(configs, network.bank.choices, len(network.bank.searchable))
    pieces = segments(network.model, list(network.activation_ranges))
    slot_of = {name: slot for slot, name in enumerate(network.bank.searchable)}
    depth = [max((slot_of[name] for name in names if name in slot_of), default=-1) + 1 for _, names in pieces]
    depth = np.maximum.accumulate(depth)  # bits that the output of each piece depends on
    ordered = sorted(tuple(map(int, config)) for config in configs)
    for start in range(0, len(ordered), BLOCK):
        block = ordered[start : start + BLOCK]
        correct = np.empty((len(block), len(split)), dtype=bool)
        losses = np.zeros(len(block))
        for first in range(0, len(split), batch_size):
            batch = split[first : first + batch_size]
            outputs: list[torch.Tensor] = [batch.inputs()]
            for row, config in enumerate(block):
                shared = _shared_pieces(block[row - 1], config, depth) if row else 0
                del outputs[shared + 1 :]
                network.select(config)
                for piece, _ in pieces[shared:]:
                    outputs.append(piece(outputs[-1]))
                logits = outputs[-1].float()
                correct[row, first : first + len(batch)] = (logits.argmax(dim=1) == batch.labels).cpu().numpy()
                losses[row] += F.cross_entropy(logits.double(), batch.labels, reduction="sum").item()
        yield [
            Measurement(config, hits, loss / len(split))
            for config, hits, loss in zip(block, correct, losses, strict=True)
        ]


def _shared_pieces(previous: tuple[int, ...], config: tuple[int, ...], depth: np.ndarray) -> int:
    """Return how many leading pieces give the same output under both configurations."""
    pairs = zip(previous, config, strict=True)
    differs = next((slot for slot, (before, now) in enumerate(pairs) if before != now), len(config))
    return int(np.searchsorted(depth, differs, side="right"))


def load_network(profile: Profile, data: ImageData) -> tuple[QuantizedNetwork, pd.DataFrame]:
    """Return the study's quantized network and its layer table, from the checkpoint in the study's folder."""
    model = fold_batchnorm(load_checkpoint(profile, checked_path(profile, "model.safetensors")))
    layers = layer_table(model, profile)
    return quantize_network(model, layers, profile, data.calibration), layers


def measure_resumably(
    profile: Profile, network: QuantizedNetwork, data: ImageData, configs: np.ndarray, *, partial: str
) -> tuple[pd.DataFrame, float]:
    """Measure configurations on all test images, keeping finished blocks on disk.

    Interrupted at any moment, the same call skips what was measured and returns the same rows.

    Args:
        profile: the study; its checkpoint must exist.
        network: its quantized network.
        data: its images.
        configs: bits, shape (N, S), all distinct.
        partial: name of the file in the study's folder that takes finished blocks; the caller removes it.

    Returns:
        columns top1, loss, correct_a, correct_b, n_a and n_b, one row per configuration in the order given; and the
        wall time in seconds, earlier runs included.

    Raises:
        CorruptArtefactError: the partial file belongs to another checkpoint, other images or another profile.
    """
    folder, started = study_folder(profile), time.perf_counter()
    measured_by = (profile.choices, profile.pinned, profile.activation_bits, profile.quantizer, len(data.calibration))
    key = {"how": repr(measured_by), "images": data.digest, "checkpoint": sha256(folder / "model.safetensors")}
    rows = PartialRows(folder / partial, key=key)
    measured, half = rows.read(), len(data.test) // 2
    names = [bits_text(config) for config in configs]
    missing = [config for name, config in zip(names, configs, strict=True) if name not in measured]
    with tqdm(total=len(configs), initial=len(configs) - len(missing), desc=profile.name, unit="config") as progress:
        for block in measure(network, data.test, np.array(missing).reshape(-1, configs.shape[1])):
            finished = {
                bits_text(item.config): {
                    "top1": item.top1,
                    "loss": item.loss,
                    "correct_a": int(item.correct[:half].sum()),
                    "correct_b": int(item.correct[half:].sum()),
                }
                for item in block
            }
            measured |= rows.append(finished, seconds=time.perf_counter() - started)
            progress.update(len(block))
    table = pd.DataFrame([measured[name] for name in names])
    return table.assign(n_a=half, n_b=len(data.test) - half), rows.seconds


def bits_text(config: Sequence[int]) -> str:
    """Return a configuration as text, one digit per slot.

    >>> bits_text([2, 4, 3])
    '243'
    """
    return "".join(str(int(bits)) for bits in config)


def parse_bits(text: str) -> tuple[int, ...]:
    """Undo :func:`bits_text`."""
    return tuple(int(digit) for digit in text)


def build_bench(profile: Profile, data: ImageData) -> None:
    """Measure the profile's configurations on all test images; write ``layers.csv`` and ``bench.parquet``.

    Can be interrupted and called again: see :func:`measure_resumably`.
    """
    folder, partial = study_folder(profile), "bench.partial.jsonl"
    network, layers = load_network(profile, data)
    slots, choices = int(layers["searchable"].sum()), profile.choices
    configs = sample_configs(slots, choices, profile.bench_configs, rng=profile.rng("bench"))
    measured, seconds = measure_resumably(profile, network, data, configs, partial=partial)
    size, bit_operations = (
        size_cost(layers, choices),
        bops_cost(layers, choices, activation_bits=profile.activation_bits),
    )
    table = measured.assign(
        config_id=np.arange(len(configs)),
        quantizer=profile.quantizer,
        sample=np.where(np.arange(len(configs)) < len(choices), "uniform", "random"),
        bits=list(configs),
        size_bytes=size.total(configs, choices).astype(np.int64),
        bops=bit_operations.total(configs, choices).astype(np.int64),
    )
    write_layers(profile, layers)
    with atomic_path(folder / "bench.parquet") as path:
        table[list(COLUMNS)].to_parquet(path, index=False)
    command = f"emq_lib.bench.build_bench on {profile.name}"
    record(profile, "bench.parquet", command=command, seconds=seconds, rows=len(table))
    (folder / partial).unlink(missing_ok=True)


def write_layers(profile: Profile, layers: pd.DataFrame) -> None:
    """Write the study's ``layers.csv``."""
    with atomic_path(study_folder(profile) / "layers.csv") as path:
        layers.to_csv(path, index=False)
    record(
        profile, "layers.csv", command=f"emq_lib.models.layer_table on {profile.name}", seconds=0.0, rows=len(layers)
    )


def load_layers(profile: Profile) -> pd.DataFrame:
    """Return the study's layer table."""
    return pd.read_csv(checked_path(profile, "layers.csv"))


class PartialRows:
    """Rows of a long measurement on disk: one JSON line per block, the first line saying what they belong to.

    A line cut off by a crash is dropped on reading, so what is read was written whole.
    """

    def __init__(self, path: pathlib.Path, *, key: dict[str, str]) -> None:
        self.path, self.key, self.seconds = path, key, 0.0
        self._before = 0.0

    def read(self) -> dict[str, dict]:
        """Return the finished rows; start the file if it does not exist.

        Raises:
            CorruptArtefactError: the file belongs to something else.
        """
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append_line({"key": self.key})
            return {}
        lines = self.path.read_text().split("\n")
        whole = [json.loads(line) for line in lines[:-1]]
        if not whole or whole[0].get("key") != self.key:
            raise CorruptArtefactError(
                f"{self.path} holds rows of another checkpoint, images or profile. Delete it to measure afresh."
            )
        if lines[-1]:
            with atomic_path(self.path) as path:
                path.write_text("\n".join(lines[:-1]) + "\n")
        self._before = self.seconds = max((line["seconds"] for line in whole[1:]), default=0.0)
        return {name: row for line in whole[1:] for name, row in line["rows"].items()}

    def append(self, rows: dict[str, dict], *, seconds: float) -> dict[str, dict]:
        """Append finished rows (name -> values) with the wall time of this run so far; return them."""
        self.seconds = self._before + seconds
        self._append_line({"rows": rows, "seconds": self.seconds})
        return rows

    def _append_line(self, value: dict) -> None:
        with self.path.open("a") as file:
            file.write(to_json(value) + "\n")


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
    def load(cls, profile: Profile | str) -> Bench:
        """Load a study's bench after checking it against the manifest.

        Raises:
            UnknownProfileError: no such profile.
            MissingArtefactError: the bench was not built.
            CorruptArtefactError: the file is truncated or altered.
        """
        profile = get_profile(profile) if isinstance(profile, str) else profile
        path = checked_path(profile, "bench.parquet")
        try:
            table = pd.read_parquet(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise CorruptArtefactError(f"{path} is not a parquet file ({error}). Restore or rebuild it.") from error
        if absent := sorted(set(COLUMNS) - set(table.columns)):
            raise CorruptArtefactError(f"{path} lacks the columns {absent}. Restore or rebuild it.")
        return cls(profile, table)

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
        """Return the configurations of one sample: "random" or "uniform".

        Raises:
            InvalidParameterError: the bench holds no such sample.
        """
        chosen = self.table[self.table["sample"] == sample]
        if chosen.empty:
            known = ", ".join(sorted(self.table["sample"].unique()))
            raise InvalidParameterError(f"the bench of {self.profile.name!r} has no sample {sample!r}; it has {known}.")
        return Bench(self.profile, chosen.reset_index(drop=True))

    def split(self, rng: np.random.Generator | None = None) -> tuple[Bench, Bench]:
        """Return the search half and the held-out half of the random configurations.

        Args:
            rng: source of the split; by default the study's own stream, so that every chapter sees the same halves.
        """
        table = self.select("random").table
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


def has_study(profile: Profile, *filenames: str) -> bool:
    """Return whether every named file of the study is there and unaltered."""
    try:
        for filename in filenames:
            checked_path(profile, filename)
    except MissingArtefactError:
        return False
    return True
