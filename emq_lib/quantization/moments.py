"""Second moments of a sample of what a layer sees: as good as those of all positions, in a tenth of the time.

What they are for stands in :mod:`emq_lib.quantization.adaround`, which takes all positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.graphs import pre_hooks
from emq_lib.core.models import predict

PER_INPUT, LEAST = 64, 16_384  # patches: so many for each row of M, and no fewer than these
_GOLDEN = (math.sqrt(5) - 1) / 2


@torch.inference_mode()
def sampled_moments(
    model: nn.Module, names: Sequence[str], calibration: Split, *, batch_size: int = 64
) -> dict[str, torch.Tensor]:
    """Gather the second moments of what each layer of a folded float network sees at a few positions of every image.

    Args:
        model: the network.
        names: its layers, convolutions or linear.
        calibration: the calibration images.
        batch_size: images per forward pass.

    Returns:
        layer name -> float64 tensor (G, K, K), the mean of x x' over the patches x that :func:`patches` takes; G is the
        number of groups and K the number of weights of one output channel.
    """
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(names, 0)
    images = len(calibration)

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen = patches(module, inputs[0], positions_per_image(module, images))
            sums[name] = sums.get(name, 0) + (seen @ seen.mT).double()
            counts[name] += seen.shape[-1]

        return hook

    with pre_hooks(model, {name: watch(name) for name in names}):
        predict(model, calibration, batch_size=batch_size)
    return {name: sums[name] / counts[name] for name in names}


def positions_per_image(module: nn.Module, images: int) -> int:
    """Return at how many positions of every image a layer is looked at, so that M rests on enough patches.

    Neighbouring patches of one image are nearly the same. So a few positions of all images tell what all positions do.
    """
    return math.ceil(max(PER_INPUT * module.weight[0].numel(), LEAST) / images)


def patches(module: nn.Conv2d | nn.Linear, x: torch.Tensor, positions: int) -> torch.Tensor:
    """Return what some outputs of a layer are products with, shape (G, K, patches).

    Args:
        module: a layer that pads by numbers of zeros, as those of a folded network do.
        x: its input, images in the first dimension.
        positions: how many of every image, scattered over it; all, if there are no more.
    """
    if isinstance(module, nn.Linear):
        rows = x.reshape(len(x), -1, x.shape[-1])
        return rows[:, _scattered(rows.shape[1], positions)].reshape(1, -1, x.shape[-1]).mT
    (down, right), sizes = module.padding, module.kernel_size
    views = F.pad(x, (right, right, down, down))
    for axis in (0, 1):
        views = views.unfold(2 + axis, module.dilation[axis] * (sizes[axis] - 1) + 1, module.stride[axis])
    views = views[..., :: module.dilation[0], :: module.dilation[1]]  # (N, C_in, H, W, *sizes), nothing copied yet
    at = _scattered(views.shape[2] * views.shape[3], positions)
    taken = views[:, :, at // views.shape[3], at % views.shape[3]]
    grouped = taken.reshape(len(x), module.groups, -1, len(at), sizes[0] * sizes[1])
    return grouped.permute(1, 2, 4, 0, 3).reshape(module.groups, -1, len(x) * len(at))


def _scattered(total: int, wanted: int) -> torch.Tensor:
    """Return `wanted` of the numbers below `total` (all, if there are no more), a golden section apart."""
    if wanted >= total:
        return torch.arange(total)
    stride = max(1, int(total * _GOLDEN))
    while math.gcd(stride, total) > 1:
        stride += 1
    return torch.arange(wanted) * stride % total
