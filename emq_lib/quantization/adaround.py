"""AdaRound (Nagel et al. 2020): round each weight up or down so that the layer's output changes least.

A layer is linear in its weight. So the mean squared error of its output on the calibration images is a quadratic form
in the rounding error E of each output channel, E M E', where M is the mean of x x' over the patches x that the layer
sees. M is gathered once per layer with full-precision inputs; a reconstruction then needs neither images nor the
network, and a layer at b bits has one reconstruction, whatever the other layers do. Explained in chapter 01.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, MutableMapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.bank import WeightBank, build_weight_bank
from emq_lib.core.checks import bit_choices
from emq_lib.core.datasets import Split
from emq_lib.core.graphs import pre_hooks
from emq_lib.core.models import predict
from emq_lib.core.quantizers import QuantizedWeight, quantize
from emq_lib.quantization.prepare import check_layers, checked_images

ITERATIONS, LEARNING_RATE, WARM_UP = 500, 3e-2, 0.2
STRETCH = (-0.1, 1.1)  # the sigmoid of a rounding variable is stretched to this range and cut to 0..1
ANNEALING = (20.0, 2.0)  # exponent of the regularizer, from soft to hard
PULL = 0.1  # weight of the regularizer against the relative error


@torch.inference_mode()
def second_moments(
    model: nn.Module, names: Sequence[str], calibration: Split, *, batch_size: int = 64
) -> dict[str, torch.Tensor]:
    """Gather the second moments of what each layer of a folded float network sees.

    Args:
        model: the network.
        names: its layers, convolutions or linear.
        calibration: the calibration images.
        batch_size: images per forward pass.

    Returns:
        layer name -> float64 tensor (G, K, K), the mean of x x' over images and positions; G is the number of groups
        and K the number of weights of one output channel.
    """
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            patches = _patches(module, inputs[0])
            sums[name] = sums.get(name, 0) + (patches @ patches.mT).double()
            counts[name] += patches.shape[-1]

        return hook

    with pre_hooks(model, {name: watch(name) for name in names}):
        predict(model, calibration, batch_size=batch_size)
    return {name: sums[name] / counts[name] for name in names}


def _patches(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what each output of a layer is a product with, shape (G, K, patches)."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).mT
    how = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
    patches = F.unfold(x.contiguous(), module.kernel_size, **how)
    images, _, positions = patches.shape
    grouped = patches.view(images, module.groups, -1, positions)
    return grouped.permute(1, 2, 0, 3).reshape(module.groups, -1, images * positions)


def output_error(error: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Return the squared output error, summed over output channels, of a weight error (G, C_out / G, K)."""
    return ((error @ moments) * error).sum()


class Rounding:
    """A weight that is rounded down or up, entry by entry, on the grid of rounding to nearest; which way is learned.

    Every weight has a variable whose stretched sigmoid h lies between 0 (down) and 1 (up).

    Args:
        weight: float tensor of shape (C_out, ...).
        bits: bit width, 1 to 8.

    Raises:
        InvalidBitsError: a width outside 1 to 8.
    """

    def __init__(self, weight: torch.Tensor, bits: int) -> None:
        self.weight, self.nearest = weight.detach().float(), quantize(weight, bits)
        channel = (-1,) + (1,) * (weight.ndim - 1)
        self._step = self.nearest.scale.view(channel)
        self._lowest = -self.nearest.zero_point.float().view(channel)
        self._floor = (self.weight / self._step).floor()
        low, high = STRETCH
        share = (self.weight / self._step - self._floor).clamp(1e-3, 1 - 1e-3)
        self.variable = torch.logit((share - low) / (high - low)).requires_grad_()

    def up(self) -> torch.Tensor:
        """Return h, between 0 and 1, in the shape of the weight."""
        low, high = STRETCH
        return (torch.sigmoid(self.variable) * (high - low) + low).clamp(0, 1)

    def rounded(self, up: torch.Tensor) -> torch.Tensor:
        """Return the weight on its way between down (`up` 0) and up (1)."""
        return self._integers(up) * self._step

    def hardened(self) -> QuantizedWeight:
        """Return the weight with every entry rounded the way it leans."""
        with torch.no_grad():
            codes = self._integers((self.up() >= 0.5).float()) - self._lowest
        return dataclasses.replace(self.nearest, codes=codes.to(torch.uint8))

    def _integers(self, up: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(self._floor + up, self._lowest), self._lowest + 2**self.nearest.bits - 1)


