"""Measured rows of a study that survive a crash: keyed by all that they depend on, kept on disk block by block."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from emq_lib.bench.engine import Measurement
from emq_lib.bench.remote import measure_anywhere
from emq_lib.core import networks, quantizers
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.datasets import ImageData
from emq_lib.core.errors import DatasetMismatchError
from emq_lib.core.files import atomic_path, named_when_full, sha256, to_json
from emq_lib.core.graphs import fold_batchnorm, layer_table
from emq_lib.core.models import load_checkpoint
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.profiles import Profile
from emq_lib.core.sources import source_hash
from emq_lib.quantization import adaround
from tqdm.auto import tqdm

from book.studies.study import checked_path, study_folder

PARTIAL = "measured.partial.jsonl"


def load_folded(profile: Profile, device: torch.device | str) -> torch.fx.GraphModule:
    """Return the study's float network with folded batch norm, from the checkpoint in the study's folder."""
    return fold_batchnorm(load_checkpoint(profile, checked_path(profile, "model.safetensors"))).to(device)


def build_network(profile: Profile, data: ImageData) -> tuple[QuantizedNetwork, pd.DataFrame]:
    """Return the study's quantized network and its layer table, from the checkpoint in the study's folder.

    Raises:
        DatasetMismatchError: the images have another number of classes than the network.
        UnsupportedModelError: a layer sees NaN or infinity, or cannot be quantized.
    """
    model = load_folded(profile, data.test.images.device)
    layers = layer_table(model, profile)
    if data.classes != layers["channels"].iloc[-1]:
        raise DatasetMismatchError(
            f"The images have {data.classes} classes, but the checkpoint of {profile.name!r} tells "
            f"{layers['channels'].iloc[-1]} apart. Check the class folders."
        )
    if profile.quantizer == "adaround":
        bank = adaround.build_adaround_bank(model, layers, profile.choices, data.calibration)
    else:
        bank = build_weight_bank(model, layers, profile.choices)
    ranges = quantizers.choose_activation_ranges(model, layers, data.calibration, bits=profile.activation_bits)
    return QuantizedNetwork(model, bank, ranges), layers


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
    finished = PartialRows(study_folder(profile) / PARTIAL)
    measured = dict(known or {}) | finished.read()
    missing = [config for key, config in zip(keys, configs, strict=True) if key not in measured]
    key_of = {tuple(map(int, config)): key for key, config in zip(keys, configs, strict=True)}
    with tqdm(total=len(configs), initial=len(configs) - len(missing), desc=profile.name, unit="config") as progress:
        started = time.perf_counter()
        for block in measure_anywhere(profile, network, split, np.array(missing), scheduler):
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


def row_keys(profile: Profile, data: ImageData, images: int, configs: np.ndarray) -> list[str]:
    """Return one hexadecimal key per configuration: a hash of everything that its row depends on."""
    facts = {
        "checkpoint": sha256(study_folder(profile) / "model.safetensors"),
        "images": (data.digest, images),
        "calibration": hashlib.blake2b(data.calibration.images.cpu().numpy().tobytes(), digest_size=12).hexdigest(),
        "quantized": (profile.quantizer, profile.pinned, profile.tied, profile.activation_bits),
        "code": code_version(profile.quantizer),
    }
    prefix = to_json(facts).encode()
    return [hashlib.blake2b(prefix + bytes(map(int, config)), digest_size=12).hexdigest() for config in configs]


@functools.cache
def code_version(quantizer: str) -> str:
    """Return a hash of the code that decides a row's numbers: folding, ranges, rounding, the arithmetic of a layer.

    Comments and docstrings do not count, nor does the engine around that code: how work is shared and which
    instructions multiply changes no number, which the tests check.
    """
    decisive = [fold_batchnorm, quantizers.choose_qparams, quantizers._affine, quantizers._round_trip]
    decisive += [quantizers.QuantizedWeight, quantizers.quantize, quantizers.choose_activation_ranges]
    decisive += [quantizers.ActivationRange, networks.QuantizedLayer.forward]
    return source_hash(*decisive, *([adaround] if quantizer == "adaround" else []))


class PartialRows:
    """Finished rows of a long measurement on disk: one JSON line per block.

    A line that a crash cut off is dropped on reading, so what is read was written whole.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.seconds = path, 0.0

    def read(self) -> dict[str, dict]:
        """Return key -> row of every block that was written whole, and forget the rest."""
        if not self.path.exists():
            return {}
        *whole, cut = self.path.read_text().split("\n")
        if cut:
            with atomic_path(self.path) as path:
                path.write_text("".join(line + "\n" for line in whole))
        lines = [json.loads(line) for line in whole]
        self.seconds = sum(line["seconds"] for line in lines)
        return dict(itertools.chain.from_iterable(line["rows"].items() for line in lines))

    def append(self, rows: Mapping[str, Mapping], *, seconds: float) -> None:
        """Add one finished block and the wall time it took.

        Raises:
            DiskFullError: there is no room for it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with named_when_full(self.path), self.path.open("a") as file:
            file.write(to_json({"rows": rows, "seconds": seconds}) + "\n")
        self.seconds += seconds
