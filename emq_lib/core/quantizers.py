"""Uniform affine quantization: range search, rounding to nearest, ranges of activations.

Explained in chapter 01.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from emq_lib.core.checks import bit_width, real_number, whole_number
from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import pre_hooks
from emq_lib.core.models import predict

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
        InvalidBitsError: a width that is no whole number from 1 to 8.
        UnsupportedModelError: a weight that is no float tensor with an axis of output channels, or not finite.
    """
    bits, shrinks = bit_width(bits, "bits"), whole_number(shrinks, "shrinks", 1)
    if not isinstance(weight, torch.Tensor) or weight.ndim < 2 or not weight.is_floating_point() or not weight.numel():
        raise UnsupportedModelError(f"A weight is a float tensor of shape (C_out, ...); got {weight!r:.60}.")
    if not weight.isfinite().all():
        raise UnsupportedModelError("A weight holds NaN or infinity, which no grid has. Train the network again.")
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

    Args:
        weight: float tensor of shape (C_out, ...).
        bits: bit width, 1 to 8.

    Raises:
        InvalidBitsError, UnsupportedModelError: see :func:`choose_qparams`.

    >>> quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), bits=2).dequantize()
    tensor([[0., 1., 2., 3.]])
    """
    scale, zero_point = choose_qparams(weight, bits)
    channel = (-1,) + (1,) * (weight.ndim - 1)
    codes = (weight.detach() / scale.view(channel)).round() + zero_point.view(channel)
    return QuantizedWeight(codes.clamp(0, 2**bits - 1).to(torch.uint8), scale, zero_point, bits)


def fake_quantize(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the weight, float32, after quantizing and dequantizing it: see :func:`quantize`."""
    return quantize(weight, bits).dequantize()


@dataclass(frozen=True)
class ActivationRange:
    """Affine quantization of one layer's input: one scale and one zero point for the whole tensor.

    Attributes:
        scale: distance of two levels, positive.
        zero_point: code of zero, 0 to 2^bits - 1.
        bits: bit width, 1 to 8.

    Raises:
        InvalidBitsError, InvalidParameterError: a value outside what is said above.
    """

    scale: float
    zero_point: int
    bits: int

    def __post_init__(self) -> None:
        """Check every value."""
        bits = bit_width(self.bits, "bits")
        real_number(self.scale, "a scale", 0)
        if whole_number(self.zero_point, "a zero point", 0) > 2**bits - 1:
            raise InvalidParameterError(f"a zero point lies in 0 to {2**bits - 1}, got {self.zero_point}.")

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

    Args:
        model: the float network.
        layers: its layer table.
        calibration: the calibration images.
        bits: width of every layer's input, 1 to 8.
        batch_size: images per forward pass.

    Returns:
        layer name -> range.

    Raises:
        InvalidBitsError: a width that is no whole number from 1 to 8.
        InvalidParameterError: no images, or a batch size that is none.
        UnsupportedModelError: a layer sees a NaN or an infinity, does not run, or is not there; the message names it.
    """
    bits = bit_width(bits, "activation_bits")
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
    if idle := [name for name in layers["name"] if name not in lows]:
        raise UnsupportedModelError(f"Layers {idle} do not run in a pass: they have no range.")
    ranges = {}
    for name in layers["name"]:
        scale, zero = _affine(torch.tensor(lows[name]), torch.tensor(highs[name]), bits)
        ranges[name] = ActivationRange(scale.item(), int(zero.item()), bits)
    return ranges
