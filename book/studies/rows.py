"""Measured rows of a study that survive a crash: keyed by all that they depend on, kept on disk block by block."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import pathlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from book.studies.files import DECIDES_ROWS, MODEL, NEUTRAL
from book.studies.networks import load_folded
from book.studies.study import checked_path, study_folder
from emq_lib.bench.engine import Measurement
from emq_lib.bench.remote import measure_anywhere
from emq_lib.bench.table import MEASURED, counts_agree
from emq_lib.core.datasets import ImageData
from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.files import sha256, to_json
from emq_lib.core.journal import Journal
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.profiles import Profile
from emq_lib.core.sources import code_hash
from emq_lib.core.training import tensors_digest

PARTIAL = "measured.partial.jsonl"


def measure_resumably(
    profile: Profile,
    network: QuantizedNetwork,
    data: ImageData,
    configs: np.ndarray,
    *,
    images: int | None = None,
    known: Mapping[str, Mapping] | None = None,
    scheduler: str | None = None,
) -> tuple[pd.DataFrame, float]:
    """Measure configurations on test images, keeping every finished block on disk.

    A row is keyed by a hash of all that it depends on: the checkpoint, the images, how the network is quantized, the
    configuration, and the code that measures. Interrupted at any moment, the same call skips what was measured and
    returns the same rows. The caller removes the file of finished blocks, ``measured.partial.jsonl``.

    Args:
        profile: the study; its checkpoint must exist.
        network: its quantized network.
        data: its images.
        configs: bits, shape (N, S), all distinct.
        images: how many test images, the first ones in canonical order; all by default.
        known: key -> row, measured earlier.
        scheduler: address of a ``dask.distributed`` scheduler whose workers measure; by default this process does.

    Returns:
        columns key, top1, loss, correct_a, correct_b, n_a and n_b, one row per configuration in the order given; and
        the wall time in seconds, earlier runs included.

    Raises:
        DiskFullError: no room for the finished rows; those written before are kept.
    """
    split = data.test[: images or len(data.test)]
    keys = row_keys(profile, data, len(split), configs)
    finished = PartialRows(study_folder(profile) / PARTIAL, MEASURED)
    measured = dict(known or {}) | finished.read()
    missing = [config for key, config in zip(keys, configs, strict=True) if key not in measured]
    key_of = {tuple(map(int, config)): key for key, config in zip(keys, configs, strict=True)}
    model = load_folded(profile, split.images.device) if scheduler else None
    with tqdm(total=len(configs), initial=len(configs) - len(missing), desc=profile.name, unit="config") as progress:
        started = time.perf_counter()
        for block in measure_anywhere(network, split, np.array(missing), model=model, scheduler=scheduler):
            rows = {key_of[item.config]: row_of(item) for item in block}
            finished.append(rows, seconds=time.perf_counter() - started)
            measured |= rows
            started = time.perf_counter()
            progress.update(len(block))
    return pd.DataFrame([{"key": key} | dict(measured[key]) for key in keys]), finished.seconds


def row_of(item: Measurement) -> dict[str, float | int]:
    """Return what the bench keeps of a measurement; the first half of the images is half A."""
    half = len(item.correct) // 2
    return {
        "top1": item.top1,
        "loss": item.loss,
        "correct_a": int(item.correct[:half].sum()),
        "correct_b": int(item.correct[half:].sum()),
        "n_a": half,
        "n_b": len(item.correct) - half,
    }


def check_measured(table: pd.DataFrame, filename: str) -> pd.DataFrame:
    """Return a table of measured configurations, bits as text, after checking bits and, where it has them, counts.

    Raises:
        CorruptArtefactError: bits that are none, or of another network; counts that cannot be.
    """
    widths = table["bits"].str.fullmatch("[1-8]+") & (table["bits"].str.len() == len(table["bits"].iloc[0]))
    if not widths.all() or ("n_a" in table and not counts_agree(table)):
        raise CorruptArtefactError(f"{filename} holds bits or counts that cannot be. Restore it, or make it again.")
    return table


def row_keys(profile: Profile, data: ImageData, images: int, configs: np.ndarray, *, also: object = None) -> list[str]:
    """Return one hexadecimal key per configuration: a hash of everything that its row depends on.

    Args:
        profile: the study; its checkpoint must exist.
        data: its images.
        images: how many test images, the first ones.
        configs: bits, shape (N, S).
        also: what else the rows depend on, as numbers, texts and lists of them.

    Raises:
        MissingArtefactError, CorruptArtefactError, StaleArtefactError: of the checkpoint, see
            :func:`book.studies.study.checked_path`.
    """
    test, calibration = data.test[:images], data.calibration
    facts = {
        "checkpoint": sha256(checked_path(profile, MODEL)),
        "model": profile.model,
        "images": tensors_digest(test.images, test.labels, test.mean, test.std),
        "calibration": tensors_digest(calibration.images, calibration.mean, calibration.std),
        "quantized": (profile.quantizer, profile.pinned, profile.tied, profile.activation_bits),
        "code": rows_version(profile.quantizer),
        "also": also,
    }
    prefix = to_json(facts).encode()
    return [hashlib.blake2b(prefix + bytes(map(int, config)), digest_size=12).hexdigest() for config in configs]


@functools.cache
def rows_version(quantizer: str) -> str:
    """Return a hash of the code that decides a row's numbers: folding, ranges, rounding, the arithmetic of a layer."""
    learned = ["emq_lib.quantization.adaround:build_adaround_bank"] if quantizer == "adaround" else []
    return code_hash(*DECIDES_ROWS, *learned, neutral=NEUTRAL)


class PartialRows:
    """Finished rows of a long measurement on disk: a journal with one line per block.

    Args:
        path: the file, which may exist.
        numbers: what every row holds, each a finite number.

    Raises:
        CorruptArtefactError: the file belongs to something else, or holds a line that no run wrote.
    """

    def __init__(self, path: pathlib.Path, numbers: Sequence[str] = ("top1", "loss")) -> None:
        self._journal = Journal(path, {"rows of": path.name})
        for number, line in enumerate(self._journal.lines, start=2):
            rows, seconds = line.get("rows"), line.get("seconds")
            known = isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
            found = [row.get(name) for row in rows.values() for name in numbers] if known else []
            if not known or not all(map(_is_finite, [seconds, *found])) or seconds < 0:
                raise CorruptArtefactError(
                    f"{path}, line {number}, was written by no run. Delete the file to start afresh."
                )

    @property
    def seconds(self) -> float:
        """Wall time of all finished blocks."""
        return float(sum(line["seconds"] for line in self._journal.lines))

    def read(self) -> dict[str, dict]:
        """Return key -> row of every finished block."""
        return dict(itertools.chain.from_iterable(line["rows"].items() for line in self._journal.lines))

    def append(self, rows: Mapping[str, Mapping], *, seconds: float) -> None:
        """Add one finished block and the wall time it took.

        Raises:
            DiskFullError: there is no room for it.
        """
        self._journal.append({"rows": rows, "seconds": seconds})


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
