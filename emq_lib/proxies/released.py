"""What the released EMQ code reads, slips included: a random network, one conv after another, bits in another order.

The release (github.com/lilujunai/EMQ-series, commit 443147b) scores configurations with a network of random weights. It
lists the convolutions in module order, with the stem and the shortcuts', without the classifier, and takes the j-th bit
of a configuration for the j-th of a list that is longer, shorter or reversed. Explained in the appendix "As released".
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.proxies import curvature, saliency
from emq_lib.proxies.gradients import named_layers

IMAGES = 128  # the release's batch
QE_RATIOS = (0.0, 0.0, 1.0, 1.0, 6.0)  # weights of five stages in the released QE score


@dataclass(frozen=True)
class ReleasedStatistics:
    """Numbers of the M convolutions of a random network, in module order.

    Attributes:
        eigenvalue: largest eigenvalue of the Hessian's block, shape (M,).
        trace: trace of the block, shape (M,).
        similarity: summed CKA with the other convolutions, shape (M,).
        snip: sum |W * G|, shape (M,).
        synflow: sum |W * dR/dW| with all weights drawn afresh from N(0, 1), shape (M,).
        gradient_branch: mean(softmax(log|b VG|)) per convolution and choice, the first factor of the released EMQ
            proxy, shape (M, B).
        weight_branch: mean(sqrt(relu(b W))), its second factor, shape (M, B).
        in_block: bool, shape (M,): neither the stem nor a shortcut's.
        stage: resolution stage counted from the network's end, 0 is the last, shape (M,).
        seconds: wall time of all of it.
    """

    eigenvalue: np.ndarray
    trace: np.ndarray
    similarity: np.ndarray
    snip: np.ndarray
    synflow: np.ndarray
    gradient_branch: np.ndarray
    weight_branch: np.ndarray
    in_block: np.ndarray
    stage: np.ndarray
    seconds: float


def measure_released(
    model: torch.fx.GraphModule,
    layers: pd.DataFrame,
    split: Split,
    *,
    choices: Sequence[int],
    shortcuts: Sequence[str],
    streams: Callable[[str], torch.Generator],
) -> ReleasedStatistics:
    """Measure a network with fresh random weights as the release does.

    Args:
        model: network with random weights and folded batch norm, on the device of the images.
        layers: its layer table.
        split: images and labels, of which the first 128 are used.
        choices: the B allowed widths.
        shortcuts: names of the convolutions beside a block.
        streams: name of what is drawn ("released traces", "released Synflow weights") -> source of randomness.

    Raises:
        InvalidParameterError, UnsupportedModelError: see the functions of :mod:`~emq_lib.proxies.curvature` and
            :mod:`~emq_lib.proxies.saliency`; or the network has no convolution.
    """
    started = time.perf_counter()
    convs = layers[layers["kind"] == "Conv2d"].reset_index(drop=True)
    names, batch, shape = list(convs["name"]), split[:IMAGES], tuple(split.images.shape[1:])
    weights = [layer.weight.detach().flatten(1) for layer in named_layers(model, names).values()]
    gradients, _ = curvature.gradient_moments(model, names, batch)
    snip = np.array([(w * g).abs().sum().item() for w, g in zip(weights, gradients, strict=True)])
    trace, _ = curvature.hessian_traces(model, names, batch, generator=streams("released traces"))
    eigenvalue = curvature.top_eigenvalues(model, names, batch)
    similarity = saliency.linear_cka(model, names, batch).sum(axis=1) - 1
    virtual = saliency.virtual_gradients(model, names, shape, images=len(batch))
    bits = torch.tensor(choices, dtype=torch.float64, device=weights[0].device)[:, None, None]
    shares = [torch.where(v == 0, 1.0, (bits * v.double()).abs()).log().softmax(dim=1) for v in virtual]
    weight_branch = [(bits * w.double()).clamp(min=0).sqrt().mean(dim=(1, 2)) for w in weights]
    redrawn = _with_normal_weights(model, streams("released Synflow weights"))
    return ReleasedStatistics(
        eigenvalue=eigenvalue,
        trace=trace,
        similarity=similarity,
        snip=snip,
        synflow=saliency.synflow(redrawn, names, shape),
        gradient_branch=torch.stack([share.mean(dim=(1, 2)) for share in shares]).cpu().numpy(),
        weight_branch=torch.stack(weight_branch).cpu().numpy(),
        in_block=~convs["name"].isin([names[0], *shortcuts]).to_numpy(),
        stage=stages((convs["macs"] / convs["parameters"]).to_numpy()),
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def _with_normal_weights(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy of a network with all weights drawn afresh from N(0, 1)."""
    redrawn = copy.deepcopy(model)
    for module in redrawn.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            drawn = torch.randn(module.weight.shape, generator=generator, device=generator.device)
            module.weight.copy_(drawn)
    return redrawn


def stages(positions: np.ndarray) -> np.ndarray:
    """Return each layer's stage, counted from the last: how many smaller resolutions there are, shape (M,).

    >>> stages(np.array([1024, 1024, 256, 256, 64]))
    array([2, 2, 1, 1, 0])
    """
    return np.searchsorted(np.unique(positions), positions)


def align(values: np.ndarray, slots: int) -> np.ndarray:
    """Give the j-th bit the j-th row of a list, as zip does: what is missing is zero, what is left over is dropped."""
    rows = np.zeros((slots, *values.shape[1:]))
    rows[: len(values)] = values[:slots]
    return rows
