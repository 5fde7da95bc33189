"""What quantizing one or two slots alone does to the predictions.

Explained in chapter 02.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.graphs import segments


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
    """
    pieces = segments(model, list(quantized))
    choices = len(next(iter(quantized.values())))
    float_logits, logits = [], []
    for start in range(0, len(split), batch_size):
        outputs = _run(pieces, [split[start : start + batch_size].inputs()])
        float_logits.append(outputs[-1].double())
        changed = []
        for names, choice in ((names, choice) for names in members for choice in range(choices)):
            with _replaced(model, names, quantized, choice):
                changed.append(_run(pieces, outputs[: _first_piece(pieces, names) + 1])[-1].double())
        logits.append(torch.stack(changed))
    return torch.cat(float_logits), torch.cat(logits, dim=1).unflatten(0, (len(members), choices))


@torch.inference_mode()
def pair_losses(
    model: torch.fx.GraphModule,
    members: Sequence[Sequence[str]],
    quantized: Mapping[str, Sequence[torch.Tensor]],
    split: Split,
) -> np.ndarray:
    """Return what quantizing two slots adds to the mean cross-entropy beyond what each adds alone (CLADO).

    L(i, j) - L(i) - L(j) + L for options i and j of different slots, L(i) - L on the diagonal, zero for two widths of
    one slot; an option is a slot at a width. Arguments are those of :func:`one_slot_logits`; all images go through the
    network at once.

    Returns:
        float64 array of shape (S B, S B), symmetric.
    """
    pieces = segments(model, list(quantized))
    choices = len(next(iter(quantized.values())))
    first = {slot: _first_piece(pieces, names) for slot, names in enumerate(members)}
    order = sorted(first, key=first.get)
    options = [(slot, choice) for slot in order for choice in range(choices)]

    def loss(logits: torch.Tensor) -> float:
        return F.cross_entropy(logits.double(), split.labels).item()

    plain = _run(pieces, [split.inputs()])
    alone = np.zeros((len(members), choices))
    together = np.full((len(members), choices, len(members), choices), np.nan)
    for index, (slot, choice) in enumerate(options):
        with _replaced(model, members[slot], quantized, choice):
            outputs = _run(pieces, plain[: first[slot] + 1])
            alone[slot, choice] = loss(outputs[-1])
            for other, width in options[index + 1 :]:
                if other != slot:
                    with _replaced(model, members[other], quantized, width):
                        found = loss(_run(pieces, outputs[: first[other] + 1])[-1])
                    together[slot, choice, other, width] = together[other, width, slot, choice] = found
    before = loss(plain[-1])
    single = alone.ravel() - before
    extra = together.reshape(single.size, single.size) - before - single[:, None] - single[None, :]
    return np.nan_to_num(extra) + np.diag(single)


def _run(pieces: Sequence[tuple[nn.Module, Sequence[str]]], outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the inputs of all pieces and the logits, given those of the first pieces."""
    outputs = list(outputs)
    for piece, _ in pieces[len(outputs) - 1 :]:
        outputs.append(piece(outputs[-1]))
    return outputs


def _first_piece(pieces: Sequence[tuple[nn.Module, Sequence[str]]], names: Sequence[str]) -> int:
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
    """
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
    """
    reference, changed = float_logits.log_softmax(dim=1), logits.log_softmax(dim=3)
    return (reference.exp() * (reference - changed)).sum(dim=3).mean(dim=2).cpu().numpy()


def _losses(float_logits: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Return the mean cross-entropy less the float one, shape (S, B)."""
    reference, changed, rows = float_logits.log_softmax(dim=1), logits.log_softmax(dim=3), torch.arange(len(labels))
    return (reference[rows, labels] - changed[:, :, rows, labels]).mean(dim=2).cpu().numpy()
