"""What quantizing one or two slots alone does to the predictions.

Explained in chapter 02.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import segments
from emq_lib.proxies.gradients import batches, check_labels, check_logits, named_layers

Pieces = Sequence[tuple[nn.Module, Sequence[str]]]


@torch.inference_mode()
def one_slot_logits(
    model: torch.fx.GraphModule,
    members: Sequence[Sequence[str]],
    quantized: Mapping[str, Sequence[torch.Tensor]],
    split: Split,
    *,
    batch_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float logits, and those when the layers of one slot alone take their quantized weights.

    The layers before the quantized one are computed once per batch.

    Args:
        model: folded float network; its weights are changed and restored.
        members: per slot, the names of its layers.
        quantized: layer name -> one weight per choice.
        split: images.
        batch_size: images per forward pass.

    Returns:
        float64 tensors of shape (N, classes) and (S, B, N, classes).

    Raises:
        InvalidParameterError: no images, no slots, a batch size below one, or weights that are not one in the layer's
            shape for each layer and choice.
        UnsupportedModelError: the network is not traced, works in place on what passes between its pieces, has no
            layer of a name, or returns no finite logits; the message names the slot whose weights make them so.
    """
    choices = _checked_choices(model, members, quantized)
    pieces = segments(model, list(quantized))
    float_logits, logits = [], []
    for batch in batches(split, batch_size):
        outputs = _plain_run(pieces, batch.inputs())
        float_logits.append(outputs[-1].double())
        changed = []
        for names, choice in ((names, choice) for names in members for choice in range(choices)):
            with _replaced(model, names, quantized, choice):
                found = _run(pieces, outputs[: _first_piece(pieces, names) + 1])[-1]
            changed.append(_finite(found, f"with {list(names)} at choice {choice}").double())
        logits.append(torch.stack(changed))
    return torch.cat(float_logits), torch.cat(logits, dim=1).unflatten(0, (len(members), choices))


@torch.inference_mode()
def pair_losses(
    model: torch.fx.GraphModule,
    members: Sequence[Sequence[str]],
    quantized: Mapping[str, Sequence[torch.Tensor]],
    split: Split,
) -> np.ndarray:
    """Return what quantizing two slots adds to the mean cross-entropy beyond what each adds alone (Deng et al. 2023).

    L(i, j) - L(i) - L(j) + L for options i and j of different slots, L(i) - L on the diagonal, zero for two widths of
    one slot; an option is a slot at a width. All images go through the network at once.

    Args:
        model: folded float network; its weights are changed and restored.
        members: per slot, the names of its layers.
        quantized: layer name -> one weight per choice.
        split: images and labels.

    Returns:
        float64 array of shape (S B, S B), symmetric, in nats.

    Raises:
        InvalidParameterError, UnsupportedModelError: see :func:`one_slot_logits`.
        InvalidParameterError: a label is none of the classes.
    """
    choices = _checked_choices(model, members, quantized)
    pieces = segments(model, list(quantized))
    first = {slot: _first_piece(pieces, names) for slot, names in enumerate(members)}
    options = [(slot, choice) for slot in sorted(first, key=first.get) for choice in range(choices)]

    def loss(logits: torch.Tensor, *chosen: tuple[int, int]) -> float:
        where = " and ".join(f"{list(members[slot])} at choice {choice}" for slot, choice in chosen)
        return F.cross_entropy(_finite(logits, f"with {where}").double(), split.labels).item()

    plain = _plain_run(pieces, split.inputs())
    check_labels(split.labels, plain[-1].shape[1])
    before = F.cross_entropy(plain[-1].double(), split.labels).item()
    alone = np.zeros((len(members), choices))
    together = np.zeros((len(members), choices, len(members), choices))
    for index, one in enumerate(options):
        with _replaced(model, members[one[0]], quantized, one[1]):
            outputs = _run(pieces, plain[: first[one[0]] + 1])
            alone[one] = loss(outputs[-1], one)
            for two in options[index + 1 :]:
                if two[0] != one[0]:
                    with _replaced(model, members[two[0]], quantized, two[1]):
                        found = loss(_run(pieces, outputs[: first[two[0]] + 1])[-1], one, two)
                    together[one + two] = together[two + one] = found
    single, slots = alone.ravel() - before, np.repeat(np.arange(len(members)), choices)
    extra = together.reshape(single.size, single.size) - before - single[:, None] - single[None, :]
    return np.where(slots[:, None] == slots, 0.0, extra) + np.diag(single)


def _checked_choices(
    model: nn.Module, members: Sequence[Sequence[str]], quantized: Mapping[str, Sequence[torch.Tensor]]
) -> int:
    """Return the number of choices, after checking that every layer of every slot has a weight for each."""
    if not isinstance(model, torch.fx.GraphModule):
        raise UnsupportedModelError("The network must be traced: take what fold_batchnorm returns.")
    held = [name for names in members for name in names]
    layers = named_layers(model, held)
    if not all(map(len, members)):
        raise InvalidParameterError("a slot needs one layer or more.")
    if missing := [name for name in held if name not in quantized]:
        raise InvalidParameterError(f"layers {missing} have no quantized weights.")
    counts = {name: len(quantized[name]) for name in held}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        raise InvalidParameterError(f"layers need one weight for each choice, got {counts}.")
    for name, layer in layers.items():
        if any(weight.shape != layer.weight.shape for weight in quantized[name]):
            raise InvalidParameterError(
                f"quantized weights of {name!r} must have its shape {tuple(layer.weight.shape)}."
            )
    return counts[held[0]]


