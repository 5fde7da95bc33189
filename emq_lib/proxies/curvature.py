"""Curvature at the weights of each layer: gradients image by image, Fisher diagonals, traces and top eigenvalues.

The logits of a network of linear layers, ReLUs, sums and averages are piecewise linear in the weight of any one layer.
So that layer's block of the Hessian of the cross-entropy is J' S J almost everywhere, with J the Jacobian of the logits
and S = diag(p) - p p' the Hessian of the cross-entropy there. S = sum_k s_k s_k', s_k = sqrt(p_k) (e_k - p):
one backward pass per class and image gives the rows J' s_k, and everything about the block with them. Other networks
(attention, smooth activations) get Hessian-vector products. Explained in chapter 02.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh, svds
from torch import nn

from emq_lib.core.checks import whole_number
from emq_lib.core.datasets import Split
from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.graphs import is_piecewise_linear
from emq_lib.proxies.gradients import (
    batches,
    cross_entropy_seed,
    logits_of,
    loss_gradients,
    named_layers,
    per_image_gradients,
    trainable_weights,
)

COMBINATIONS = 2  # of the classes at random: a fifth of the time of ten classes, a tenth more standard error
PROBES = 8
MOST_CLASSES = 100  # whose rows J' s_k are worth holding
ROW_BYTES = 2 * 2**30  # rows J' s_k that are held at a time


def gradient_moments(
    model: nn.Module, names: Sequence[str], split: Split, *, batch_size: int = 32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the mean and the mean square over images of the cross-entropy's gradient, per named layer.

    The mean is G; the mean square is the diagonal of the empirical Fisher matrix, H = (1/N) sum_n (dl_n/dW)^2, with the
    true labels.

    Args:
        model: the network.
        names: L layers.
        split: N images and labels.
        batch_size: images per forward pass.

    Returns:
        two lists of L tensors (C_out, K).

    Raises:
        InvalidParameterError: no images, a batch size below one, or a label that is none of the classes.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.per_image_gradients`.
    """
    first: list = [0.0] * len(names)
    second: list = [0.0] * len(names)
    for batch in batches(split, batch_size):
        seeds = functools.partial(cross_entropy_seed, batch.labels)
        for gradients in per_image_gradients(model, names, batch.inputs(), seeds):
            first = [total + g.sum(dim=0) / len(split) for total, g in zip(first, gradients, strict=True)]
            second = [total + g.square().sum(dim=0) / len(split) for total, g in zip(second, gradients, strict=True)]
    return first, second


