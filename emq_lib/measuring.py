"""Measuring configurations on real images: shared computation, rows that survive a crash, several machines.

Explained in chapter 01.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from emq_lib import quantizers, reconstruction
from emq_lib.artefacts import atomic_path, checked_path, named_when_full, sha256, source_hash, study_folder, to_json
from emq_lib.costs import choice_indices
from emq_lib.datasets import ImageData, Split
from emq_lib.errors import DatasetMismatchError
from emq_lib.models import build_model, fold_batchnorm, layer_table, load_checkpoint, segments
from emq_lib.profiles import Profile
from emq_lib.quantizers import QuantizedNetwork

BLOCK = 32
BATCH = {"cpu": 25, "cuda": 2_500}  # images per forward pass at most
MEMORY = {"cpu": 20 * 2**20, "cuda": 2**30}  # bytes of a layer's largest output at most; a CPU keeps 20 MiB close
PARTIAL = "measured.partial.jsonl"


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


def measure(
    network: QuantizedNetwork, split: Split, configs: np.ndarray, *, batch_size: int | None = None
) -> Iterator[list[Measurement]]:
    """Measure configurations on every image of a split, block by block, in lexicographic order.

    Within a block, neighbours that agree on the first layers share the computation up to the first piece of the network
    in which they differ; the result is the plain forward pass's.

    Args:
        network: the quantized network; its selected configuration changes.
        split: images and labels.
        configs: bits, shape (N, S).
        batch_size: images per forward pass; by default 25, on a GPU 2,500, fewer where a layer's output would take more
            than 20 MiB, on a GPU 1 GiB.

    Yields:
        the measurements of up to 32 configurations.

    Raises:
        ConfigLengthError, InvalidBitsError: see :func:`emq_lib.costs.choice_indices`.
    """
    engine = _engine(network, split, batch_size)
    for block in _blocks(network, configs):
        yield engine.measure(split, block)


def _blocks(network: QuantizedNetwork, configs: np.ndarray) -> list[list[tuple[int, ...]]]:
    """Cut configurations in lexicographic order into blocks."""
    choice_indices(configs, network.bank.choices, network.bank.slot_count)
    ordered = sorted(tuple(map(int, config)) for config in configs)
    return [ordered[start : start + BLOCK] for start in range(0, len(ordered), BLOCK)]


class _Engine:
    """Runs configurations one after another on a batch of images and keeps the outputs that the next one shares."""

    def __init__(self, network: QuantizedNetwork, batch_size: int) -> None:
        self.network, self.batch_size = network, batch_size
        slot_of = dict(zip(network.bank.searchable, network.bank.slots, strict=True))
        self._depth = _depth([names for _, names in network.pieces], slot_of)
        self._outputs: list[torch.Tensor] = []  # the batch, then the output of every piece

    @torch.inference_mode()
    def measure(self, split: Split, block: Sequence[tuple[int, ...]]) -> list[Measurement]:
        """Measure a block of configurations. Nothing waits for a GPU until all of them are under way."""
        device = split.images.device
        correct = torch.empty(len(block), len(split), dtype=torch.bool, device=device)
        losses = torch.zeros(len(block), dtype=torch.float64, device=device)
        for first in range(0, len(split), self.batch_size):
            batch = split[first : first + self.batch_size]
            self._take(batch.inputs())
            for row, config in enumerate(block):
                shared = _shared_pieces(block[row - 1], config, self._depth) if row else 0
                logits = self._run(config, shared)[: len(batch)].float()
                correct[row, first : first + len(batch)] = logits.argmax(dim=1) == batch.labels
                losses[row] += F.cross_entropy(logits.double(), batch.labels, reduction="sum")
        results = zip(block, correct.cpu().numpy(), losses.tolist(), strict=True)
        return [Measurement(config, hits, loss / len(split)) for config, hits, loss in results]

    def _take(self, inputs: torch.Tensor) -> None:
        """Begin with a batch of at most ``batch_size`` images."""
        self._outputs = [inputs]

    def _run(self, config: Sequence[int], shared: int) -> torch.Tensor:
        """Return the logits of the batch, in its first rows; the outputs of the first `shared` pieces still hold."""
        del self._outputs[shared + 1 :]
        self.network.select(config)
        for piece, _ in self.network.pieces[shared:]:
            self._outputs.append(piece(self._outputs[-1]))
        return self._outputs[-1]


class _CapturedEngine(_Engine):
    """The same on a GPU: a piece at each of its bits is recorded once and replayed, its kernels launched together.

    A recording reads and writes fixed memory. So each piece has its output's, for whole batches.
    """

    def __init__(self, network: QuantizedNetwork, batch_size: int) -> None:
        super().__init__(network, batch_size)
        self._recorded: dict[tuple[int, tuple[int, ...]], torch.cuda.CUDAGraph] = {}

    def _take(self, inputs: torch.Tensor) -> None:
        if not self._outputs:
            whole = inputs.new_zeros(self.batch_size, *inputs.shape[1:])
            self._outputs = [whole.contiguous(memory_format=torch.channels_last)]
            for piece, _ in self.network.pieces:
                self._outputs.append(piece(self._outputs[-1]).clone())
        self._outputs[0][: len(inputs)].copy_(inputs)

    def _run(self, config: Sequence[int], shared: int) -> torch.Tensor:
        self.network.select(config)
        for number, (_, names) in enumerate(self.network.pieces[shared:], start=shared):
            key = number, tuple(self.network.layers[name].bits for name in names)
            if key not in self._recorded:
                another = next(iter(self._recorded.values()), None)
                self._recorded[key] = _record(functools.partial(self._step, number), another)
            self._recorded[key].replay()
        return self._outputs[-1]

    def _step(self, number: int) -> None:
        """Compute one piece at the selected bits."""
        piece, _ = self.network.pieces[number]
        self._outputs[number + 1].copy_(piece(self._outputs[number]))


def _record(step: Callable[[], None], another: torch.cuda.CUDAGraph | None) -> torch.cuda.CUDAGraph:
    """Run a step on the GPU, so that libraries choose their kernels, and record it.

    What it holds only while it runs shares the memory of another recording: one is replayed at a time.
    """
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=another and another.pool()):
        step()
    return graph


def _engine(network: QuantizedNetwork, split: Split, batch_size: int | None = None) -> _Engine:
    """Return the engine for the images' device."""
    kind = _CapturedEngine if split.images.device.type == "cuda" else _Engine
    return kind(network, batch_size or _batch_size(network, split))


