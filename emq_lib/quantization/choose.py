"""Choose the bits of any network's layers without training.

Explained in chapters 04 and 05.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from emq_lib.allocation.exact import allocate, budget_for_average_bits
from emq_lib.core.checks import bit_choices, real_number
from emq_lib.core.costs import size_cost
from emq_lib.core.datasets import Split
from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.quantizers import quantize
from emq_lib.proxies.passes import divergences, one_slot_logits
from emq_lib.quantization.planning import plan_bits
from emq_lib.quantization.prepare import prepared

PATIENCE, TOLERANCE = 20.0, 1e-5  # seconds for a proof; without one, the share of the regret that may be left


def choose_bits(
    model: nn.Module,
    calibration: torch.Tensor | Split,
    *,
    average_bits: float,
    choices: Sequence[int] = (2, 3, 4),
    ends: int | None = 8,
) -> dict[str, int]:
    """Choose each layer's bits without training: what its divergence alone says, allocated exactly within a size.

    Every layer in turn is rounded to nearest at every width, and the divergence of the network's predictions from the
    float ones is its score (the one-layer KL of chapter 02); their sum is minimised within the packed size (chapter
    04). Takes a pass over the images for each layer and width.

    Args:
        model: the float network, which `torch.fx` can trace; it stays as it is.
        calibration: a few hundred images, as for :func:`quantize_model`; labels are not needed.
        average_bits: the size, as average bits of the weights between the ends.
        choices: the widths to choose from, increasing.
        ends: width that :func:`quantize_model` is to give to the first and the last layer; None: they take part.

    Returns:
        layer name -> bits, as `bits=` of :func:`quantize_model` takes it; without the ends.

    Raises:
        InvalidBitsError: choices that are no whole numbers from 1 to 8, or do not increase; ends likewise.
        InvalidParameterError: an average that is no finite number; see :func:`quantize_model`.
        UnsupportedModelError: the network does not return logits of two or more classes, shape (N, classes); see
            :func:`quantize_model`.
        InfeasibleBudgetError: fewer bits than the smallest choice.
    """
    choices, average_bits = bit_choices(choices), real_number(average_bits, "average_bits")
    folded, images, example = prepared(model, calibration)
    _check_logits(folded, example)
    table = plan_bits(folded, example, default=max(choices), ends=ends).layers
    free = table["rule"] != "ends"
    names = list(table.loc[free, "name"])
    layers = table.assign(searchable=free, slot=free.cumsum() - 1, pinned_bits=table["bits"])
    size = size_cost(layers, choices)
    budget = budget_for_average_bits(average_bits, size, choices)
    weights = {name: folded.get_submodule(name).weight for name in names}
    rounded = {name: [quantize(weight, width).dequantize() for width in choices] for name, weight in weights.items()}
    scores = -divergences(*one_slot_logits(folded, [(name,) for name in names], rounded, images))
    found = allocate(scores, {"size": size}, {"size": budget}, choices, layers=names, time_limit=PATIENCE)
    return dict(zip(names, found.bits, strict=True))


@torch.inference_mode()
def _check_logits(folded: nn.Module, example: torch.Tensor) -> None:
    """Check that predictions have a divergence: with one class every one is certain, and so all would be equal."""
    shape = tuple(folded(example).shape)
    if len(shape) != 2 or shape[1] < 2:
        raise UnsupportedModelError(
            "choose_bits compares predictions: the network must return logits of two or more classes, shape "
            f"(N, classes); for one image it returns {shape}. Give its bits to quantize_model by hand."
        )
