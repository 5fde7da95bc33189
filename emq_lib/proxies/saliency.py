"""What zero-cost proxies say of a layer without looking at its bits, and how alike the outputs of layers are.

Each function returns one number per layer on a batch of images, or without images. Multiplied by the bits and summed,
they are the bit-weighted family of proxies. Explained in chapter 02.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError
from emq_lib.proxies.curvature import cross_entropy_seed, layer_outputs, loss_gradients

ZEN_NOISE = 1e-2


def positive_gradients(model: nn.Module, names: Sequence[str], input_shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Return dR/dW per layer, R the sum of outputs of the all-positive network on an all-ones image, (C_out, K).

    In double precision; needs no data. Nothing in that network is negative, so a ReLU passes all of it; a ReLU6 would
    saturate and stop every gradient, so it counts as a ReLU.
    """
    unbounded = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU6):
            unbounded.set_submodule(name, nn.ReLU())
    positive = {key: value.detach().double().abs() for key, value in model.state_dict().items()}
    tracked = [positive[f"{name}.weight"].requires_grad_(True) for name in names]
    ones = torch.ones(1, *input_shape, dtype=torch.float64, device=tracked[0].device)
    gradients = torch.autograd.grad(functional_call(unbounded, positive, (ones,)).sum(), tracked)
    return [gradient.flatten(1) for gradient in gradients]


def synflow(model: nn.Module, names: Sequence[str], input_shape: tuple[int, ...]) -> np.ndarray:
    """Return sum |W * dR/dW| per layer with the gradients above, shape (L,) (Tanaka et al. 2020)."""
    gradients = positive_gradients(model, names, input_shape)
    weights = [model.get_submodule(name).weight.detach().flatten(1) for name in names]
    return np.array([(w * g).abs().sum().item() for w, g in zip(weights, gradients, strict=True)])


def virtual_gradients(
    model: nn.Module, names: Sequence[str], input_shape: tuple[int, ...], images: int = 1
) -> list[torch.Tensor]:
    """Return dR/dW per layer, R the sum of outputs on all-ones images (EMQ's input "virtual gradient"), (C_out, K)."""
    weights = [model.get_submodule(name).weight for name in names]
    ones = torch.ones(images, *input_shape, device=weights[0].device)
    return [gradient.flatten(1) for gradient in torch.autograd.grad(model(ones).sum(), weights)]


def channel_products(model: nn.Module, names: Sequence[str], split: Split) -> list[torch.Tensor]:
    """Return sum_p a_ncp g_ncp per layer, a its output and g the gradient there, p over positions, shape (C_out, N)."""
    with layer_outputs(model, names) as seen:
        logits = model(split.inputs())
    outputs = [seen[name][1] for name in names]
    gradients = torch.autograd.grad(logits, outputs, grad_outputs=cross_entropy_seed(split.labels, logits.detach()))
    pairs = zip(outputs, gradients, strict=True)
    return [(channels_first(a) * channels_first(g)).sum(dim=2).detach().T for a, g in pairs]


def channel_fisher(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return sum_c mean_n 1/2 (sum_p a_ncp g_ncp)^2 per layer, shape (L,).

    The Fisher pruning score of Theis et al. 2018 as BlockSwap (Turner et al. 2020) uses it.
    """
    products = channel_products(model, names, split)
    return np.array([0.5 * product.double().square().sum().item() / len(split) for product in products])


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """Return a layer's output, (N, C, H, W), (N, C) or (N, tokens, C), as (N, C, positions)."""
    return x.flatten(2) if x.ndim == 4 else x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)


def grasp(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return -sum W * (H g) per layer, with H the Hessian of all named layers and g their gradient, shape (L,).

    Gradient signal preservation (Wang et al. 2020).
    """
    weight_of = {name: model.get_submodule(name).weight for name in names}
    gradients = loss_gradients(model, weight_of, split)
    product = sum((gradient * gradient.detach()).sum() for gradient in gradients)
    products = torch.autograd.grad(product, list(weight_of.values()))
    return np.array([-(w * hg).sum().item() for w, hg in zip(weight_of.values(), products, strict=True)])


def zico(model: nn.Module, names: Sequence[str], split: Split, *, batch_size: int = 32) -> np.ndarray:
    """Return log sum_w E|g_w| / std(g_w) per layer over the gradients of minibatches, shape (L,).

    Inverse coefficient of variation of gradients (Li et al. 2023); weights whose gradient never changes do not count.

    Raises:
        InvalidParameterError: fewer than two minibatches.
    """
    if len(split) < 2 * batch_size:
        raise InvalidParameterError(f"ZiCo needs two minibatches of {batch_size} images, got {len(split)} images.")
    weight_of = {name: model.get_submodule(name).weight for name in names}
    starts = range(0, len(split) - batch_size + 1, batch_size)
    per_batch = [loss_gradients(model, weight_of, split[start : start + batch_size]) for start in starts]
    found = []
    for gradients in zip(*per_batch, strict=True):
        stack = torch.stack([gradient.detach() for gradient in gradients]).double()
        std = stack.std(dim=0, correction=0)
        changes = std > 0
        found.append((stack.abs().mean(dim=0)[changes] / std[changes]).sum().log().item())
    return np.array(found)


@torch.inference_mode()
def zen(
    model: nn.Module, names: Sequence[str], input_shape: tuple[int, ...], *, images: int, generator: torch.Generator
) -> np.ndarray:
    """Return how much a layer's output answers to noise at the network's input, E|f(x + e z) - f(x)| / e, shape (L,).

    x and z are Gaussian, e is .01: the gain whose logarithm is the expressivity of Lin et al. 2021. Needs no data.
    """
    device = next(model.parameters()).device
    x, z = (torch.randn(images, *input_shape, generator=generator).to(device) for _ in range(2))
    found = []
    with layer_outputs(model, names) as seen:
        for inputs in (x, x + ZEN_NOISE * z):
            model(inputs)
            found.append([seen[name][1].double() for name in names])
    return np.array([((b - a).abs().mean() / ZEN_NOISE).item() for a, b in zip(*found, strict=True)])


@torch.inference_mode()
def nwot(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return log |det K| per layer, K_ij the number of outputs that are positive for both or neither of two images.

    Neural architecture search without training (Mellor et al. 2021), one layer at a time, shape (L,). Images whose
    outputs agree in every sign make K singular and the score minus infinity, so they are counted once.
    """
    with layer_outputs(model, names) as seen:
        model(split.inputs())
    found = []
    for name in names:
        codes = torch.unique((seen[name][1].flatten(1) > 0).double(), dim=0)
        kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
        found.append(torch.linalg.slogdet(kernel)[1].item())
    return np.array(found)


@torch.inference_mode()
def linear_cka(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return how alike the outputs of any two layers are: centred linear CKA (Kornblith et al. 2019), shape (L, L).

    tr(K_i K_j) / sqrt(tr(K_i K_i) tr(K_j K_j)) with the centred Gram matrices K of the images.
    """
    with layer_outputs(model, names) as seen:
        model(split.inputs())
    grams = []
    for name in names:
        features = seen[name][1].flatten(1)
        features = features - features.mean(dim=0)
        gram = (features @ features.T).double().flatten()
        grams.append(F.normalize(gram, dim=0))
    stack = torch.stack(grams)
    return (stack @ stack.T).cpu().numpy()
