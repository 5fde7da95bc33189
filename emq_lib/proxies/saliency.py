"""What zero-cost proxies say of a layer without looking at its bits, and how alike the outputs of layers are.

Each function returns one number per layer on a batch of images, or without images. Multiplied by the bits and summed,
they are the bit-weighted family of proxies. Explained in chapter 02.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.checks import whole_number
from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.proxies.gradients import (
    batches,
    cross_entropy_seed,
    gradients_at,
    layer_outputs,
    logits_of,
    loss_gradients,
    named_layers,
    trainable_weights,
)

ZEN_NOISE = 1e-2


def positive_gradients(model: nn.Module, names: Sequence[str], input_shape: Sequence[int]) -> list[torch.Tensor]:
    """Return dR/dW per layer, R the sum of outputs of the all-positive network on an all-ones image, (C_out, K).

    In double precision: R is a product over all layers, which passes the largest float32 at about 40 of them. Needs no
    data. Nothing in that network is negative, so a ReLU passes all of it; a ReLU6 would saturate and stop every
    gradient, so it counts as a ReLU.

    Args:
        model: the network.
        names: L layers.
        input_shape: (C, H, W).

    Returns:
        L float64 tensors.

    Raises:
        InvalidParameterError, UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.named_layers`.
        UnsupportedModelError: the output does not depend on a layer, or a gradient is too large for double precision.
    """
    named_layers(model, names)
    positive = _unbounded(model)
    with torch.no_grad():
        for tensor in (*positive.parameters(), *positive.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    weights = {name: positive.get_submodule(name).weight.requires_grad_() for name in names}
    gradients = gradients_at(positive(_ones(weights, 1, input_shape)).sum(), weights)
    for name, gradient in zip(names, gradients, strict=True):
        if not torch.isfinite(gradient).all():
            raise UnsupportedModelError(f"Synflow's gradient at layer {name!r} is too large for double precision.")
    return [gradient.flatten(1) for gradient in gradients]


def _unbounded(model: nn.Module) -> nn.Module:
    """Return a copy in double precision in which every ReLU6 is a ReLU."""
    unbounded = copy.deepcopy(model).double()
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU6):
            unbounded.set_submodule(name, nn.ReLU())
    if isinstance(unbounded, torch.fx.GraphModule):
        for node in unbounded.graph.nodes:
            if node.target is F.relu6:
                node.target = F.relu
        unbounded.recompile()
    return unbounded


def _ones(weights: Mapping[str, torch.Tensor], images: int, input_shape: Sequence[int]) -> torch.Tensor:
    """Return all-ones images, of the weights' type and on their device."""
    return next(iter(weights.values())).new_ones(images, *input_shape)


def synflow(model: nn.Module, names: Sequence[str], input_shape: Sequence[int]) -> np.ndarray:
    """Return sum |W * dR/dW| per layer with the gradients above, float64, shape (L,) (Tanaka et al. 2020).

    Arguments and errors are those of :func:`positive_gradients`.
    """
    gradients = positive_gradients(model, names, input_shape)
    weights = [layer.weight.detach().flatten(1) for layer in named_layers(model, names).values()]
    return np.array([(w * g).abs().sum().item() for w, g in zip(weights, gradients, strict=True)])


def virtual_gradients(
    model: nn.Module, names: Sequence[str], input_shape: Sequence[int], images: int = 1
) -> list[torch.Tensor]:
    """Return dR/dW per layer, R the sum of outputs on all-ones images (EMQ's input "virtual gradient"), (C_out, K).

    Args:
        model: the network.
        names: L layers.
        input_shape: (C, H, W).
        images: how many all-ones images R sums over.

    Raises:
        InvalidParameterError: fewer than one image.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.trainable_weights`; or the output does not depend
            on a layer.
    """
    weights = trainable_weights(model, names)
    inputs = _ones(weights, whole_number(images, "the number of images", 1), input_shape)
    return [gradient.flatten(1) for gradient in gradients_at(model(inputs).sum(), weights)]


def channel_products(model: nn.Module, names: Sequence[str], split: Split) -> list[torch.Tensor]:
    """Return sum_p a_ncp g_ncp per layer, a its output and g the gradient there, p over positions, shape (C_out, N).

    g is that of the summed cross-entropy, so of each image's own.

    Args:
        model: the network.
        names: L layers.
        split: N images and labels, which go through the network at once.

    Raises:
        InvalidParameterError: no images, or a label that is none of the classes.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.layer_outputs`; or the output does not depend on a
            layer.
    """
    with layer_outputs(model, names) as outputs:
        logits = logits_of(model, split.inputs())
    outputs = {name: outputs[name] for name in names}
    (seed,) = cross_entropy_seed(split.labels, logits.detach())
    pairs = zip(outputs.values(), gradients_at(logits, outputs, seed=seed), strict=True)
    return [(channels_first(a) * channels_first(g)).sum(dim=2).detach().T for a, g in pairs]


def channel_fisher(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return sum_c mean_n 1/2 (sum_p a_ncp g_ncp)^2 per layer, float64, shape (L,).

    The Fisher pruning score of Theis et al. 2018 as BlockSwap (Turner et al. 2020) uses it. Arguments and errors are
    those of :func:`channel_products`.
    """
    products = channel_products(model, names, split)
    return np.array([0.5 * product.double().square().sum().item() / len(split) for product in products])


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """Return a layer's output, (N, C, H, W), (N, C) or (N, tokens, C), as (N, C, positions)."""
    return x.flatten(2) if x.ndim == 4 else x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)


def grasp(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return -sum W * (H g) per layer, with H the Hessian of all named layers and g their gradient, shape (L,).

    Gradient signal preservation (Wang et al. 2020), of the mean cross-entropy.

    Args:
        model: the network.
        names: L layers.
        split: images and labels, which go through the network at once.

    Raises:
        InvalidParameterError: no images, or a label that is none of the classes.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.trainable_weights`; or the output or the gradient
            does not depend on a layer.
    """
    weight_of = trainable_weights(model, names)
    gradients = loss_gradients(model, weight_of, split)
    products = gradients_at(sum((gradient * gradient.detach()).sum() for gradient in gradients), weight_of)
    return np.array([-(w * hg).sum().item() for w, hg in zip(weight_of.values(), products, strict=True)])


def zico(model: nn.Module, names: Sequence[str], split: Split, *, batch_size: int = 32) -> np.ndarray:
    """Return log sum_w E|g_w| / std(g_w) per layer over the gradients of minibatches, float64, shape (L,).

    Inverse coefficient of variation of gradients (Li et al. 2023); weights whose gradient never changes do not count,
    and a layer of nothing else scores minus infinity.

    Args:
        model: the network.
        names: L layers.
        split: images and labels; those that do not fill a minibatch are left out.
        batch_size: images per minibatch.

    Raises:
        InvalidParameterError: fewer than two minibatches, or a label that is none of the classes.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.trainable_weights`; or the output does not depend
            on a layer.
    """
    weight_of = trainable_weights(model, names)
    whole = [batch for batch in batches(split, batch_size) if len(batch) == batch_size]
    if len(whole) < 2:
        raise InvalidParameterError(f"ZiCo needs two minibatches of {batch_size} images, got {len(split)} images.")
    per_batch = [[g.detach() for g in loss_gradients(model, weight_of, batch)] for batch in whole]
    found = []
    for gradients in zip(*per_batch, strict=True):
        stack = torch.stack(gradients).double()
        std = stack.std(dim=0, correction=0)
        changes = std > 0
        found.append((stack.abs().mean(dim=0)[changes] / std[changes]).sum().log().item())
    return np.array(found)


@torch.inference_mode()
def zen(
    model: nn.Module, names: Sequence[str], input_shape: Sequence[int], *, images: int, generator: torch.Generator
) -> np.ndarray:
    """Return how much a layer's output answers to noise at the network's input, E|f(x + e z) - f(x)| / e, shape (L,).

    x and z are Gaussian, e is .01: the gain whose logarithm is the expressivity of Lin et al. 2021. Needs no data.

    Args:
        model: the network.
        names: L layers.
        input_shape: (C, H, W).
        images: how many x, and as many z.
        generator: source of x and z.

    Raises:
        InvalidParameterError: fewer than one image.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.layer_outputs`.
    """
    shape = (whole_number(images, "the number of images", 1), *input_shape)
    device = next(iter(named_layers(model, names).values())).weight.device
    x, z = (torch.randn(shape, generator=generator, device=generator.device).to(device) for _ in range(2))
    found = []
    for inputs in (x, x + ZEN_NOISE * z):
        with layer_outputs(model, names) as outputs:
            model(inputs)
        found.append([outputs[name].double() for name in names])
    return np.array([((b - a).abs().mean() / ZEN_NOISE).item() for a, b in zip(*found, strict=True)])


@torch.inference_mode()
def nwot(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return log |det K| per layer, K_ij the number of outputs that are positive for both or neither of two images.

    Neural architecture search without training (Mellor et al. 2021), one layer at a time. Images whose outputs agree in
    every sign make K singular and the score minus infinity, so they are counted once.

    Args:
        model: the network.
        names: L layers.
        split: images, which go through the network at once.

    Returns:
        float64 array of shape (L,).

    Raises:
        InvalidParameterError: no images.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.layer_outputs`.
    """
    with layer_outputs(model, names) as outputs:
        logits_of(model, split.inputs())
    found = []
    for name in names:
        codes = torch.unique((outputs[name].flatten(1) > 0).double(), dim=0)
        kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
        found.append(torch.linalg.slogdet(kernel)[1].item())
    return np.array(found)


@torch.inference_mode()
def linear_cka(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return how alike the outputs of any two layers are: centred linear CKA (Kornblith et al. 2019), shape (L, L).

    tr(K_i K_j) / sqrt(tr(K_i K_i) tr(K_j K_j)) with the centred Gram matrices K of the images.

    Args:
        model: the network.
        names: L layers.
        split: images, which go through the network at once.

    Raises:
        InvalidParameterError: no images.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.layer_outputs`; or a layer's outputs are the same
            for all images, so that they are like nothing.
    """
    with layer_outputs(model, names) as outputs:
        logits_of(model, split.inputs())
    grams = []
    for name in names:
        features = outputs[name].flatten(1).double()  # images may differ in the last digits of float32 only
        features = features - features.mean(dim=0)
        gram = (features @ features.T).flatten()
        if not gram.any():
            raise UnsupportedModelError(f"Layer {name!r} has the same output for all {len(split)} images.")
        grams.append(gram / gram.norm())
    stack = torch.stack(grams)
    return (stack @ stack.T).cpu().numpy()
