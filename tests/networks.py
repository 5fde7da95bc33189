"""Networks for tests: random small ones, and all of the registry with batch norms that leave folding work to do.

``@pytest.mark.parametrize("name", REGISTERED)`` takes every model; the large ones of ImageNet count as slow.

In a property test::

    from tests.networks import networks, pictures

    @given(model=networks())
    def test_something(model): ...

`model` is in evaluation mode and takes ``pictures(count)``: float32 of shape (count, 3, 10, 10). It may write to them.
"""

from __future__ import annotations

import functools
import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from emq_lib.core import bank, graphs, models, quantizers
from emq_lib.core.datasets import Inputs
from emq_lib.core.networks import QuantizedNetwork

REGISTERED = [
    pytest.param(name, marks=pytest.mark.slow) if name.startswith("imagenet") else name for name in models.MODELS
]
WIDTH = 8
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "hardswish in place": lambda: nn.Hardswish(inplace=True),
    "function in place": lambda: _Function(lambda x: F.relu(x, inplace=True)),
    "method in place": lambda: _Function(lambda x: x.clamp_(min=-1)),
    "gelu": nn.GELU,
}
BLOCKS = ("plain", "strided", "grouped", "depthwise", "residual", "preactivated", "concatenation", "excitation")
BLOCKS += ("broadcast", "attention", "reflected", "circular", "same", "same even")
PADDING = {
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "same": {"padding": "same", "dilation": 2},
    "same even": {"kernel_size": (3, 4), "padding": "same", "dilation": (1, 2)},
}


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Block(nn.Module):
    """One block of a random network: maps (N, 8, H, W) to (N, 8, H', W')."""

    def __init__(self, kind: str, activation: str) -> None:
        super().__init__()
        self.kind, self.activation = kind, ACTIVATIONS[activation]()
        groups = {"grouped": 4, "depthwise": WIDTH}.get(kind, 1)
        how = {"kernel_size": 3, "stride": 2 if kind == "strided" else 1, "padding": 1} | PADDING.get(kind, {})
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, groups=groups, bias=False, **how)
        self.norm1 = nn.BatchNorm2d(WIDTH)
        if kind in ("residual", "depthwise", "preactivated"):
            self.conv2, self.norm2 = nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)
        if kind == "concatenation":
            self.conv2, self.norm2 = nn.Conv2d(2 * WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)
        if kind == "excitation":
            self.fc1, self.fc2 = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        if kind == "broadcast":
            self.conv2 = nn.Conv2d(WIDTH, WIDTH, 1)
        if kind == "attention":
            self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        if self.kind == "preactivated":  # an activation in place changes the shortcut too
            return x + self.conv2(self.activation(self.norm1(self.conv1(self.activation(x)))))
        y = self.activation(self.norm1(self.conv1(x)))
        if self.kind == "depthwise":
            y = self.activation(self.norm2(self.conv2(y)))
        elif self.kind == "residual":
            y = self.norm2(self.conv2(y))
            y += x
            y = self.activation(y)
        elif self.kind == "concatenation":
            y = self.norm2(self.conv2(torch.cat([x, y], dim=1)))
        elif self.kind == "excitation":
            y = y * torch.sigmoid(self.fc2(self.activation(self.fc1(y.mean((2, 3))))))[:, :, None, None]
        elif self.kind == "broadcast":
            y = self.conv2(y.mean((2, 3), keepdim=True)) + y
        elif self.kind == "attention":
            q, k, v = self.qkv(y.flatten(2).transpose(1, 2)).chunk(3, dim=2)
            mixed = self.projection(torch.softmax(q @ k.transpose(1, 2), dim=2) @ v)
            y = y + mixed.transpose(1, 2).unflatten(2, y.shape[2:])
        return y


class RandomNetwork(nn.Module):
    """A stem, blocks and a classifier of 5 classes, for images of shape (3, 10, 10)."""

    def __init__(self, blocks: list[tuple[str, str]], seed: int, normalizes_in_place: bool) -> None:
        super().__init__()
        self.description = f"RandomNetwork({blocks}, {seed}, {normalizes_in_place})"
        self.normalizes_in_place = normalizes_in_place
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
            self.blocks = nn.Sequential(*(Block(*block) for block in blocks))
            self.fc = nn.Linear(WIDTH, 5)
        spread_batchnorms(self, seed)
        self.eval()

    def __repr__(self):
        return self.description

    def forward(self, x):
        if self.normalizes_in_place:
            x = x.sub_(0.25).div_(0.5)
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def networks(kinds: tuple[str, ...] = BLOCKS, activations: tuple[str, ...] = tuple(ACTIVATIONS)) -> st.SearchStrategy:
    """Return a strategy that draws a :class:`RandomNetwork` of one to four blocks."""
    block = st.tuples(st.sampled_from(kinds), st.sampled_from(activations))
    return st.builds(RandomNetwork, st.lists(block, min_size=1, max_size=4), st.integers(0, 10_000), st.booleans())


def pictures(count: int, seed: int = 0, shape: tuple[int, ...] = (3, 10, 10)) -> torch.Tensor:
    """Return random float32 inputs."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def spread_batchnorms(model: nn.Module, seed: int = 5) -> nn.Module:
    """Give batch norms running statistics, scales and shifts that folding can get wrong; return the network."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            low_of = {"running_var": 0.5, "weight": 0.5, "running_mean": -0.3, "bias": -0.3}
            for name, low in low_of.items():
                tensor = getattr(module, name).data
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model


def registered(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network of the registry, its batch norms spread, in evaluation mode, and two inputs for it."""
    model = spread_batchnorms(models.build_model(name, seed=1)).eval()
    shape = {"resnet8": (1, 16, 16)}.get(name, (3, 64, 64) if name.startswith("imagenet") else (3, 32, 32))
    return model, pictures(2, shape=shape).contiguous(memory_format=torch.channels_last)


def quantized(model: nn.Module, inputs: torch.Tensor, choices: tuple[int, ...] = (2, 3, 4)) -> QuantizedNetwork:
    """Return the quantized network of a float one, every layer searchable, its ranges from these inputs.

    The range of a weight is the best of two, which takes less time than the library's search.
    """
    folded = graphs.fold_batchnorm(model)
    layers = graphs.describe_layers(folded, inputs[:1], pinned={}, tied={})
    ranges = quantizers.choose_activation_ranges(folded, layers, Inputs(inputs), bits=8)
    quick = functools.partial(quantizers.choose_qparams, shrinks=2)
    with unittest.mock.patch.object(quantizers, "choose_qparams", quick):
        return QuantizedNetwork(folded, bank.build_weight_bank(folded, layers, choices), ranges)
