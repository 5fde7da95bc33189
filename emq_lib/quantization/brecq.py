"""Reconstruction block after block, in the order of BRECQ (Li et al. 2021): what the AdaRound bank is checked against.

The bank rounds each layer for itself, on the float network's inputs, so that any configuration is a selection. Here one
configuration is reconstructed as a whole: block after block, each on the inputs that the quantized blocks before it
give, with all weights of a block learned together; then, block after block again, the steps of the activations. It
costs a run of its own for every configuration. Explained in chapters 01 and 05.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from emq_lib.core.bank import build_weight_bank
from emq_lib.core.checks import bit_width, real_number, whole_number
from emq_lib.core.datasets import Split
from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.graphs import pre_hooks, segments
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.quantizers import ActivationRange
from emq_lib.quantization.adaround import Rounding, learn_rounding
from emq_lib.quantization.prepare import check_generator, check_layers, checked_images


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long blocks are reconstructed; the defaults are those of BRECQ.

    Attributes:
        iterations: steps for the weights of a block.
        activation_iterations: steps for the activations of a block; 0 keeps the ranges seen on calibration images.
        batch: images per step.
        activation_rate: learning rate of Adam for the steps of the activations.

    Raises:
        InvalidParameterError: a number outside its range.
    """

    iterations: int = 20_000
    activation_iterations: int = 5_000
    batch: int = 32
    activation_rate: float = 4e-4

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("iterations", 0), ("activation_iterations", 0), ("batch", 1)):
            whole_number(getattr(self, name), name, least)
        real_number(self.activation_rate, "activation_rate", 0)


PAPER = Settings()
WEIGHTS_ONLY = Settings(iterations=400, activation_iterations=0)
LAPTOP = Settings(iterations=400, activation_iterations=200)
LEAST_STEP = 0.01  # of an activation, in the step that its range on the calibration images gives


def reconstruct_in_order(
    model: torch.fx.GraphModule,
    layers: pd.DataFrame,
    config: Sequence[int],
    calibration: Split,
    ranges: Mapping[str, ActivationRange],
    *,
    generator: torch.Generator,
    settings: Settings,
) -> QuantizedNetwork:
    """Reconstruct one configuration block after block, and return its quantized network.

    A block is the shortest piece of the network that passes on a single tensor, e.g. a residual block. Its output is
    compared with the float network's by the mean squared difference (without BRECQ's weights from the Fisher matrix).
    As there, the inputs of layers are rounded only after the weights, and the steps of that rounding are learned after
    them (LSQ; Esser et al. 2020). Pinned layers are rounded to nearest.

    Args:
        model: network with folded batch norm; it is not changed.
        layers: its layer table.
        config: bits, S of them.
        calibration: the calibration images; they stay as they are.
        ranges: layer name -> range of its input.
        generator: source of the batches, on the CPU.
        settings: how long.

    Raises:
        InvalidBitsError, ConfigLengthError: the configuration is none of this network's.
        InvalidParameterError: no calibration images, or with NaN; a layer without a range; no generator.
        UnsupportedModelError: see :func:`emq_lib.quantization.prepare.check_layers`; or a block that does not pass on
            one tensor with a row per image.
    """
    check_layers(model, layers, ranges)
    check_generator(generator)
    images = checked_images(calibration).inputs()
    model = copy.deepcopy(model).requires_grad_(False)
    pieces = segments(model, list(layers["name"]))
    bank = build_weight_bank(model, layers, sorted({bit_width(bits, "config") for bits in config}))
    widths, weights = bank.widths(config), dict(bank.weights)
    exact = changed = images
    for piece, names in pieces:
        target = _apply(piece, {}, exact)
        free = {
            name: Rounding(model.get_submodule(name).weight, widths[name]) for name in names if name in bank.searchable
        }
        fixed = {name: bank.weights[name, widths[name]].dequantize() for name in names}
        if free:
            _learn_block(piece, free, fixed, changed, target, generator=generator, settings=settings)
            weights |= {(name, widths[name]): rounding.hardened() for name, rounding in free.items()}
        now = {name: weights[name, widths[name]].dequantize() for name in names}
        exact, changed = target, _apply(piece, now, changed)
    if settings.activation_iterations:
        final = {name: weights[name, bits].dequantize() for name, bits in widths.items()}
        ranges = _learn_steps(pieces, final, ranges, images, generator=generator, settings=settings)
    return QuantizedNetwork(model, dataclasses.replace(bank, weights=weights), ranges).select(config)