def _plain_run(pieces: Pieces, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Run the float network piece by piece; refuse it if a piece overwrites what it gets, which is read again later."""
    outputs = [inputs]
    for piece, names in pieces:
        received = copy.deepcopy(outputs[-1])
        outputs.append(piece(received))
        for now, before in zip(_tensors(received), _tensors(outputs[-2]), strict=True):
            if not torch.allclose(now, before, rtol=0, atol=0, equal_nan=True):
                raise UnsupportedModelError(
                    f"The network overwrites what layers {list(names)} get: use fold_batchnorm."
                )
    _finite(check_logits(outputs[-1], len(inputs)), "of the float network")
    return outputs


def _tensors(value: object) -> list[torch.Tensor]:
    """Return the tensors in a value that pieces pass on: one, or a tuple of them."""
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def _run(pieces: Pieces, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the inputs of all pieces and the logits, given those of the first pieces."""
    outputs = list(outputs)
    for piece, _ in pieces[len(outputs) - 1 :]:
        outputs.append(piece(outputs[-1]))
    return outputs


def _finite(logits: torch.Tensor, when: str) -> torch.Tensor:
    """Return the logits unless they hold NaN or infinity."""
    if not torch.isfinite(logits).all():
        raise UnsupportedModelError(f"The logits {when} hold NaN or infinity; look at the activations there.")
    return logits


def _first_piece(pieces: Pieces, names: Sequence[str]) -> int:
    return next(index for index, (_, held) in enumerate(pieces) if set(held) & set(names))


@contextlib.contextmanager
def _replaced(
    model: nn.Module, names: Sequence[str], quantized: Mapping[str, Sequence[torch.Tensor]], choice: int
) -> Iterator[None]:
    """Give layers their quantized weights for the duration of the block."""
    modules = [model.get_submodule(name) for name in names]
    originals = [module.weight.data for module in modules]
    for module, name in zip(modules, names, strict=True):
        module.weight.data = quantized[name][choice]
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.weight.data = original


def logit_products(float_logits: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """Return the mean over images of d_i' S d_j for any two options i and j, with S = diag(p) - p p'.

    To second order, 1/2 d' S d is the divergence of the predictions when the logits change by d. If the changes of
    several slots add up, so do these products, over all pairs.

    Args:
        float_logits: shape (N, classes).
        logits: with one slot quantized, shape (S, B, N, classes).

    Returns:
        float64 array of shape (S B, S B).

    Raises:
        InvalidParameterError: the shapes do not fit.
    """
    _check_shapes(float_logits, logits)
    change = (logits - float_logits).flatten(0, 1)
    p = float_logits.softmax(dim=1)
    centred = change - (change * p).sum(dim=2, keepdim=True)
    scaled = (centred * p.sqrt()).flatten(1)
    return (scaled @ scaled.T / len(p)).cpu().numpy()


def divergences(float_logits: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """Return the mean over images of KL(float || one slot quantized), in nats.

    Args:
        float_logits: shape (N, classes).
        logits: with one slot quantized, shape (S, B, N, classes).

    Returns:
        float64 array of shape (S, B).

    Raises:
        InvalidParameterError: the shapes do not fit.
    """
    _check_shapes(float_logits, logits)
    reference, changed = float_logits.log_softmax(dim=1), logits.log_softmax(dim=3)
    return (reference.exp() * (reference - changed)).sum(dim=3).mean(dim=2).cpu().numpy()


def loss_gains(float_logits: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Return the mean cross-entropy with one slot quantized less the float one, in nats.

    Args:
        float_logits: shape (N, classes).
        logits: with one slot quantized, shape (S, B, N, classes).
        labels: shape (N,).

    Returns:
        float64 array of shape (S, B).

    Raises:
        InvalidParameterError: the shapes do not fit, or a label is none of the classes.
    """
    _check_shapes(float_logits, logits)
    check_labels(labels, float_logits.shape[1])
    gain = float_logits.log_softmax(dim=1) - logits.log_softmax(dim=3)
    of_labels = labels[:, None].expand(*gain.shape[:3], 1)
    return gain.gather(3, of_labels).squeeze(3).mean(dim=2).cpu().numpy()


def _check_shapes(float_logits: torch.Tensor, logits: torch.Tensor) -> None:
    if float_logits.ndim != 2 or logits.ndim != 4 or logits.shape[2:] != float_logits.shape or not logits.numel():
        raise InvalidParameterError(
            f"logits of one slot {tuple(logits.shape)} must be (S, B, N, classes), the float ones (N, classes), "
            f"got {tuple(float_logits.shape)}."
        )
