"""Quantize any network by a plan.

Explained in chapter 05.
"""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from emq_lib.core.bank import WeightBank
from emq_lib.core.checks import whole_number
from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.quantizers import choose_activation_ranges, quantize
from emq_lib.quantization.adaround import adaround, second_moments
from emq_lib.quantization.brecq import PAPER, Settings, reconstruct_in_order
from emq_lib.quantization.planning import plan_bits
from emq_lib.quantization.prepare import prepared
from emq_lib.quantization.qat import QAT, QatRecipe, train_quantized

METHODS = ("rtn", "adaround", "brecq", "qat")


def quantize_model(
    model: nn.Module,
    calibration: torch.Tensor | Split,
    *,
    bits: Mapping[str, int] | None = None,
    default: int = 3,
    ends: int | None = 8,
    activation_bits: int = 8,
    method: str = "rtn",
    settings: Settings = PAPER,
    training: Split | None = None,
    recipe: QatRecipe = QAT,
    resume: pathlib.Path | str | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> QuantizedNetwork:
    """Quantize any network of convolutions and linear layers; the plan is printed before it runs.

    Args:
        model: the float network, which `torch.fx` can trace; it stays as it is.
        calibration: images for the ranges of activations and for learned rounding: float32 inputs of shape
            (N, C, H, W) as the network takes them, or a split; they stay as they are.
        bits: pattern over layer names -> width, see :func:`emq_lib.quantization.planning.plan_bits`.
        default: width of the other layers.
        ends: width of the first and the last layer where no pattern matches them; None: like the others.
        activation_bits: width of every quantized layer's input.
        method: "rtn": to nearest, with range search. "adaround": each layer's directions of rounding learned on float
            inputs. "brecq": block after block, on the inputs that the quantized blocks before give, then the steps of
            the activations. "qat": the whole network trained while it is rounded, with learned steps.
        settings: of "brecq": the paper's, or :data:`emq_lib.quantization.brecq.LAPTOP` for minutes without a GPU.
        training: images and labels that "qat" trains on.
        recipe: of "qat".
        resume: file that takes the state of "qat" after every epoch: an interrupted call goes on from there. Remove
            it when the network is saved: until then the same call returns the same network at once.
        seed: of the batches of "brecq" and "qat".
        verbose: print the plan.

    Returns:
        The quantized network, in evaluation mode. Layers that cannot be quantized stay in floating point; the plan
        names them, and so does a warning.

    Raises:
        InvalidParameterError: an unknown method, "qat" without training images, patterns that match nothing or twice,
            calibration images of the wrong shape, type or with NaN, settings or a recipe that are none.
        InvalidBitsError: a width that is no whole number from 1 to 8.
        UnsupportedModelError: the network cannot be traced, runs a layer twice, is quantized already, is not of
            float32, or does not return one tensor with a row per image.
        CorruptArtefactError: the resume file is none, or belongs to another training.
    """
    if not (isinstance(method, str) and method in METHODS):
        raise InvalidParameterError(f"unknown method {method!r:.60}; there are {', '.join(METHODS)}.")
    if method == "qat" and not isinstance(training, Split):
        raise InvalidParameterError('"qat" trains the network: pass the images and labels as training=Split(...).')
    _check_kinds(settings=(settings, Settings), recipe=(recipe, QatRecipe))
    if not isinstance(resume, str | os.PathLike | None):
        raise InvalidParameterError(f"resume must be the path of a file, got {resume!r:.60}.")
    seed = whole_number(seed, "seed", 0)
    if seed >= 2**64:
        raise InvalidParameterError("seed must lie below 2^64.")
    folded, images, example = prepared(model, calibration)
    plan = plan_bits(folded, example, bits=bits, default=default, ends=ends, activation_bits=activation_bits)
    if verbose:
        print(plan)
    if plan.kept:
        warnings.warn(f"left in floating point: {', '.join(name for name, _ in plan.kept)}", stacklevel=2)
    layers = plan.layers.assign(searchable=True, slot=range(len(plan.layers)))
    ranges = choose_activation_ranges(folded, layers, images, bits=activation_bits)
    config, generator = tuple(plan.bits.values()), torch.Generator().manual_seed(seed)
    if method == "qat":
        return train_quantized(
            folded,
            layers,
            config,
            training,
            ranges,
            generator=generator,
            recipe=recipe,
            resume=None if resume is None else pathlib.Path(resume),
        )
    if method == "brecq":
        return reconstruct_in_order(folded, layers, config, images, ranges, generator=generator, settings=settings)
    original = {name: folded.get_submodule(name).weight for name in plan.bits}
    if method == "rtn":
        weights = {name: quantize(original[name], width) for name, width in plan.bits.items()}
    else:
        moments = second_moments(folded, list(plan.bits), images)
        weights = {name: adaround(original[name], width, moments[name]) for name, width in plan.bits.items()}
    return QuantizedNetwork(folded, WeightBank.of(weights), ranges)


def _check_kinds(**given: tuple[object, type]) -> None:
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise InvalidParameterError(f"{name} must be a {kind.__name__}, got {value!r:.60}.")
