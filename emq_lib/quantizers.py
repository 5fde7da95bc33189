"""Uniform affine quantization: range search, rounding to nearest, the weight bank, and a network that selects from it.

Explained in chapter 01.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.costs import choice_indices
from emq_lib.datasets import Split
from emq_lib.errors import InvalidBitsError, UnsupportedModelError
from emq_lib.models import pre_hooks, predict, segments

SHRINKS = 80


def choose_qparams(weight: torch.Tensor, bits: int, *, shrinks: int = SHRINKS) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a scale and a zero point per output channel by searching the range that rounds with the least error.

    The range [low, high] of a channel (widened to contain zero) is shrunk in steps of one percent; the step with the
    smallest squared error stays. This is the grid search of BRECQ (Li et al. 2021) with the exponent 2.

    Args:
        weight: float tensor of shape (C_out, ...).
        bits: bit width, 1 to 8.
        shrinks: how many ranges are tried, from 100 % downwards.

    Returns:
        scale: float32, shape (C_out,); zero point: uint8, shape (C_out,).

    Raises:
        InvalidBitsError: a width outside 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise InvalidBitsError(f"bits must lie in 1 to 8, got {bits}.")
    flat = weight.detach().flatten(1).float()
    low, high = flat.amin(dim=1).clamp(max=0), flat.amax(dim=1).clamp(min=0)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for step in range(shrinks):
        scale, zero = _affine(low * (1 - step / 100), high * (1 - step / 100), bits)
        error = (_round_trip(flat, scale, zero, bits) - flat).square().sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero.to(torch.uint8)


def _affine(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and the (rounded) zero point that spread 2^bits levels over [low, high]."""
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).eps)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _round_trip(flat: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    codes = (flat / scale[:, None]).round_().add_(zero[:, None]).clamp_(0, 2**bits - 1)
    return codes.sub_(zero[:, None]).mul_(scale[:, None])


@dataclass(frozen=True)
class QuantizedWeight:
    """One layer's weight at one bit width.

    Attributes:
        codes: uint8, shape (C_out, ...), values 0 to 2^bits - 1.
        scale: float32, shape (C_out,).
        zero_point: uint8, shape (C_out,).
        bits: bit width.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int

    def integers(self) -> torch.Tensor:
        """Return codes - zero point per output channel, int16, shape (C_out, ...)."""
        return self.codes.short() - self.zero_point.short().view(self._channel)

    def dequantize(self) -> torch.Tensor:
        """Return scale * (codes - zero point) per output channel, float32, shape (C_out, ...)."""
        return self.integers().float() * self.scale.view(self._channel)

    @property
    def _channel(self) -> tuple[int, ...]:
        return (-1,) + (1,) * (self.codes.ndim - 1)


def quantize(weight: torch.Tensor, bits: int) -> QuantizedWeight:
    """Round a weight to nearest at `bits` bits per weight, with the range of :func:`choose_qparams`.

    >>> quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), bits=2).dequantize()
    tensor([[0., 1., 2., 3.]])
    """
    scale, zero_point = choose_qparams(weight, bits)
    channel = (-1,) + (1,) * (weight.ndim - 1)
    codes = (weight.detach() / scale.view(channel)).round() + zero_point.view(channel)
    return QuantizedWeight(codes.clamp(0, 2**bits - 1).to(torch.uint8), scale, zero_point, bits)


def fake_quantize(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the weight after quantizing and dequantizing it."""
    return quantize(weight, bits).dequantize()


