"""Learned rounding without gradients: error feedback, then steps of single weights, then the scale; again and again.

AdaRound's problem, solved on the integers. Every output channel starts from the better of rounding to nearest and of
GPTQ (Frantar et al. 2023), which rounds one input after another and lets the inputs that follow make up for the error.
Then the channel takes, one at a time, the step of a single weight to any level that lowers its error most, as greedy
coordinate descent does (Nutini et al. 2015; QuantEase, Behdin et al. 2023, takes them in turn), until none is left.
The scale of rounding to nearest is the best for errors that cancel nowhere. So channels start from several, which are
fitted anew to the levels that were found, and steps are taken again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pandas as pd
import torch
from torch import nn

from emq_lib.core.bank import WeightBank, build_weight_bank
from emq_lib.core.checks import bit_choices
from emq_lib.core.datasets import Split
from emq_lib.core.quantizers import QuantizedWeight, quantize
from emq_lib.quantization.moments import sampled_moments
from emq_lib.quantization.prepare import check_layers, checked_images

DAMPING = 0.01  # of the mean of M's diagonal, added to it: what few patches leave open stays near the float weight
SCALES = (0.7, 0.85, 1.0, 1.2, 1.4)  # to start from, in those of rounding to nearest; every channel keeps its best end
ROUNDS = 4  # of steps; between two the scale is fitted
WORTH = 1e-9  # of a channel's error, that a step has to save: less is rounding of sums
_BLOCK = 64  # inputs whose errors are passed on together
_NUMBERS = 2**23  # weights that are rounded at once, all widths and scales counted


@torch.no_grad()
def learn_weight(
    weight: torch.Tensor, widths: Sequence[int], moments: torch.Tensor, *, target: torch.Tensor | None = None
) -> list[QuantizedWeight]:
    """Round a weight at several widths so that the layer's output changes least.

    The sum of squares E (M + damping) E' of no channel is above that of rounding to nearest, and no step of a single
    weight lowers it. The same input gives the same levels, up to sums that a processor adds in another order.

    Args:
        weight: float tensor of shape (C_out, ...).
        widths: bit widths, 1 to 8.
        moments: second moments of the layer's input, shape (G, K, K).
        target: what to come near to instead of the weight, in its shape; ranges stay the weight's.

    Returns:
        one quantized weight for each width.

    Raises:
        InvalidBitsError, UnsupportedModelError: see :func:`emq_lib.core.quantizers.quantize`.
    """
    groups, inputs = len(moments), moments.shape[-1]
    nearest = [quantize(weight, bits) for bits in widths]
    moments = moments.to(weight.device, torch.float64)
    spread = moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    moments = moments + DAMPING * spread[:, None, None] * torch.eye(inputs, dtype=moments.dtype, device=moments.device)
    rows = (weight if target is None else target).detach().double().flatten(1).unflatten(0, (groups, -1))
    runs = [(rounded, factor) for rounded in nearest for factor in SCALES]
    together = max(1, _NUMBERS // weight.numel())
    found = [
        each
        for first in range(0, len(runs), together)
        for each in _channels(rows, runs[first : first + together], moments)
    ]
    learned = []
    for rounded, ends in zip(
        nearest, [found[i : i + len(SCALES)] for i in range(0, len(found), len(SCALES))], strict=True
    ):
        levels, scale, error = map(torch.stack, zip(*ends, strict=True))
        best = error.argmin(dim=0, keepdim=True)
        scale = scale.gather(0, best).flatten().float()
        levels = levels.gather(0, best[..., None].expand(1, *rows.shape)).reshape(weight.shape)
        zero = rounded.zero_point.view(-1, *[1] * (weight.ndim - 1))
        learned.append(dataclasses.replace(rounded, codes=(levels + zero).to(torch.uint8), scale=scale))
    return learned


def _channels(
    rows: torch.Tensor, runs: Sequence[tuple[QuantizedWeight, float]], moments: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return levels (G, C, K), scales (G, C) and errors (G, C) for each of several (grid, factor of its scale)."""

    def of_all(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.double().unflatten(0, (len(rows), -1)) for tensor in tensors], dim=1)

    scale = of_all([factor * grid.scale for grid, factor in runs])
    low = of_all([-grid.zero_point.double() for grid, _ in runs])
    high = low + of_all([torch.full_like(grid.scale, 2**grid.bits - 1) for grid, _ in runs])
    wanted = rows.repeat(1, len(runs), 1)
    levels = (wanted / scale[..., None]).round().clamp(low[..., None], high[..., None])
    passed_on = _feedback(wanted, scale, low, high, moments)
    better = _errors(passed_on, scale, wanted, moments) < _errors(levels, scale, wanted, moments)
    levels = torch.where(better[..., None], passed_on, levels)
    for round_number in range(ROUNDS):
        if round_number:
            scale = _fitted(levels, scale, wanted, moments)
        levels = _steps(levels, scale, wanted, low, high, moments)
    parts = (levels, scale, _errors(levels, scale, wanted, moments))
    return list(zip(*(part.chunk(len(runs), dim=1) for part in parts), strict=True))