@torch.inference_mode()
def _batch_size(network: QuantizedNetwork, split: Split) -> int:
    """Return how many images go through the network at once; one image tells how much memory its layers take."""
    sizes = []
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output: sizes.append(output.nbytes))
        for layer in network.layers.values()
    ]
    network(split[:1].inputs())
    for handle in handles:
        handle.remove()
    device = split.images.device.type
    return max(1, min(BATCH[device], MEMORY[device] // max(sizes)))


def planned_macs(model: torch.fx.GraphModule, layers: pd.DataFrame, configs: np.ndarray) -> int:
    """Return the multiply-accumulates for one image that measuring configurations takes, shared ones counted once.

    Args:
        model: network with folded batch norm.
        layers: its layer table.
        configs: bits, shape (N, S).
    """
    names = [names for _, names in segments(model, list(layers["name"]))]
    macs = layers.set_index("name")["macs"]
    rest = np.cumsum([macs[list(held)].sum() for held in names][::-1])[::-1]  # of a piece and all after it
    depth = _depth(names, layers[layers["searchable"]].set_index("name")["slot"].to_dict())
    ordered = sorted(tuple(map(int, config)) for config in configs)
    starts = [
        _shared_pieces(ordered[row - 1], config, depth) if row % BLOCK else 0 for row, config in enumerate(ordered)
    ]
    return int(rest[starts].sum())


def _depth(pieces: Sequence[Sequence[str]], slot_of: Mapping[str, int]) -> np.ndarray:
    """Return how many bits of a configuration the output of each piece depends on, pieces given by their layers."""
    deepest = [max((slot_of[name] for name in names if name in slot_of), default=-1) + 1 for names in pieces]
    return np.maximum.accumulate(deepest)


def _shared_pieces(previous: tuple[int, ...], config: tuple[int, ...], depth: np.ndarray) -> int:
    """Return how many leading pieces give the same output under both configurations."""
    pairs = zip(previous, config, strict=True)
    differs = next((slot for slot, (before, now) in enumerate(pairs) if before != now), len(config))
    return int(np.searchsorted(depth, differs, side="right"))


def load_folded(profile: Profile, device: torch.device | str) -> torch.fx.GraphModule:
    """Return the study's float network with folded batch norm, from the checkpoint in the study's folder."""
    return fold_batchnorm(load_checkpoint(profile, checked_path(profile, "model.safetensors"))).to(device)


def load_network(profile: Profile, data: ImageData) -> tuple[QuantizedNetwork, pd.DataFrame]:
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
        bank = reconstruction.build_adaround_bank(model, layers, profile.choices, data.calibration)
    else:
        bank = quantizers.build_weight_bank(model, layers, profile.choices)
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


def measure_anywhere(
    profile: Profile, network: QuantizedNetwork, split: Split, configs: np.ndarray, scheduler: str | None
) -> Iterator[list[Measurement]]:
    """Yield measured blocks from this process, or from the workers of a scheduler as they finish.

    Args:
        profile: the study; its checkpoint goes to the workers.
        network: its quantized network.
        split: images and labels.
        configs: bits, shape (N, S).
        scheduler: address of a ``dask.distributed`` scheduler, or None.
    """
    if not len(configs):
        return
    if scheduler is None:
        yield from measure(network, split, configs)
        return
    from distributed import Client, as_completed

    state = load_checkpoint(profile, checked_path(profile, "model.safetensors")).state_dict()
    with Client(scheduler) as client:
        parts = (profile, state, network.bank, network.activation_ranges, split)
        shared = client.scatter(parts, broadcast=True, hash=False)
        blocks = _blocks(network, configs)
        futures = [client.submit(_measure_remotely, shared, block, pure=False, retries=3) for block in blocks]
        for _, block in as_completed(futures, with_results=True):
            yield block


_ON_WORKER: dict[str, object] = {}  # the parts that this worker received last, and the network built from them
_ONE_AT_A_TIME = threading.Lock()  # a network has one selected configuration


def _measure_remotely(parts: tuple, block: Sequence[tuple[int, ...]]) -> list[Measurement]:
    """Measure one block on a worker, which builds the network from its parts once."""
    profile, state, bank, activation_ranges, split = parts
    with _ONE_AT_A_TIME:
        if _ON_WORKER.get("parts") is not parts:
            model = build_model(profile)
            model.load_state_dict(state)
            folded = fold_batchnorm(model).to(split.images.device)
            _ON_WORKER.update(parts=parts, engine=_engine(QuantizedNetwork(folded, bank, activation_ranges), split))
        return _ON_WORKER["engine"].measure(split, block)


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
    decisive += [quantizers.ActivationRange, quantizers.QuantizedLayer.forward]
    return source_hash(*decisive, *([reconstruction] if quantizer == "adaround" else []))


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
