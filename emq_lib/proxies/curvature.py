"""Curvature at the weights of each layer: gradients image by image, Fisher diagonals, traces and top eigenvalues.

The logits of a network of linear layers, ReLUs, sums and averages are piecewise linear in the weight of any one layer.
So that layer's block of the Hessian of the cross-entropy is J' S J almost everywhere, with J the Jacobian of the logits
and S = diag(p) - p p' the Hessian of the cross-entropy there. S = sum_k s_k s_k', s_k = sqrt(p_k) (e_k - p):
one backward pass per class and image gives the rows J' s_k, and everything about the block with them. Other networks
(attention, smooth activations) get Hessian-vector products. Explained in chapter 02.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh, svds
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import is_piecewise_linear

COMBINATIONS = 2  # of the classes at random: a fifth of the time of ten classes, a tenth more standard error
PROBES = 8
MOST_CLASSES = 100  # whose rows J' s_k are worth holding
ROW_BYTES = 2 * 2**30  # rows J' s_k that are held at a time


def per_image_gradients(
    model: nn.Module,
    names: Sequence[str],
    inputs: torch.Tensor,
    seeds: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> Iterator[list[torch.Tensor]]:
    """Yield, per seed, each named layer's weight gradient for every single image.

    One forward pass serves all seeds. A layer's gradient for one image is the product of the gradient at its output
    with the input that each output position sees, so that a batched matrix product gives those of all images.

    Args:
        model: the network.
        names: layers, convolutions or linear.
        inputs: shape (N, C, H, W).
        seeds: logits (N, classes) -> gradients at the logits, each (N, classes).

    Yields:
        one tensor (N, C_out, K) per layer.

    Raises:
        UnsupportedModelError: the output does not depend on a layer; the message names it.
    """
    with layer_outputs(model, names) as seen:
        logits = model(inputs)
    seen_by = {name: _patches(model.get_submodule(name), seen[name][0]) for name in names}
    outputs = [seen[name][1] for name in names]
    for seed in seeds(logits.detach()):
        gradients = torch.autograd.grad(logits, outputs, grad_outputs=seed, retain_graph=True, allow_unused=True)
        if None in gradients:
            raise UnsupportedModelError(f"The output does not depend on layer {names[gradients.index(None)]!r}.")
        yield [
            _grouped(model.get_submodule(name), gradient).matmul(seen_by[name]).flatten(1, 2)
            for name, gradient in zip(names, gradients, strict=True)
        ]


@contextlib.contextmanager
def layer_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Collect (input, output) of each named layer in the passes within the block; the outputs can be differentiated."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and not output.requires_grad:
                output = output.detach().requires_grad_()
            seen[name] = inputs[0].detach(), output
            return output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _patches(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what each output position sees, shape (N, G, positions, K)."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), 1, -1, x.shape[-1])
    unfolded = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return unfolded.unflatten(1, (module.groups, -1)).transpose(2, 3)


def _grouped(module: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient at a layer's output, shape (N, G, C_out / G, positions)."""
    if isinstance(module, nn.Linear):
        return gradient.reshape(len(gradient), 1, -1, gradient.shape[-1]).transpose(2, 3)
    return gradient.flatten(2).unflatten(1, (module.groups, -1))