@dataclass(frozen=True)
class WeightBank:
    """Every searchable layer at every choice, and the pinned layers at their width: computed once, then selected from.

    Attributes:
        choices: the B allowed widths.
        searchable: names of the searchable layers in forward order.
        slots: the slot, 0 to S - 1, that each of them takes its bits from; tied layers share one.
        pinned: (name, bits) of the layers outside the search.
        weights: (layer name, bits) -> quantized weight.
    """

    choices: tuple[int, ...]
    searchable: tuple[str, ...]
    slots: tuple[int, ...]
    pinned: tuple[tuple[str, int], ...]
    weights: Mapping[tuple[str, int], QuantizedWeight]

    @classmethod
    def of(cls, weights: Mapping[str, QuantizedWeight]) -> WeightBank:
        """Return the bank that holds one configuration only: each layer at the bits that its weight has.

        Args:
            weights: layer name -> quantized weight, in forward order.
        """
        choices = tuple(sorted({weight.bits for weight in weights.values()}))
        entries = {(name, weight.bits): weight for name, weight in weights.items()}
        return cls(choices, tuple(weights), tuple(range(len(weights))), (), entries)

    @property
    def slot_count(self) -> int:
        """S, the length of a configuration."""
        return max(self.slots) + 1

    def widths(self, config: Sequence[int]) -> dict[str, int]:
        """Return layer name -> bits for one configuration, pinned layers included.

        Raises:
            ConfigLengthError: the configuration does not have S entries.
            InvalidBitsError: a width is not among the choices.
        """
        choice_indices(config, self.choices, self.slot_count)
        return {name: int(config[slot]) for name, slot in zip(self.searchable, self.slots, strict=True)} | dict(
            self.pinned
        )

    def select(self, config: Sequence[int]) -> dict[str, QuantizedWeight]:
        """Return layer name -> quantized weight for one configuration, pinned layers included.

        Raises:
            ConfigLengthError, InvalidBitsError: see :meth:`widths`.
        """
        return {name: self.weights[name, bits] for name, bits in self.widths(config).items()}


def build_weight_bank(model: nn.Module, layers: pd.DataFrame, choices: Sequence[int]) -> WeightBank:
    """Quantize each layer of a folded network at each width it may take.

    Args:
        model: network with folded batch norm.
        layers: its layer table.
        choices: the B allowed widths.
    """
    modules = dict(model.named_modules())
    free = layers[layers["searchable"]]
    searchable, slots = tuple(free["name"]), tuple(map(int, free["slot"]))
    pinned = tuple((layer.name, int(layer.pinned_bits)) for layer in layers[~layers["searchable"]].itertuples())
    wanted = [*((name, bits) for name in searchable for bits in choices), *pinned]
    weights = {(name, bits): quantize(modules[name].weight, bits) for name, bits in wanted}
    return WeightBank(tuple(choices), searchable, slots, pinned, weights)