def hessian_traces(
    model: nn.Module,
    names: Sequence[str],
    split: Split,
    *,
    generator: torch.Generator,
    combinations: int | None = COMBINATIONS,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the trace of each layer's block of the Hessian of the mean cross-entropy, and its standard error.

    For piecewise linear networks tr H_l = (1/N) sum_n sum_k ||J' s_k||^2: one backward pass per class gives the traces
    of all layers without the noise of random probes. A combination of the s_k with random signs, new ones for every
    image, has the same expected square, and two of them cost two passes. Other networks: :func:`hutchinson_traces`.

    Args:
        model: the network.
        names: L layers.
        split: images and labels.
        generator: source of the random signs; unused for every class of a piecewise linear network.
        combinations: random combinations of the classes for each image; None: every class.
        batch_size: images per forward pass.

    Returns:
        two float64 arrays of shape (L,). The standard error is that of the mean over images.

    Raises:
        InvalidParameterError: fewer than two images, or a batch size or combinations below one.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.per_image_gradients`.
    """
    whole_number(len(split), "the number of images that the standard error of a trace is taken over", 2)
    if not _is_piecewise_linear(model):
        return hutchinson_traces(model, names, split, generator=generator, batch_size=batch_size)
    seeds = _class_seeds
    if combinations is not None:
        count = whole_number(combinations, "the number of combinations", 1)
        seeds = functools.partial(_drawn_seeds, combinations=count, generator=generator)
    per_image = []
    for batch in batches(split, batch_size):
        squares = [
            torch.stack([g.double().square().sum(dim=(1, 2)) for g in gradients])
            for gradients in per_image_gradients(model, names, batch.inputs(), seeds)
        ]
        per_image.append(torch.stack(squares).sum(dim=0))
    traces = torch.cat(per_image, dim=1)
    return traces.mean(dim=1).cpu().numpy(), (traces.std(dim=1) / len(split) ** 0.5).cpu().numpy()


def _is_piecewise_linear(model: nn.Module) -> bool:
    return isinstance(model, torch.fx.GraphModule) and is_piecewise_linear(model)


def _class_seeds(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return vectors s_k, each (N, classes), whose outer products add up to the cross-entropy's Hessian there."""
    return _combined(logits, torch.eye(logits.shape[1], device=logits.device)[:, None])


def _drawn_seeds(logits: torch.Tensor, *, combinations: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Return random combinations of the s_k, each (N, classes), whose outer products add up to it in expectation."""
    return _combined(logits, _signs((combinations, *logits.shape), generator).to(logits) / combinations**0.5)


def _combined(logits: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """Return sums of the s_k with each of some weights, shape (M, N or 1, classes)."""
    p = logits.softmax(dim=1)
    return [root - p * root.sum(dim=1, keepdim=True) for root in weights * p.sqrt()]


def _signs(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Draw -1 and 1, on the generator's device, so that a stream on the CPU gives a GPU the same signs."""
    return 2 * torch.randint(0, 2, tuple(shape), generator=generator, device=generator.device) - 1


def hutchinson_traces(
    model: nn.Module,
    names: Sequence[str],
    split: Split,
    *,
    generator: torch.Generator,
    probes: int = PROBES,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the trace of each layer's block of the Hessian with random signs v: E v' H v = tr H (Hutchinson 1990).

    For any twice differentiable network. Every layer has its own products: one product with the whole Hessian would
    cost less, but its estimates of single layers carry the noise of all blocks between layers.

    Args:
        model: the network.
        names: L layers.
        split: images and labels.
        generator: source of the random signs.
        probes: random vectors per layer and batch, multiplied together.
        batch_size: images per forward pass.

    Returns:
        two float64 arrays of shape (L,): the estimate, and its standard error over batches (NaN if there is only one),
        each with its own images and probes.

    Raises:
        InvalidParameterError: no images, a batch size or probes below one, or a label that is none of the classes.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.trainable_weights`; or the output does not depend
            on a layer.
    """
    probes = whole_number(probes, "the number of probes", 1)
    sums, counts, weight_of = [], [], trainable_weights(model, names)
    for batch in batches(split, batch_size):
        counts.append(len(batch))
        gradients = loss_gradients(model, weight_of, batch)
        for weight, gradient in zip(weight_of.values(), gradients, strict=True):
            signs = _signs((probes, *weight.shape), generator).to(weight)
            products = torch.stack([_product(gradient, weight, v) for v in signs])
            sums.append(len(batch) * (signs * products).double().sum().item() / probes)
    per_batch = np.array(sums).reshape(-1, len(names))
    estimate = per_batch.sum(axis=0) / len(split)
    left = per_batch - np.array(counts)[:, None] * estimate
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt((left**2).sum(axis=0) * len(counts) / (len(counts) - np.float64(1))) / len(split)
    return estimate, error


def _product(gradient: torch.Tensor, weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Return the product of a layer's block of the Hessian with a vector; zero if the gradient is constant."""
    if not gradient.requires_grad:
        return torch.zeros_like(weight)
    product = torch.autograd.grad(gradient, weight, grad_outputs=vector, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(weight) if product is None else product


def top_eigenvalues(model: nn.Module, names: Sequence[str], split: Split, *, batch_size: int = 32) -> np.ndarray:
    """Return the largest eigenvalue of each layer's block of the Hessian of the mean cross-entropy, shape (L,).

    The block of a piecewise linear network is R' R / N, with R the rows J' s_k of all images and classes: its largest
    eigenvalue is the square of R's largest singular value, over N. For other networks, or more than 100 classes, the
    Lanczos method on Hessian-vector products.

    Args:
        model: the network.
        names: L layers.
        split: images and labels, all of which are used.
        batch_size: images per forward pass.

    Raises:
        InvalidParameterError: no images, or a batch size below one.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.per_image_gradients`.
    """
    sizes = [layer.weight.numel() for layer in named_layers(model, names).values()]
    whole_number(batch_size, "a batch size", 1)
    with torch.no_grad():
        classes = logits_of(model, split[:1].inputs()).shape[1]
    if not _is_piecewise_linear(model) or classes > MOST_CLASSES:
        return _lanczos(model, names, split)
    row_bytes = 4 * len(split) * classes
    found: list[float] = []
    while len(found) < len(names):
        rest = np.cumsum([size * row_bytes for size in sizes[len(found) :]])
        group = names[len(found) :][: max(1, int((rest <= ROW_BYTES).sum()))]
        rows: list[list[torch.Tensor]] = [[] for _ in group]
        for batch in batches(split, batch_size):
            for gradients in per_image_gradients(model, group, batch.inputs(), _class_seeds):
                for layer, gradient in zip(rows, gradients, strict=True):
                    layer.append(gradient.flatten(1).cpu())
        for name, layer in zip(group, rows, strict=True):
            found.append(_largest_singular_value(torch.cat(layer).numpy(), name) ** 2 / len(split))
    return np.array(found)


def _largest_singular_value(matrix: np.ndarray, name: str) -> float:
    if not np.isfinite(matrix).all():
        raise UnsupportedModelError(f"Gradients at layer {name!r} hold NaN or infinity; look at its activations.")
    if min(matrix.shape) == 1 or not matrix.any():  # for which ARPACK has no start
        return float(np.linalg.norm(matrix))
    settings = {"v0": np.ones(min(matrix.shape)), "rng": np.random.default_rng(0)}  # the same answer every time
    return float(svds(matrix, k=1, return_singular_vectors=False, **settings)[0])


def _lanczos(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return each block's largest eigenvalue from products with it."""
    weight_of = trainable_weights(model, names)
    gradients = loss_gradients(model, weight_of, split)

    def largest(weight: nn.Parameter, gradient: torch.Tensor) -> float:
        def product(vector: np.ndarray) -> np.ndarray:
            direction = torch.from_numpy(vector.astype(np.float32)).view(weight.shape).to(weight.device)
            return _product(gradient, weight, direction).double().cpu().flatten().numpy()

        first = product(start := np.ones(weight.numel()))
        if not np.isfinite(first).all():
            raise UnsupportedModelError("The Hessian holds NaN or infinity; look at the network's activations.")
        if len(start) == 1 or not first.any():  # for which ARPACK has no start
            return float(first[0])
        operator = LinearOperator((len(start),) * 2, matvec=product, dtype=np.float64)
        settings = {"v0": start, "tol": 1e-4, "rng": np.random.default_rng(0)}  # the same answer every time
        return float(eigsh(operator, k=1, which="LA", return_eigenvectors=False, **settings)[0])

    return np.array([largest(*pair) for pair in zip(weight_of.values(), gradients, strict=True)])
