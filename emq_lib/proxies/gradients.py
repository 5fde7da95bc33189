"""What one pass through a network says of its layers: their outputs, and gradients there and at their weights.

A network may have in-place operations and be used as it stands: what is kept of a pass are copies, which no later
operation overwrites, and gradients are taken at a layer's own output, in front of whatever follows it. Explained in
chapter 02.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emq_lib.core.checks import whole_number
from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import pre_hooks


def named_layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return name -> layer, after checking that passes through the network can be taken at their word.

    Raises:
        InvalidParameterError: no names, or one stands twice.
        UnsupportedModelError: a name is no convolution or linear layer, its weight is not float32, or the network is in
            training mode, where batch norm mixes images and dropout draws.
    """
    names = list(names)
    if not names or len(set(names)) < len(names):
        raise InvalidParameterError(f"need the names of layers, each once, got {names}.")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module.training and type(module) is not nn.Module:  # as torch.fx makes them, which only hold others
            raise UnsupportedModelError(f"{name or 'The network'} is in training mode: call eval() on the network.")
    for name in names:
        if not isinstance(modules.get(name), nn.Conv2d | nn.Linear):
            known = [known for known, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
            raise UnsupportedModelError(f"{name!r} is no convolution or linear layer; the network has {known}.")
        if modules[name].weight.dtype != torch.float32:
            raise UnsupportedModelError(
                f"Layer {name!r} has weights of {modules[name].weight.dtype}: call float() on the network."
            )
    return {name: modules[name] for name in names}


def trainable_weights(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return name -> weight of layers.

    Raises:
        InvalidParameterError, UnsupportedModelError: see :func:`named_layers`.
        UnsupportedModelError: a weight is frozen.
    """
    weights = {name: layer.weight for name, layer in named_layers(model, names).items()}
    if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
        raise UnsupportedModelError(f"Layers {frozen} are frozen: call requires_grad_() on their weights.")
    return weights


def batches(split: Split, batch_size: int) -> Iterator[Split]:
    """Yield the images of a split in order, so many at a time.

    Raises:
        InvalidParameterError: no images, or a batch size below one.
    """
    whole_number(len(split), "the number of images", 1)
    step = min(len(split), whole_number(batch_size, "a batch size", 1))
    for start in range(0, len(split), step):
        yield split[start : start + step]


def logits_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the logits (N, classes) of inputs (N, C, H, W), which the network cannot overwrite.

    Raises:
        InvalidParameterError: no inputs.
        UnsupportedModelError: the output is something else.
    """
    return check_logits(model(inputs.clone()), len(inputs))


def check_logits(logits: torch.Tensor, images: int) -> torch.Tensor:
    """Return logits (N, classes) after checking that a network returned that.

    Raises:
        InvalidParameterError: there are no images.
        UnsupportedModelError: it returned something else, or tells fewer than two classes apart.
    """
    whole_number(images, "the number of images", 1)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != images or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UnsupportedModelError(f"The network must return logits ({images}, 2 classes or more), got {got}.")
    return logits


@contextlib.contextmanager
def layer_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the output of each named layer in the pass within the block; the outputs can be differentiated.

    What follows a layer gets a copy of its output, so that an activation that works in place does not reach it.

    Yields:
        layer name -> output, in the layer's own shape; filled by the pass.

    Raises:
        InvalidParameterError, UnsupportedModelError: see :func:`named_layers`.
        UnsupportedModelError: a layer does not run exactly once.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if name in seen:
                raise UnsupportedModelError(f"Layer {name!r} runs more than once in a pass; give each use its own.")
            if torch.is_grad_enabled() and not output.requires_grad:
                output = output.detach().requires_grad_()
            seen[name] = output
            return output.clone()

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in named_layers(model, names).items()]
    try:
        yield seen
        if missing := [name for name in names if name not in seen]:
            raise UnsupportedModelError(f"Layers {missing} did not run in the pass.")
    finally:
        for handle in handles:
            handle.remove()


def gradients_at(
    values: torch.Tensor, at: dict[str, torch.Tensor], *, seed: torch.Tensor | None = None, **kwargs: bool
) -> list[torch.Tensor]:
    """Return the gradients of values at tensors, given by the names of their layers.

    Args:
        values: what is differentiated.
        at: layer name -> tensor.
        seed: gradient at the values; None: they are a single number.
        kwargs: of :func:`torch.autograd.grad`.

    Raises:
        UnsupportedModelError: the values do not depend on one of the layers; the message names it. Or PyTorch cannot
            differentiate them, because the network writes over a tensor that gradients need.
    """
    gradients = [None]
    if values.requires_grad:
        wanted = list(at.values())
        try:
            gradients = list(torch.autograd.grad(values, wanted, grad_outputs=seed, allow_unused=True, **kwargs))
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise UnsupportedModelError(
                "The network writes over a tensor that its gradients need: take what fold_batchnorm returns, which "
                "computes the same without operations in place."
            ) from error
    for name, gradient in zip(at, gradients, strict=False):
        if gradient is None:
            raise UnsupportedModelError(f"The output does not depend on layer {name!r}.")
    return gradients


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
        InvalidParameterError, UnsupportedModelError: see :func:`layer_outputs` and :func:`logits_of`.
        UnsupportedModelError: the output does not depend on a layer; the message names it.
    """
    layers, seen_by = named_layers(model, names), {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, received: tuple[torch.Tensor, ...]) -> None:
            seen_by[name] = _patches(module, received[0].detach())

        return hook

    with layer_outputs(model, names) as outputs, pre_hooks(model, {name: keep(name) for name in layers}):
        logits = logits_of(model, inputs)
    outputs = {name: outputs[name] for name in layers}
    for seed in seeds(logits.detach()):
        gradients = gradients_at(logits, outputs, seed=seed, retain_graph=True)
        yield [
            _grouped(layers[name], gradient).matmul(seen_by[name]).flatten(1, 2)
            for name, gradient in zip(layers, gradients, strict=True)
        ]


def _patches(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return a copy of what each output position sees, shape (N, G, positions, K)."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), 1, -1, x.shape[-1]).clone()
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
    unfolded = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return unfolded.unflatten(1, (module.groups, -1)).transpose(2, 3)


def _grouped(module: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient at a layer's output, shape (N, G, C_out / G, positions)."""
    if isinstance(module, nn.Linear):
        return gradient.reshape(len(gradient), 1, -1, gradient.shape[-1]).transpose(2, 3)
    return gradient.flatten(2).unflatten(1, (module.groups, -1))


def cross_entropy_seed(labels: torch.Tensor, logits: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradient of the summed cross-entropy at the logits, one tensor (N, classes).

    Args:
        labels: shape (N,).
        logits: shape (N, classes).

    Raises:
        InvalidParameterError: a label is none of the classes.
    """
    check_labels(labels, logits.shape[1])
    return [logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])]


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Refuse labels that are not among the classes; some losses would pass over them.

    Raises:
        InvalidParameterError: there is one; the message gives it.
    """
    if len(strange := labels[(labels < 0) | (labels >= classes)]):
        raise InvalidParameterError(f"label {strange[0].item()} is none of the network's {classes} classes.")


def loss_gradients(model: nn.Module, weight_of: dict[str, nn.Parameter], batch: Split) -> list[torch.Tensor]:
    """Return the gradients of the mean cross-entropy at weights, which can be differentiated again.

    Args:
        model: the network.
        weight_of: layer name -> weight, see :func:`trainable_weights`.
        batch: images and labels.

    Raises:
        InvalidParameterError: a label is none of the classes.
        UnsupportedModelError: see :func:`logits_of`; or the output does not depend on a layer.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
        logits = logits_of(model, batch.inputs())
    check_labels(batch.labels, logits.shape[1])
    loss = F.cross_entropy(logits, batch.labels)
    return gradients_at(loss, weight_of, create_graph=True)