def _errors(levels: torch.Tensor, scale: torch.Tensor, wanted: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Return E M E' of every channel, shape (G, C)."""
    error = levels * scale[..., None] - wanted
    return ((error @ moments) * error).sum(dim=-1)


def _feedback(
    wanted: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    """Return GPTQ's levels: inputs in the order of their power, the error of each passed on to those that follow."""
    order = moments.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    rows = order[:, :, None].expand_as(moments)
    sorted_moments = moments.gather(1, rows).gather(2, rows.mT)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sorted_moments))
    passing = torch.linalg.cholesky(inverse, upper=True)
    place = order[:, None, :].expand_as(wanted)
    left, levels = wanted.gather(2, place), torch.empty_like(wanted)
    for start in range(0, left.shape[-1], _BLOCK):
        block = range(start, min(start + _BLOCK, left.shape[-1]))
        errors = torch.empty_like(left[..., block.start : block.stop])
        for i in block:
            level = (left[..., i] / scale).round().clamp(low, high)
            levels[..., i] = level
            error = (left[..., i] - level * scale) / passing[:, None, i, i]
            left[..., i : block.stop] -= error[..., None] * passing[:, None, i, i : block.stop]
            errors[..., i - start] = error
        left[..., block.stop :] -= errors @ passing[:, block.start : block.stop, block.stop :]
    return torch.empty_like(levels).scatter_(2, place, levels)


def _steps(
    levels: torch.Tensor,
    scale: torch.Tensor,
    wanted: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    moments: torch.Tensor,
) -> torch.Tensor:
    """Let every channel take its best step of a single weight until none saves anything; returns the levels."""
    error = levels * scale[..., None] - wanted
    slope = error @ moments  # half the derivative of E M E' by E
    group = torch.arange(len(moments), device=levels.device).repeat_interleave(levels.shape[1])
    least = WORTH * (error * slope).sum(dim=-1).flatten()
    now, slope = levels.flatten(0, 1).clone(), slope.flatten(0, 1)
    scale, low, high = (tensor.flatten()[:, None] for tensor in (scale, low, high))
    power, found = moments.diagonal(dim1=-2, dim2=-1)[group], now.clone()
    rows = torch.arange(len(now), device=levels.device)  # the channels that still move
    while len(rows):
        new = (now - slope / (power * scale)).round().clamp(low, high)
        change = (new - now) * scale
        saved, place = (-change * (2 * slope + change * power)).max(dim=1)
        moving = saved > least
        if not moving.all():
            found[rows[~moving]] = now[~moving]
            rows, now, slope, scale, low, high, power, group, least = (
                tensor[moving] for tensor in (rows, now, slope, scale, low, high, power, group, least)
            )
            new, change, place = new[moving], change[moving], place[moving]
        each = torch.arange(len(rows), device=levels.device)
        now[each, place] = new[each, place]
        slope += change[each, place][:, None] * moments[group, place]
    return found.view_as(levels)


def _fitted(levels: torch.Tensor, scale: torch.Tensor, wanted: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Return the scale of every channel with which its levels err least; one that would be zero or less stays."""
    seen = levels @ moments
    fitted = ((wanted * seen).sum(dim=-1) / (levels * seen).sum(dim=-1)).float().double()  # as it is kept
    return torch.where(fitted > 0, fitted, scale)  # also where no level is, and the quotient is none


def build_learned_bank(
    model: nn.Module, layers: pd.DataFrame, choices: Sequence[int], calibration: Split
) -> WeightBank:
    """Round each searchable layer of a folded network at each width by :func:`learn_weight`, on its float inputs.

    Pinned layers are rounded to nearest.

    Args:
        model: network with folded batch norm; it stays as it is.
        layers: its layer table.
        choices: the B allowed widths.
        calibration: the calibration images; they stay as they are.

    Raises:
        InvalidBitsError: choices that are no whole numbers from 1 to 8, or do not increase.
        InvalidParameterError: no calibration images, or with NaN.
        UnsupportedModelError: see :func:`emq_lib.quantization.prepare.check_layers`.
    """
    choices, calibration = bit_choices(choices), checked_images(calibration)
    check_layers(model, layers)
    nearest = build_weight_bank(model, layers, choices)
    moments = sampled_moments(model, nearest.searchable, calibration)
    learned = {}
    for name in nearest.searchable:
        weights = learn_weight(model.get_submodule(name).weight, choices, moments.pop(name))
        learned |= {(name, weight.bits): weight for weight in weights}
    return dataclasses.replace(nearest, weights={**nearest.weights, **learned})
