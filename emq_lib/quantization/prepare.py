"""A caller's network and images, checked, as the rest of the library works on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from emq_lib.core.datasets import Inputs, Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.networks import QuantizedLayer
from emq_lib.core.quantizers import ActivationRange


def prepared(
    model: nn.Module, calibration: torch.Tensor | Split
) -> tuple[torch.fx.GraphModule, Split | Inputs, torch.Tensor]:
    """Return a folded copy of the network, its calibration images, and one input that it takes.

    Neither the network nor the images are changed.

    Args:
        model: the float network.
        calibration: float32 inputs of shape (N, ...) as the network takes them, or a split.

    Raises:
        InvalidParameterError: no network; images that are none, hold NaN or infinity, or that the network does not
            take.
        UnsupportedModelError: see :func:`folded_copy`; a network that does not return one tensor with a row per image.
    """
    images = checked_images(calibration)
    folded = folded_copy(model)
    return folded, images, _example(folded, images)


def folded_copy(model: nn.Module) -> torch.fx.GraphModule:
    """Return a copy with folded batch norm and plain weights: pruning and parametrizations are made permanent.

    Args:
        model: the float network; it stays as it is.

    Raises:
        InvalidParameterError: no network.
        UnsupportedModelError: the network is quantized already, is not of float32, cannot be copied or traced.
    """
    check_float(model)
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:  # tensors with a history have no copies: torch says which
        raise UnsupportedModelError(
            f"The network cannot be copied ({error}). Make pruning permanent first, as by torch.nn.utils.prune.remove."
        ) from error
    for module in list(copied.modules()):
        if parametrize.is_parametrized(module):
            _make_plain(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return fold_batchnorm(copied)


def _make_plain(module: nn.Module) -> None:
    """Take the parametrizations of a copied module away; torch's own way would change the class of the original too."""
    tensors = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor))


def check_float(model: nn.Module) -> None:
    """Check that a network is one, in floating point of 32 bits.

    Raises:
        InvalidParameterError: it is no network.
        UnsupportedModelError: it is quantized already, or holds other floating-point types.
    """
    if not isinstance(model, nn.Module):
        raise InvalidParameterError(f"model must be a torch.nn.Module, got {model!r:.60}.")
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "The network has quantized layers already: a network is quantized once. Pass the float network."
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            raise UnsupportedModelError(
                f"{name!r} is of {tensor.dtype}; the network must be of float32: model.float()."
            )


def check_layers(model: nn.Module, layers: pd.DataFrame, ranges: Mapping[str, ActivationRange] | None = None) -> None:
    """Check that a float network has the layers of a table, and that every one has a range if there are some.

    Args:
        model: the network.
        layers: its layer table.
        ranges: layer name -> range of its input.

    Raises:
        InvalidParameterError: a layer without a range.
        UnsupportedModelError: a layer that the network does not have, or not as a convolution that pads by numbers of
            zeros or a linear layer; see :func:`check_float`.
    """
    check_float(model)
    modules = dict(model.named_modules())
    for name in layers["name"]:
        layer = modules.get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise UnsupportedModelError(
                f"The network has no convolution or linear layer {name!r}: the layer table is of another network."
            )
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            raise UnsupportedModelError(
                f"The padding of layer {name!r} is not by numbers of zeros. Take what fold_batchnorm returns."
            )
    if ranges is not None and (absent := [name for name in layers["name"] if name not in ranges]):
        raise InvalidParameterError(f"Layer {absent[0]!r} has no range: see choose_activation_ranges.")


def check_generator(generator: torch.Generator) -> None:
    """Check that a source of randomness is one, on the CPU.

    Raises:
        InvalidParameterError: it is not.
    """
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise InvalidParameterError(
            f"generator must be a torch.Generator on the CPU, as Generator().manual_seed(0); got {generator!r:.60}."
        )


@torch.inference_mode()
def check_labels(model: nn.Module, images: Split) -> None:
    """Check that a network can be trained on images with labels.

    Args:
        model: the network; it sees one image.
        images: the images.

    Raises:
        InvalidParameterError: no images; labels beyond the network's classes.
    """
    if not isinstance(images, Split):
        raise InvalidParameterError(f"Training takes images and labels, a Split; got {type(images).__name__}.")
    checked_images(images)
    classes = model(images[:1].inputs()).shape[-1]
    if (last := int(images.labels.max())) >= classes:
        raise InvalidParameterError(f"labels must lie in 0 to {classes - 1}, the network's classes; there is {last}.")


def checked_images(calibration: torch.Tensor | Split) -> Split | Inputs:
    """Return calibration images after checking that there are some, and that all are finite.

    Raises:
        InvalidParameterError: they are not, or are neither a float32 tensor nor a split.
    """
    if isinstance(calibration, torch.Tensor):
        if calibration.dtype != torch.float32:
            raise InvalidParameterError(
                f"calibration must be of float32, as the network takes its inputs; got {calibration.dtype}."
            )
        calibration = Inputs(calibration.detach())
    if not isinstance(calibration, Split | Inputs):
        raise InvalidParameterError(
            f"calibration must be a float32 tensor of shape (N, C, H, W) or a Split, got {type(calibration).__name__}."
        )
    tensor = calibration.inputs()
    if not tensor.ndim or not len(tensor) or not torch.isfinite(tensor).all():
        raise InvalidParameterError("The calibration images must be one or more, and hold no NaN or infinity.")
    return calibration


def _example(folded: nn.Module, images: Split | Inputs) -> torch.Tensor:
    """Return one input after checking that the network takes it, and gives one row for it."""
    example = images[:1].inputs()
    try:
        with torch.inference_mode():
            logits = folded(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InvalidParameterError(
            f"The network does not take calibration images of shape {tuple(example.shape[1:])} ({error})."
        ) from error
    if not isinstance(logits, torch.Tensor) or not logits.ndim or len(logits) != 1:
        raise UnsupportedModelError(
            f"The network must return one tensor with a row per image, and returns {_described(logits)} for one image. "
            "Wrap it in a module that returns the logits."
        )
    return example


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
