"""A caller's network and images, as the rest of the library works on them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from emq_lib.core.datasets import Inputs, Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import fold_batchnorm


def _prepared(
    model: nn.Module, calibration: torch.Tensor | Split
) -> tuple[torch.fx.GraphModule, Split | Inputs, torch.Tensor]:
    """Return a folded copy of the network, its calibration images, and one input that it takes."""
    images = calibration if isinstance(calibration, Split) else Inputs(calibration)
    folded = _traced(model)
    return folded, images, _example(folded, images)


def _traced(model: nn.Module) -> torch.fx.GraphModule:
    """Return a folded copy."""
    try:
        return fold_batchnorm(copy.deepcopy(model))
    except (torch.fx.proxy.TraceError, TypeError) as error:
        raise UnsupportedModelError(
            f"torch.fx cannot trace the network ({error}). Control flow that depends on values has to go."
        ) from error


def _example(folded: nn.Module, images: Split | Inputs) -> torch.Tensor:
    """Return one input after checking that all are finite and that the network takes them."""
    if not len(images) or not torch.isfinite(images.inputs()).all():
        raise InvalidParameterError("The calibration images must be one or more, and hold no NaN or infinity.")
    example = images[:1].inputs()
    try:
        with torch.inference_mode():
            folded(example)
    except RuntimeError as error:
        raise InvalidParameterError(
            f"The network does not take calibration images of shape {tuple(example.shape[1:])} ({error})."
        ) from error
    return example