def _learn_block(
    piece: nn.Module,
    free: Mapping[str, Rounding],
    fixed: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    target: torch.Tensor,
    *,
    generator: torch.Generator,
    settings: Settings,
) -> None:
    """Choose the directions of a block's weights on random batches of its inputs and wanted outputs."""

    def error(rounded: list[torch.Tensor]) -> torch.Tensor:
        rows = torch.randint(len(inputs), (settings.batch,), generator=generator).to(inputs.device)
        found = _run(piece, dict(fixed) | dict(zip(free, rounded, strict=True)), inputs[rows])
        return F.mse_loss(found, target[rows])

    worst = F.mse_loss(_apply(piece, fixed, inputs), target).item()
    learn_rounding(list(free.values()), error, worst, settings.iterations)


def _learn_steps(
    pieces: Sequence[tuple[nn.Module, tuple[str, ...]]],
    weights: Mapping[str, torch.Tensor],
    ranges: Mapping[str, ActivationRange],
    images: torch.Tensor,
    *,
    generator: torch.Generator,
    settings: Settings,
) -> dict[str, ActivationRange]:
    """Learn the step of each layer's input, block after block, on inputs that the steps before have rounded."""
    learned, exact, changed = dict(ranges), images, images
    for piece, names in pieces:
        now = {name: weights[name] for name in names}
        target = _apply(piece, {}, exact)
        steps = {name: torch.tensor([ranges[name].scale], device=images.device, requires_grad=True) for name in names}
        optimizer = torch.optim.Adam(steps.values(), lr=settings.activation_rate)
        with pre_hooks(piece, {name: learned_step(ranges[name], steps[name]) for name in names}):
            before = F.mse_loss(_apply(piece, now, changed), target)
            for _ in range(settings.activation_iterations):
                rows = torch.randint(len(images), (settings.batch,), generator=generator).to(images.device)
                loss = F.mse_loss(_run(piece, now, changed[rows]), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for name, step in steps.items():  # Adam may step across zero, where there is nothing to round with
                    step.data.clamp_(min=LEAST_STEP * ranges[name].scale)
            if F.mse_loss(_apply(piece, now, changed), target) > before:  # keep what was seen on calibration images
                for name, step in steps.items():
                    step.data.fill_(ranges[name].scale)
            exact, changed = target, _apply(piece, now, changed)
        learned |= {name: dataclasses.replace(ranges[name], scale=step.item()) for name, step in steps.items()}
    return learned


def learned_step(seen: ActivationRange, step: torch.Tensor) -> Callable:
    """Return a hook that rounds a layer's input with a step that gradients reach (LSQ; Esser et al. 2020).

    Args:
        seen: gives the width and the zero point.
        step: the scale, shape (1,).
    """
    zero_point = torch.tensor([float(seen.zero_point)], device=step.device)

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        top = 2**seen.bits - 1
        gain = (inputs[0].numel() * top) ** -0.5  # LSQ's scale of the step's gradient
        return (torch._fake_quantize_learnable_per_tensor_affine(inputs[0], step, zero_point, 0, top, gain),)

    return hook


def _run(piece: nn.Module, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run a piece with other weights in the layers that are named."""
    return functional_call(piece, {f"{name}.weight": weight for name, weight in weights.items()}, (x,))


@torch.no_grad()
def _apply(piece: nn.Module, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run a piece on all images, some at a time."""
    found = [_run(piece, weights, part) for part in x.split(256)]
    if not all(isinstance(part, torch.Tensor) and len(part) == len(x[:256]) for part in found[:1]):
        raise UnsupportedModelError(
            "Between two blocks the network does not pass on one tensor with a row per image: it cannot be "
            "reconstructed block after block. Use another method, or keep images in the first dimension."
        )
    return torch.cat(found)
