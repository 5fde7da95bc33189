"""Measuring configurations on real images with shared computation.

Explained in chapter 01.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from emq_lib.core.checks import WIDEST, whole_number
from emq_lib.core.configs import bits_text
from emq_lib.core.costs import choice_indices
from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import segments
from emq_lib.core.networks import QuantizedNetwork

BLOCK = 32
BATCH = {"cpu": 25, "cuda": 2_500}  # images per forward pass at most
MEMORY = {"cpu": 20 * 2**20, "cuda": 2**30}  # bytes of a layer's largest output at most; a CPU keeps 20 MiB close


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
        configs: bits, shape (N, S), all different.
        batch_size: images per forward pass; by default 25, on a GPU 2,500, fewer where a layer's output would take more
            than 20 MiB, on a GPU 1 GiB.

    Returns:
        an iterator over the measurements of up to 32 configurations each.

    Raises:
        InvalidParameterError: a batch size below 1; no configurations, or one of them twice; no images, or such as the
            network does not take; labels outside its classes.
        ConfigLengthError, InvalidBitsError: see :func:`emq_lib.core.costs.choice_indices`.
        UnsupportedModelError: a configuration gives logits that are NaN or infinite; raised while iterating.
    """
    blocks = _blocks(network, configs)
    engine = _engine(network, split, batch_size)
    return (engine.measure(split, block) for block in blocks)


def _blocks(network: QuantizedNetwork, configs: np.ndarray) -> list[list[tuple[int, ...]]]:
    """Cut configurations in lexicographic order into blocks."""
    ordered = _ordered(configs, network.bank.choices, network.bank.slot_count)
    return [ordered[start : start + BLOCK] for start in range(0, len(ordered), BLOCK)]


def _ordered(configs: np.ndarray, choices: Sequence[int], slots: int) -> list[tuple[int, ...]]:
    """Return configurations in lexicographic order, after checking that they are some and all different."""
    choice_indices(configs, choices, slots)
    ordered = sorted(tuple(map(int, config)) for config in np.atleast_2d(configs))
    if not ordered:
        raise InvalidParameterError("there are no configurations to measure.")
    for before, config in itertools.pairwise(ordered):
        if before == config:
            raise InvalidParameterError(f"configuration {bits_text(config)} stands twice among those to measure.")
    return ordered


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
        device, shape = split.images.device, (len(block), len(split))
        correct = torch.empty(shape, dtype=torch.bool, device=device)
        losses = torch.empty(shape, dtype=torch.float64, device=device)
        for first in range(0, len(split), self.batch_size):
            batch = split[first : first + self.batch_size]
            images = slice(first, first + len(batch))
            self._take(batch.inputs())
            for row, config in enumerate(block):
                shared = _shared_pieces(block[row - 1], config, self._depth) if row else 0
                logits = self._run(config, shared)[: len(batch)]
                correct[row, images], losses[row, images] = judged(logits, batch.labels)
        means = losses.cpu().numpy().mean(axis=1)  # of all images at once: whatever the size of a batch
        if odd := [bits_text(config) for config, loss in zip(block, means, strict=True) if not np.isfinite(loss)]:
            raise UnsupportedModelError(f"the network's logits are NaN or infinite under the configurations {odd}.")
        results = zip(block, correct.cpu().numpy(), means.tolist(), strict=True)
        return [Measurement(config, hits, loss) for config, hits, loss in results]

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


def judged(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each image is classified correctly, and its cross-entropy in float64, both of shape (N,).

    Args:
        logits: of the images, shape (N, classes).
        labels: int64, shape (N,).
    """
    return logits.argmax(dim=1) == labels, F.cross_entropy(logits.double(), labels, reduction="none")


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
    """Return the engine for the images' device, after checking the images."""
    kind = _CapturedEngine if split.images.device.type == "cuda" else _Engine
    largest = check_images(network, split)
    if batch_size is None:  # as many as leave a layer's output in fast memory
        device = "cuda" if kind is _CapturedEngine else "cpu"
        batch_size = max(1, min(BATCH[device], MEMORY[device] // largest))
    return kind(network, whole_number(batch_size, "batch_size", 1))


@torch.inference_mode()
def check_images(network: QuantizedNetwork, split: Split) -> int:
    """Check that a network can be measured on images, one of which it sees.

    Args:
        network: the quantized network.
        split: images and labels.

    Returns:
        bytes of a layer's largest output for one image.

    Raises:
        InvalidParameterError: no images, or such as the network does not take; labels outside its classes.
    """
    if not len(split):
        raise InvalidParameterError("there are no images to measure on.")
    sizes = []
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output: sizes.append(output.nbytes))
        for layer in network.layers.values()
    ]
    try:
        logits = network(split[:1].inputs())
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        shape = tuple(split.images.shape[1:])
        raise InvalidParameterError(f"the network does not take images of shape {shape}: {str(error):.200}") from error
    finally:
        for handle in handles:
            handle.remove()
    low, high = int(split.labels.min()), int(split.labels.max())
    if logits.ndim != 2 or low < 0 or high >= logits.shape[1]:
        raise InvalidParameterError(
            f"labels must be classes of the network, whose output for one image has shape {tuple(logits.shape)}; they "
            f"lie in {low} to {high}."
        )
    return max(sizes)


def planned_macs(model: torch.fx.GraphModule, layers: pd.DataFrame, configs: np.ndarray) -> int:
    """Return the multiply-accumulates for one image that measuring configurations takes, shared ones counted once.

    Args:
        model: network with folded batch norm.
        layers: its layer table.
        configs: bits, shape (N, S), all different.

    Raises:
        InvalidParameterError, ConfigLengthError, InvalidBitsError: see :func:`measure`.
    """
    names = [names for _, names in segments(model, list(layers["name"]))]
    macs = layers.set_index("name")["macs"]
    rest = np.cumsum([macs[list(held)].sum() for held in names][::-1])[::-1]  # of a piece and all after it
    slot_of = layers[layers["searchable"]].set_index("name")["slot"].to_dict()
    depth = _depth(names, slot_of)
    ordered = _ordered(configs, range(1, WIDEST + 1), max(slot_of.values()) + 1)
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