@dataclass(frozen=True)
class ActivationRange:
    """Affine quantization of one layer's input: one scale and one zero point for the whole tensor."""

    scale: float
    zero_point: int
    bits: int

    def integers(self, x: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
        """Return codes - zero point of `x`: whole numbers as float32, in the shape of `x` (or in its memory)."""
        scaled = x.mul_(1 / self.scale) if in_place else x.mul(1 / self.scale)
        return scaled.round_().clamp_(-self.zero_point, 2**self.bits - 1 - self.zero_point)

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` after quantizing and dequantizing it.

        The same numbers as ``torch.fake_quantize_per_tensor_affine``, which also builds a mask for the backward pass
        and takes about ten times as long on a CPU.
        """
        return self.integers(x).mul_(self.scale)


@torch.inference_mode()
def choose_activation_ranges(
    model: nn.Module, layers: pd.DataFrame, calibration: Split, *, bits: int, batch_size: int = 256
) -> dict[str, ActivationRange]:
    """Choose each layer's input range: the smallest and the largest value seen on the calibration images.

    Returns:
        layer name -> range.

    Raises:
        UnsupportedModelError: a layer sees a NaN or an infinity; the message names it.
    """
    lows, highs = {}, {}

    def watch(name: str):
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = torch.aminmax(inputs[0])
            lows[name] = min(low.item(), lows.get(name, 0.0))
            highs[name] = max(high.item(), highs.get(name, 0.0))
            if not np.isfinite(low.item() + high.item()):
                raise UnsupportedModelError(f"Layer {name!r} sees NaN or infinity on the calibration images.")

        return hook

    with pre_hooks(model, {name: watch(name) for name in layers["name"]}):
        predict(model, calibration, batch_size=batch_size)
    ranges = {}
    for name in layers["name"]:
        scale, zero = _affine(torch.tensor(lows[name]), torch.tensor(highs[name]), bits)
        ranges[name] = ActivationRange(scale.item(), int(zero.item()), bits)
    return ranges


class QuantizedLayer(nn.Module):
    """A convolution or a linear layer that multiplies integers: codes of its input and codes of its weight.

    Whole numbers below 2^24 add up in float32 without an error, in whatever order. So the sums, and with them the
    output, are the same to the last bit for every batch size, number of threads and processor. On processors with
    8-bit instructions convolutions use them.

    Args:
        layer: the float layer.
        weights: bits -> its quantized weight.
        activation_range: range of its input.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, weights: Mapping[int, QuantizedWeight], activation_range: ActivationRange
    ) -> None:
        super().__init__()
        self.activation_range, self._weights = activation_range, weights
        self._float = (layer,)  # in a tuple, so that it does not count as a part of this module
        self._channel = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        bias = torch.zeros(layer.weight.shape[0], device=layer.weight.device) if layer.bias is None else layer.bias
        self.bias = bias.detach().view(self._channel)
        self._products = {bits: _product(layer, weight, activation_range) for bits, weight in weights.items()}
        self._scales = {bits: (activation_range.scale * w.scale).view(self._channel) for bits, w in weights.items()}
        self.bits = next(iter(weights))
        self.owns_input = False

    @property
    def weight(self) -> QuantizedWeight:
        """The quantized weight at the selected bits."""
        return self._weights[self.bits]

    def factor(self) -> torch.Tensor:
        """Return what the sums of integers are multiplied by: one scale per output channel, shape (C_out, 1, 1)."""
        return self._scales[self.bits]

    def dequantized(self) -> nn.Conv2d | nn.Linear:
        """Return a float layer with the quantized weight at the selected bits."""
        layer = copy.deepcopy(self._float[0])
        layer.weight = nn.Parameter(self.weight.dequantize(), requires_grad=False)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's float32 output of a float32 input, in the float layer's shapes."""
        total = self._products[self.bits](self.activation_range.integers(x, in_place=self.owns_input))
        return total.mul_(self._scales[self.bits]).add_(self.bias)


def _product(
    layer: nn.Conv2d | nn.Linear, weight: QuantizedWeight, activation_range: ActivationRange
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from an input's integers to the exact sums of products with a weight's integers."""
    integers = weight.integers()
    if isinstance(layer, nn.Linear):
        return functools.partial(F.linear, weight=integers.float())
    how = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.weight.device.type == "cpu" and integers.abs().max() < 128 and _has_int8_convolution():
        return _int8_convolution(integers, how, activation_range)
    kernel = integers.float().contiguous(memory_format=torch.channels_last)
    return lambda x: F.conv2d(x, kernel, None, *how)


def _int8_convolution(
    integers: torch.Tensor, how: tuple, activation_range: ActivationRange
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return oneDNN's convolution of 8-bit integers with 32-bit sums, with every scale 1 so that nothing is rounded."""
    zero, (stride, padding, dilation, groups) = activation_range.zero_point, how
    ones, zeros = torch.ones(len(integers)), torch.zeros(len(integers), dtype=torch.int64)
    places = (list(stride), list(padding), list(dilation), groups)
    packed = torch.ops.onednn.qconv_prepack(integers.to(torch.int8), ones, 1.0, zero, *places, None)

    def convolve(x: torch.Tensor) -> torch.Tensor:
        codes = x.add_(zero + 2**23).view(torch.int32).to(torch.uint8)  # the low byte of 2^23 + k is k
        rest = (None, *places, 1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qconv_pointwise(codes, 1.0, zero, packed, ones, zeros, *rest)

    return convolve


@functools.cache
def _has_int8_convolution() -> bool:
    """Return whether this processor's 8-bit convolution is there and exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 253, (2, 8, 6, 6), generator=generator).float().contiguous(memory_format=torch.channels_last)
    kernel = torch.randint(-127, 128, (8, 8, 3, 3), generator=generator).short()
    try:
        found = _int8_convolution(kernel, ((1, 1), (1, 1), (1, 1), 1), ActivationRange(1.0, 3, 8))(x.clone())
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, F.conv2d(x, kernel.float(), None, 1, 1))


class QuantizedNetwork(nn.Module):
    """A folded network that takes any configuration by selecting weights from a bank; inputs of layers are quantized.

    Args:
        model: network with folded batch norm; its layers are replaced and it must not be used otherwise.
        bank: its weight bank.
        activation_ranges: layer name -> range of its input.
    """

    def __init__(
        self, model: torch.fx.GraphModule, bank: WeightBank, activation_ranges: Mapping[str, ActivationRange]
    ) -> None:
        super().__init__()
        self.model, self.bank, self.activation_ranges = model.eval().requires_grad_(False), bank, activation_ranges
        self.layers: dict[str, QuantizedLayer] = {}
        for name, activation_range in activation_ranges.items():
            weights = {bits: weight for (layer, bits), weight in bank.weights.items() if layer == name}
            self.layers[name] = QuantizedLayer(model.get_submodule(name), weights, activation_range)
            model.set_submodule(name, self.layers[name])

    def select(self, config: Sequence[int]) -> QuantizedNetwork:
        """Take a configuration. Returns the network itself.

        Raises:
            ConfigLengthError, InvalidBitsError: see :meth:`WeightBank.widths`.
        """
        for name, bits in self.bank.widths(config).items():
            self.layers[name].bits = bits
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) of inputs (N, C, H, W) under the configuration selected last."""
        return self.model(x)

    def dequantized(self) -> torch.fx.GraphModule:
        """Return a float network with the selected weights; its activations are not quantized."""
        plain = torch.fx.GraphModule(self.model, copy.deepcopy(self.model.graph))
        for name, layer in self.layers.items():
            plain.set_submodule(name, layer.dequantized())
        return plain

    @functools.cached_property
    def pieces(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """The network cut as by :func:`emq_lib.models.segments`, sparing memory traffic inside each piece.

        The same numbers: results that nobody else reads are overwritten in place, and a ReLU (or ReLU6) is left out
        whose readers all round what it cuts off to the same code anyway.
        """
        pieces = segments(self.model, list(self.layers))
        for piece, _ in pieces:
            _spare_memory(piece)
        return pieces


def _spare_memory(piece: torch.fx.GraphModule) -> None:
    """Rewrite a piece of a quantized network as :attr:`QuantizedNetwork.pieces` says."""

    def layer(node: torch.fx.Node) -> QuantizedLayer | None:
        module = piece.get_submodule(node.target) if node.op == "call_module" else None
        return module if isinstance(module, QuantizedLayer) else None

    def disposable(node: object) -> bool:
        """Say whether a node makes a new tensor that one other node reads."""
        if not isinstance(node, torch.fx.Node) or len(node.users) != 1:
            return False
        if ceiling(node) is not None:  # it may work in place
            return disposable(node.args[0])
        return layer(node) is not None or node.target in (operator.add, operator.iadd)

    def ceiling(node: torch.fx.Node) -> float | None:
        """Return the largest output of a ReLU (infinity) or ReLU6 (6), or None if the node is neither."""
        module = piece.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.ReLU) or node.target in (F.relu, F.relu_):
            return float("inf")
        return 6.0 if isinstance(module, nn.ReLU6) else None

    def repeats(reader: QuantizedLayer | None, top: float) -> bool:
        """Say whether a layer rounds what lies outside 0 to `top` to its lowest and highest codes."""
        if reader is None:
            return False
        seen = reader.activation_range
        return seen.zero_point == 0 and top / seen.scale > 2**seen.bits - 1.25

    for node in list(piece.graph.nodes):
        if node.target is operator.add:
            first = next((index for index, term in enumerate(node.args) if disposable(term)), None)
            if first is not None:
                node.target, node.args = operator.iadd, (node.args[first], node.args[1 - first])
        elif (top := ceiling(node)) is not None:
            if all(repeats(layer(user), top) for user in node.users):
                node.replace_all_uses_with(node.args[0])
                piece.graph.erase_node(node)
            elif disposable(node.args[0]) and top == float("inf"):
                node.op, node.target, node.kwargs = "call_function", F.relu_, {}
        if layer(node) is not None:
            layer(node).owns_input = disposable(node.args[0])
    piece.recompile()
