"""Reconstruction block after block, in the order of BRECQ (Li et al. 2021): what the AdaRound bank is checked against.

The bank rounds each layer for itself, on the float network's inputs, so that any configuration is a selection. Here one
configuration is reconstructed as a whole: block after block, each on the inputs that the quantized blocks before it
give, with all weights of a block learned together. It costs a run of its own for every configuration. Explained in
chapter 01.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from emq_lib.datasets import Split
from emq_lib.models import segments
from emq_lib.quantizers import ActivationRange, QuantizedNetwork, build_weight_bank
from emq_lib.reconstruction import Rounding, learn_rounding

ITERATIONS, BATCH = 400, 32


def reconstruct_in_order(
    model: torch.fx.GraphModule,
    layers: pd.DataFrame,
    config: Sequence[int],
    calibration: Split,
    ranges: Mapping[str, ActivationRange],
    *,
    generator: torch.Generator,
) -> QuantizedNetwork:
    """Reconstruct one configuration block after block, and return its quantized network.

    A block is the shortest piece of the network that passes on a single tensor, e.g. a residual block. Its output is
    compared with the float network's by the mean squared difference (without BRECQ's weights from the Fisher matrix).
    As there, the inputs of layers are rounded only after the weights. Pinned layers are rounded to nearest.

    Args:
        model: network with folded batch norm; it is not changed.
        layers: its layer table.
        config: bits, S of them.
        calibration: the calibration images.
        ranges: layer name -> range of its input.
        generator: source of the batches, on the CPU.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    bank = build_weight_bank(model, layers, sorted(set(map(int, config))))
    widths, weights = bank.widths(config), dict(bank.weights)
    exact = changed = calibration.inputs()
    for piece, names in segments(model, list(layers["name"])):
        target = _apply(piece, {}, exact)
        free = {
            name: Rounding(model.get_submodule(name).weight, widths[name]) for name in names if name in bank.searchable
        }
        fixed = {name: bank.weights[name, widths[name]].dequantize() for name in names}
        if free:
            _learn_block(piece, free, fixed, changed, target, generator=generator)
            weights |= {(name, widths[name]): rounding.hardened() for name, rounding in free.items()}
        now = {name: weights[name, widths[name]].dequantize() for name in names}
        exact, changed = target, _apply(piece, now, changed)
    return QuantizedNetwork(model, dataclasses.replace(bank, weights=weights), ranges).select(config)


def _learn_block(
    piece: nn.Module,
    free: Mapping[str, Rounding],
    fixed: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    target: torch.Tensor,
    *,
    generator: torch.Generator,
) -> None:
    """Choose the directions of a block's weights on random batches of its inputs and wanted outputs."""

    def error(rounded: list[torch.Tensor]) -> torch.Tensor:
        rows = torch.randint(len(inputs), (BATCH,), generator=generator).to(inputs.device)
        found = _run(piece, dict(fixed) | dict(zip(free, rounded, strict=True)), inputs[rows])
        return F.mse_loss(found, target[rows])

    worst = F.mse_loss(_apply(piece, fixed, inputs), target).item()
    learn_rounding(list(free.values()), error, worst, ITERATIONS)


def _run(piece: nn.Module, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run a piece with other weights in the layers that are named."""
    return functional_call(piece, {f"{name}.weight": weight for name, weight in weights.items()}, (x,))


@torch.no_grad()
def _apply(piece: nn.Module, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run a piece on all images, some at a time."""
    return torch.cat([_run(piece, weights, part) for part in x.split(256)])