def learn_rounding(
    roundings: Sequence[Rounding], error: Callable[[list[torch.Tensor]], torch.Tensor], worst: float, iterations: int
) -> None:
    """Let Adam choose the directions of one or more weights together.

    Minimized is the error as a share of that of rounding to nearest, times the number of weights, plus a regularizer
    1 - |2 h - 1|^beta for each weight, whose exponent falls from 20 to 2 and so drives h to 0 or 1.

    Args:
        roundings: of the weights; changed in place.
        error: the rounded weights, one per rounding -> the error to minimize.
        worst: the error of rounding to nearest.
        iterations: steps of Adam.
    """
    variables = [rounding.variable for rounding in roundings]
    weights = sum(variable.numel() for variable in variables)
    optimizer = torch.optim.Adam(variables, lr=LEARNING_RATE)
    for iteration in range(iterations):
        ups = [rounding.up() for rounding in roundings]
        found = error([rounding.rounded(up) for rounding, up in zip(roundings, ups, strict=True)])
        loss = found / max(worst, 1e-12) * weights
        progress = (iteration / iterations - WARM_UP) / (1 - WARM_UP)
        if progress >= 0:
            beta = ANNEALING[0] + (ANNEALING[1] - ANNEALING[0]) * progress
            loss = loss + PULL * sum((1 - (2 * up - 1).abs() ** beta).sum() for up in ups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adaround(weight: torch.Tensor, bits: int, moments: torch.Tensor) -> QuantizedWeight:
    """Round a weight so that the layer's output changes least; ranges are those of rounding to nearest.

    Where learning ends with more error than rounding to nearest, rounding to nearest stays.

    Args:
        weight: float tensor of shape (C_out, ...).
        bits: bit width, 1 to 8.
        moments: second moments of the layer's input, shape (G, K, K).

    Raises:
        InvalidBitsError: a width outside 1 to 8.
    """
    rounding = Rounding(weight, bits)
    moments = moments.to(weight.device, torch.float32)
    shape = (len(moments), -1, moments.shape[-1])

    def error(rounded: torch.Tensor) -> torch.Tensor:
        return output_error((rounded - rounding.weight).reshape(shape), moments)

    worst = error(rounding.nearest.dequantize()).item()
    learn_rounding([rounding], lambda rounded: error(rounded[0]), worst, ITERATIONS)
    found = rounding.hardened()
    return found if error(found.dequantize()).item() < worst else rounding.nearest


def build_adaround_bank(
    model: nn.Module,
    layers: pd.DataFrame,
    choices: Sequence[int],
    calibration: Split,
    *,
    finished: MutableMapping[tuple[str, int], torch.Tensor] | None = None,
) -> WeightBank:
    """Reconstruct each searchable layer of a folded network at each width; pinned layers are rounded to nearest.

    Args:
        model: network with folded batch norm; it stays as it is.
        layers: its layer table.
        choices: the B allowed widths.
        calibration: the calibration images; they stay as they are.
        finished: (layer name, bits) -> codes, uint8 in the shape of the weight, of what was reconstructed before and is
            not again. Each new one is entered as soon as it is done, so that a caller who keeps them loses no more than
            one layer to an error or a kill.

    Raises:
        InvalidBitsError: choices that are no whole numbers from 1 to 8, or do not increase.
        InvalidParameterError: no calibration images, or with NaN.
        UnsupportedModelError: see :func:`emq_lib.quantization.prepare.check_layers`.
    """
    choices, calibration = bit_choices(choices), checked_images(calibration)
    check_layers(model, layers)
    nearest = build_weight_bank(model, layers, choices)
    finished = {} if finished is None else finished
    missing = [entry for entry in itertools.product(nearest.searchable, choices) if entry not in finished]
    names = list(dict.fromkeys(name for name, _ in missing))
    moments = second_moments(model, names, calibration) if names else {}
    for name, bits in missing:
        finished[name, bits] = adaround(model.get_submodule(name).weight, bits, moments[name]).codes
    learned = {
        entry: dataclasses.replace(
            nearest.weights[entry], codes=finished[entry].to(nearest.weights[entry].codes.device)
        )
        for entry in itertools.product(nearest.searchable, choices)
    }
    return dataclasses.replace(nearest, weights={**nearest.weights, **learned})