def cross_entropy_seed(labels: torch.Tensor, logits: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradient of the summed cross-entropy at the logits, shape (N, classes)."""
    return [logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])]


def gradient_moments(
    model: nn.Module, names: Sequence[str], split: Split, *, batch_size: int = 32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the mean and the mean square over images of the cross-entropy's gradient, per named layer.

    The mean is G; the mean square is the diagonal of the empirical Fisher matrix, H = (1/N) sum_n (dl_n/dW)^2, with the
    true labels.

    Returns:
        two lists of tensors (C_out, K).

    Raises:
        UnsupportedModelError: the output does not depend on a layer.
    """
    first: list = [0.0] * len(names)
    second: list = [0.0] * len(names)
    for start in range(0, len(split), batch_size):
        batch = split[start : start + batch_size]
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
    combinations: int | None = COMBINATIONS,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the trace of each layer's block of the Hessian of the mean cross-entropy, and its standard error.

    For piecewise linear networks tr H_l = (1/N) sum_n sum_k ||J' s_k||^2: one backward pass per class gives the traces
    of all layers without the noise of random probes. A combination of the s_k with random signs, new ones for every
    image, has the same expected square, and two of them cost two passes. Other networks: :func:`hutchinson_traces`.

    Args:
        model: the network.
        names: layers.
        split: images and labels.
        combinations: random combinations of the classes for each image; None: every class.
        generator: source of the random signs.
        batch_size: images per forward pass.

    Returns:
        two float64 arrays of shape (L,). The standard error is that of the mean over images.

    Raises:
        InvalidParameterError: fewer than two images.
        UnsupportedModelError: the output does not depend on a layer.
    """
    if len(split) < 2:
        raise InvalidParameterError(f"the standard error of a trace needs two images or more, got {len(split)}.")
    if not is_piecewise_linear(model):
        return hutchinson_traces(model, names, split, generator=generator, batch_size=batch_size)
    seeds = functools.partial(_hessian_seeds, combinations=combinations, generator=generator)
    per_image = []
    for start in range(0, len(split), batch_size):
        squares = [
            torch.stack([g.double().square().sum(dim=(1, 2)) for g in gradients])
            for gradients in per_image_gradients(model, names, split[start : start + batch_size].inputs(), seeds)
        ]
        per_image.append(torch.stack(squares).sum(dim=0))
    traces = torch.cat(per_image, dim=1)
    return traces.mean(dim=1).cpu().numpy(), (traces.std(dim=1) / len(split) ** 0.5).cpu().numpy()


def _hessian_seeds(
    logits: torch.Tensor, *, combinations: int | None = None, generator: torch.Generator | None = None
) -> list[torch.Tensor]:
    """Return vectors, each (N, classes), whose outer products add up to the cross-entropy's Hessian at the logits.

    With random combinations they do so in expectation.
    """
    p = logits.softmax(dim=1)
    if combinations is None:
        weights = torch.eye(p.shape[1], device=p.device)[:, None]
    else:
        draws = torch.randint(0, 2, (combinations, *p.shape), generator=generator)
        weights = ((2 * draws - 1) / combinations**0.5).to(p)
    return [root - p * root.sum(dim=1, keepdim=True) for root in weights * p.sqrt()]


def hutchinson_traces(
    model: nn.Module,
    names: Sequence[str],
    split: Split,
    *,
    probes: int = PROBES,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the trace of each layer's block of the Hessian with random signs v: E v' H v = tr H (Hutchinson 1990).

    For any twice differentiable network. Every layer has its own products: one product with the whole Hessian would
    cost less, but its estimates of single layers carry the noise of all blocks between layers.

    Args:
        model: the network.
        names: layers.
        split: images and labels.
        probes: random vectors per layer and batch, multiplied together.
        generator: source of the random signs.
        batch_size: images per forward pass.

    Returns:
        two float64 arrays of shape (L,): the estimate, and its standard error over batches (NaN if there is only one),
        each with its own images and probes.

    Raises:
        UnsupportedModelError: the output does not depend on a layer.
    """
    sums, weight_of = [], {name: model.get_submodule(name).weight for name in names}
    for start in range(0, len(split), batch_size):
        batch = split[start : start + batch_size]
        gradients = loss_gradients(model, weight_of, batch)
        for weight, gradient in zip(weight_of.values(), gradients, strict=True):
            signs = 2 * torch.randint(0, 2, (probes, *weight.shape), generator=generator).to(weight) - 1
            products = torch.stack([_product(gradient, weight, v) for v in signs])
            sums.append(len(batch) * (signs * products).double().sum().item() / probes)
    per_batch = np.array(sums).reshape(-1, len(names))
    counts = np.array([len(split[s : s + batch_size]) for s in range(0, len(split), batch_size)])
    estimate = per_batch.sum(axis=0) / len(split)
    left = per_batch - counts[:, None] * estimate
    batches = len(counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt((left**2).sum(axis=0) * batches / (batches - 1)) / len(split)
    return estimate, error


def loss_gradients(model: nn.Module, weight_of: dict[str, nn.Parameter], batch: Split) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the mean cross-entropy, which can be differentiated again."""
    if frozen := [name for name, weight in weight_of.items() if not weight.requires_grad]:
        raise UnsupportedModelError(f"Layers {frozen} are frozen: call requires_grad_() on their weights.")
    loss = F.cross_entropy(model(batch.inputs()), batch.labels)
    gradients = torch.autograd.grad(loss, list(weight_of.values()), create_graph=True, allow_unused=True)
    if None in gradients:
        raise UnsupportedModelError(f"The output does not depend on layer {list(weight_of)[gradients.index(None)]!r}.")
    return gradients


def _product(gradient: torch.Tensor, weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Return the product of a layer's block of the Hessian with a vector."""
    return torch.autograd.grad(gradient, weight, grad_outputs=vector, retain_graph=True)[0]


def top_eigenvalues(model: nn.Module, names: Sequence[str], split: Split, *, batch_size: int = 32) -> np.ndarray:
    """Return the largest eigenvalue of each layer's block of the Hessian of the mean cross-entropy, shape (L,).

    The block of a piecewise linear network is R' R / N, with R the rows J' s_k of all images and classes: its largest
    eigenvalue is the square of R's largest singular value, over N. For other networks, or more than 100 classes, the
    Lanczos method on Hessian-vector products.

    Args:
        model: the network.
        names: layers.
        split: images and labels, all of which are used.
        batch_size: images per forward pass.

    Raises:
        UnsupportedModelError: the output does not depend on a layer.
    """
    weights = [model.get_submodule(name).weight for name in names]
    classes = model(split[:1].inputs()).shape[1]
    if not is_piecewise_linear(model) or classes > MOST_CLASSES:
        return _lanczos(model, names, split)
    row_bytes = 4 * len(split) * classes
    found: list[float] = []
    while len(found) < len(names):
        rest = np.cumsum([weight.numel() * row_bytes for weight in weights[len(found) :]])
        group = names[len(found) :][: max(1, int((rest <= ROW_BYTES).sum()))]
        rows: list[list[torch.Tensor]] = [[] for _ in group]
        for start in range(0, len(split), batch_size):
            inputs = split[start : start + batch_size].inputs()
            for gradients in per_image_gradients(model, group, inputs, _hessian_seeds):
                for layer, gradient in zip(rows, gradients, strict=True):
                    layer.append(gradient.flatten(1).cpu())
        for layer in rows:
            matrix = torch.cat(layer).numpy()
            largest = svds(matrix, k=1, return_singular_vectors=False, v0=np.ones(min(matrix.shape)))[0]
            found.append(float(largest) ** 2 / len(split))
    return np.array(found)


def _lanczos(model: nn.Module, names: Sequence[str], split: Split) -> np.ndarray:
    """Return each block's largest eigenvalue from products with it."""
    weight_of = {name: model.get_submodule(name).weight for name in names}
    gradients = loss_gradients(model, weight_of, split)

    def largest(weight: nn.Parameter, gradient: torch.Tensor) -> float:
        def product(vector: np.ndarray) -> np.ndarray:
            direction = torch.from_numpy(vector.astype(np.float32)).view(weight.shape).to(weight.device)
            return _product(gradient, weight, direction).double().cpu().flatten().numpy()

        size = weight.numel()
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        return float(eigsh(operator, k=1, which="LA", v0=np.ones(size), tol=1e-4, return_eigenvectors=False)[0])

    return np.array([largest(*pair) for pair in zip(weight_of.values(), gradients, strict=True)])
