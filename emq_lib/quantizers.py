"""Uniform affine quantization: range search, rounding to nearest, the weight bank, and a network that selects from it.

Explained in chapter 01.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from emq_lib.costs import choice_indices
from emq_lib.datasets import Split
from emq_lib.errors import InvalidBitsError, UnsupportedModelError
from emq_lib.profiles import Profile

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

    def dequantize(self) -> torch.Tensor:
        """Return scale * (codes - zero point) per output channel, float32, shape (C_out, ...)."""
        channel = (-1,) + (1,) * (self.codes.ndim - 1)
        return (self.codes.float() - self.zero_point.float().view(channel)) * self.scale.view(channel)


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
        searchable: names of the S searchable layers in slot order.
        pinned: (name, bits) of the layers outside the search.
        weights: (layer name, bits) -> quantized weight.
    """

    choices: tuple[int, ...]
    searchable: tuple[str, ...]
    pinned: tuple[tuple[str, int], ...]
    weights: Mapping[tuple[str, int], QuantizedWeight]

    def select(self, config: Sequence[int]) -> dict[str, QuantizedWeight]:
        """Return layer name -> quantized weight for one configuration, pinned layers included.

        Raises:
            ConfigLengthError: the configuration does not have S entries.
            InvalidBitsError: a width is not among the choices.
        """
        choice_indices(config, self.choices, len(self.searchable))
        named = [*zip(self.searchable, map(int, config), strict=True), *self.pinned]
        return {name: self.weights[name, bits] for name, bits in named}


def build_weight_bank(model: nn.Module, layers: pd.DataFrame, choices: Sequence[int]) -> WeightBank:
    """Quantize each layer of a folded network at each width it may take.

    Args:
        model: network with folded batch norm.
        layers: its layer table.
        choices: the B allowed widths.
    """
    modules = dict(model.named_modules())
    searchable = tuple(layers.loc[layers["searchable"], "name"])
    pinned = tuple((layer.name, int(layer.pinned_bits)) for layer in layers[~layers["searchable"]].itertuples())
    wanted = [*((name, bits) for name in searchable for bits in choices), *pinned]
    weights = {(name, bits): quantize(modules[name].weight, bits) for name, bits in wanted}
    return WeightBank(tuple(choices), searchable, pinned, weights)


@dataclass(frozen=True)
class ActivationRange:
    """Affine quantization of one layer's input: one scale and one zero point for the whole tensor."""

    scale: float
    zero_point: int
    bits: int

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` after quantizing and dequantizing it.

        The same numbers as ``torch.fake_quantize_per_tensor_affine``, which also builds a mask for the backward pass
        and takes about ten times as long on a CPU.
        """
        codes = x.mul(1 / self.scale).round_().add_(self.zero_point).clamp_(0, 2**self.bits - 1)
        return codes.sub_(self.zero_point).mul_(self.scale)


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
    modules, lows, highs = dict(model.named_modules()), {}, {}

    def watch(name: str):
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = torch.aminmax(inputs[0])
            lows[name] = min(low.item(), lows.get(name, 0.0))
            highs[name] = max(high.item(), highs.get(name, 0.0))
            if not np.isfinite(low.item() + high.item()):
                raise UnsupportedModelError(f"Layer {name!r} sees NaN or infinity on the calibration images.")

        return hook

    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in layers["name"]]
    try:
        for start in range(0, len(calibration), batch_size):
            model(calibration[start : start + batch_size].inputs())
    finally:
        for handle in handles:
            handle.remove()
    ranges = {}
    for name in layers["name"]:
        scale, zero = _affine(torch.tensor(lows[name]), torch.tensor(highs[name]), bits)
        ranges[name] = ActivationRange(scale.item(), int(zero.item()), bits)
    return ranges


class QuantizedNetwork(nn.Module):
    """A folded network that takes any configuration by selecting weights from a bank; inputs of layers are quantized.

    Args:
        model: network with folded batch norm; it is modified and must not be used otherwise.
        bank: its weight bank.
        activation_ranges: layer name -> range of its input.
    """

    def __init__(
        self, model: torch.fx.GraphModule, bank: WeightBank, activation_ranges: Mapping[str, ActivationRange]
    ) -> None:
        super().__init__()
        self.model, self.bank, self.activation_ranges = model.eval().requires_grad_(False), bank, activation_ranges
        self._layers = {name: module for name, module in model.named_modules() if name in activation_ranges}
        self._tensors = {
            key: weight.dequantize().contiguous(memory_format=_memory_format(weight.codes))
            for key, weight in bank.weights.items()
        }
        for name, activation_range in activation_ranges.items():
            self._layers[name].register_forward_pre_hook(_quantize_input(activation_range))
        for name, bits in bank.pinned:
            self._layers[name].weight.data = self._tensors[name, bits]

    def select(self, config: Sequence[int]) -> QuantizedNetwork:
        """Take a configuration: point every searchable layer at its weight in the bank. Returns the network itself.

        Raises:
            ConfigLengthError: the configuration does not have S entries.
            InvalidBitsError: a width is not among the choices.
        """
        choice_indices(config, self.bank.choices, len(self.bank.searchable))
        for name, bits in zip(self.bank.searchable, map(int, config), strict=True):
            self._layers[name].weight.data = self._tensors[name, bits]
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) of inputs (N, C, H, W) under the configuration selected last."""
        return self.model(x)


def _quantize_input(activation_range: ActivationRange):
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (activation_range.fake_quantize(inputs[0]),)

    return hook


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format


def quantize_network(model: nn.Module, layers: pd.DataFrame, profile: Profile, calibration: Split) -> QuantizedNetwork:
    """Build a profile's quantized network: weight bank and activation ranges of a folded float network."""
    bank = build_weight_bank(model, layers, profile.choices)
    ranges = choose_activation_ranges(model, layers, calibration, bits=profile.activation_bits)
    return QuantizedNetwork(model, bank, ranges)
