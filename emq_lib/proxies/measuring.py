"""Measuring the statistics: every visit of the network that proxies and formulas live on.

Explained in chapter 02.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import pre_hooks
from emq_lib.proxies import curvature, saliency
from emq_lib.proxies.gradients import batches, logits_of, named_layers
from emq_lib.proxies.layer_statistics import (
    ACTIVATION_IMAGES,
    FEW_IMAGES,
    layer_weight,
    quantized_weights,
    sampled,
)
from emq_lib.proxies.passes import divergences, logit_products, loss_gains, one_slot_logits, pair_losses
from emq_lib.proxies.released import ReleasedStatistics


@torch.inference_mode()
def activation_samples(model: nn.Module, names: Sequence[str], split: Split) -> list[torch.Tensor]:
    """Return a sample of each named layer's inputs on the first 64 images of a split, shape (C_in, M).

    Args:
        model: the network.
        names: layers.
        split: images.

    Raises:
        InvalidParameterError: no images.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.named_layers`.
    """
    samples = {}

    def take(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].movedim(-1, 1) if isinstance(module, nn.Linear) else inputs[0]
            samples[name] = sampled(x.transpose(0, 1).flatten(1))

        return hook

    with pre_hooks(model, {name: take(name) for name in named_layers(model, names)}):
        logits_of(model, split[:ACTIVATION_IMAGES].inputs())
    return [samples[name] for name in names]


@torch.inference_mode()
def output_errors(
    model: nn.Module, errors: Mapping[str, Sequence[torch.Tensor]], split: Split, *, batch_size: int = 256
) -> np.ndarray:
    """Return ||E_b x||^2 / ||W x||^2 per layer and choice, x the float network's inputs of that layer, shape (L, B).

    Args:
        model: folded float network.
        errors: layer name -> one error tensor per choice, each in the shape of the weight.
        split: images.
        batch_size: images per forward pass.

    Raises:
        InvalidParameterError: no images, or a batch size below one.
        UnsupportedModelError: see :func:`~emq_lib.proxies.gradients.named_layers`.
    """
    energy = {name: torch.zeros(1 + len(tensors), dtype=torch.float64) for name, tensors in errors.items()}

    def accumulate(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for row, weight in enumerate((module.weight, *errors[name])):
                energy[name][row] += _linear_part(module, inputs[0], weight).double().square().sum().item()

        return hook

    with pre_hooks(model, {name: accumulate(name) for name in named_layers(model, list(errors))}):
        for batch in batches(split, batch_size):
            logits_of(model, batch.inputs())
    return np.stack([(row[1:] / row[0]).numpy() for row in energy.values()])


def _linear_part(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply a layer with another weight and no bias; a convolution pads in its own way."""
    return module._conv_forward(x, weight, None) if isinstance(module, nn.Conv2d) else F.linear(x, weight)


@dataclass(frozen=True)
class Part:
    """What one part of the statistics came to.

    Attributes:
        tensors: name -> tensor on the CPU, as :func:`assemble_statistics` takes them.
        seconds: wall time.
    """

    tensors: Mapping[str, torch.Tensor]
    seconds: float


@dataclass(frozen=True)
class _Visit:
    """A network and what its statistics are measured on."""

    model: torch.fx.GraphModule
    searchable: pd.DataFrame
    images: Split
    choices: tuple[int, ...]
    streams: Callable[[str], torch.Generator]

    @functools.cached_property
    def names(self) -> list[str]:
        return list(self.searchable["name"])

    @property
    def members(self) -> list[list[str]]:
        return [list(group) for _, group in self.searchable.groupby("slot")["name"]]

    @property
    def few(self) -> Split:
        return self.images[:FEW_IMAGES]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.images.shape[1:])

    @functools.cached_property
    def weights(self) -> list[torch.Tensor]:
        return [layer_weight(self.model, name).flatten(1) for name in self.names]

    @functools.cached_property
    def quantized(self) -> dict[str, list[torch.Tensor]]:
        return quantized_weights(self.model, self.names, self.choices)

    @functools.cached_property
    def errors(self) -> dict[str, list[torch.Tensor]]:
        return {name: [q - layer_weight(self.model, name) for q in self.quantized[name]] for name in self.names}


def _norms(visit: _Visit) -> dict:
    pairs = zip(visit.weights, visit.errors, strict=True)  # the errors are not stored, but their cost belongs here
    return {"saliency L2": _array(w.norm() for w, _ in pairs)}


def _gradients(visit: _Visit) -> dict:
    gradients, fisher = curvature.gradient_moments(visit.model, visit.names, visit.images)
    error = [
        [(f * e.flatten(1).square()).double().sum().item() for e in visit.errors[name]]
        for name, f in zip(visit.names, fisher, strict=True)
    ]
    products = [w * g for w, g in zip(visit.weights, gradients, strict=True)]
    return {
        "gradients": map(sampled, gradients),
        "curvature": map(sampled, fisher),
        "fisher_error": np.array(error),
        "saliency SNIP": _array(product.abs().sum() for product in products),
        "saliency plain": _array(product.sum() for product in products),
        "saliency grad-norm": _array(g.norm() for g in gradients),
    }


def _traces(visit: _Visit) -> dict:
    found = curvature.hessian_traces(visit.model, visit.names, visit.images, generator=visit.streams("traces"))
    return dict(zip(("trace", "trace_error"), found, strict=True))


def _one_slot(visit: _Visit) -> dict:
    float_logits, logits = one_slot_logits(visit.model, visit.members, visit.quantized, visit.images)
    return {
        "kl": divergences(float_logits, logits),
        "loss": loss_gains(float_logits, logits, visit.images.labels),
        "logit_products": logit_products(float_logits, logits),
    }


def _zen(visit: _Visit) -> np.ndarray:
    few, generator = len(visit.few), visit.streams("zen")
    return saliency.zen(visit.model, visit.names, visit.shape, images=few, generator=generator)


# Part, as proxies and inputs of formulas say what they read -> what it gives: by name, one tensor per layer, or an
# array over layers or slots. What may fail comes first, what takes long last.
_PARTS: Mapping[str, Callable[[_Visit], Mapping[str, np.ndarray | Iterable[torch.Tensor]]]] = {
    "Synflow": lambda v: {"saliency Synflow": saliency.synflow(v.model, v.names, v.shape)},
    "positive_gradients": lambda v: {
        "positive_gradients": map(sampled, saliency.positive_gradients(v.model, v.names, v.shape))
    },
    "virtual_gradients": lambda v: {
        "virtual_gradients": map(sampled, saliency.virtual_gradients(v.model, v.names, v.shape))
    },
    "errors": _norms,
    "activations": lambda v: {"activations": activation_samples(v.model, v.names, v.images)},
    "channel_products": lambda v: {
        "channel_products": map(sampled, saliency.channel_products(v.model, v.names, v.few))
    },
    "similarity": lambda v: {"similarity": saliency.linear_cka(v.model, v.names, v.few).sum(axis=1) - 1},
    "Fisher": lambda v: {"saliency Fisher": saliency.channel_fisher(v.model, v.names, v.few)},
    "NWOT": lambda v: {"saliency NWOT": saliency.nwot(v.model, v.names, v.few)},
    "Zen": lambda v: {"saliency Zen": _zen(v)},
    "ZiCo": lambda v: {"saliency ZiCo": saliency.zico(v.model, v.names, v.images)},
    "GraSP": lambda v: {"saliency GraSP": saliency.grasp(v.model, v.names, v.few)},
    "gradients": _gradients,
    "trace": _traces,
    "eigenvalue": lambda v: {"eigenvalue": curvature.top_eigenvalues(v.model, v.names, v.few)},
    "output_error": lambda v: {"output_error": output_errors(v.model, v.errors, v.images)},
    "one_slot": _one_slot,
    "pair_losses": lambda v: {"pair_losses": pair_losses(v.model, v.members, v.quantized, v.few)},
}


def measure_statistics(
    model: torch.fx.GraphModule,
    layers: pd.DataFrame,
    calibration: Split,
    *,
    choices: Sequence[int],
    released: ReleasedStatistics,
    streams: Callable[[str], torch.Generator],
    finished: MutableMapping[str, Part] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Compute everything that needs images or many passes through the network; explained in chapter 02.

    Args:
        model: network with folded batch norm, on the device of the images; its weights are changed and restored.
        layers: its layer table.
        calibration: the calibration images.
        choices: the B allowed widths.
        released: what the released code reads, see :func:`emq_lib.proxies.released.measure_released`.
        streams: name of what is drawn ("traces", "zen") -> source of randomness.
        finished: parts measured before, which are not measured again; each new one is entered as soon as it is done, so
            that a caller who keeps them loses no more than one part to an error or a kill.

    Returns:
        name -> tensor on the CPU, as :func:`assemble_statistics` takes them; and what was computed -> wall time in
        seconds.

    Raises:
        InvalidParameterError: all images are of one class, there are too few of them, or a label is none of the
            classes; or the network is on another device.
        UnsupportedModelError: a statistic is NaN or infinite; the message names it and the layer. Or the network is
            none that the statistics can be measured on.
        InvalidBitsError: a width outside 1 to 8.
    """
    if (there := next(model.parameters()).device) != (here := calibration.images.device):
        raise InvalidParameterError(f"the network is on {there}, the images on {here}: move one of them.")
    if len(calibration.labels.unique()) < 2:
        raise InvalidParameterError("All calibration images are of one class, so gradients say nothing; draw others.")
    visit = _Visit(model, layers[layers["searchable"]], calibration, tuple(choices), streams)
    finished = {} if finished is None else finished
    for name, part in _PARTS.items():
        if name not in finished:
            started = time.perf_counter()
            finished[name] = Part(_finite(part(visit), visit.names), time.perf_counter() - started)
    found = [finished[name] for name in _PARTS]
    found.append(Part(_released(released), released.seconds))
    stored = {name: tensor for part in found for name, tensor in part.tensors.items()}
    return stored, dict(zip((*_PARTS, "released"), (part.seconds for part in found), strict=True))


def _array(values: Iterable[torch.Tensor]) -> np.ndarray:
    return np.array([value.item() for value in values])


def _released(released: ReleasedStatistics) -> dict[str, torch.Tensor]:
    arrays = {f"released {key}": array for key, array in asdict(released).items() if key != "seconds"}
    return _finite(arrays, ())


def _finite(found: Mapping[str, np.ndarray | Iterable[torch.Tensor]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return what a part found as tensors on the CPU, those of layers by "statistic/layer"; refuse NaN and infinity."""
    tensors = {}
    for key, values in found.items():
        if isinstance(values, np.ndarray):
            if not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0][0])
                where = repr(names[row]) if len(values) == len(names) else f"in row {row}"
                raise UnsupportedModelError(f"{key} is NaN or infinite at {where}; look at that layer's activations.")
            tensors[key] = torch.from_numpy(np.ascontiguousarray(values))
            continue
        for name, tensor in zip(names, values, strict=True):
            if not torch.isfinite(tensor).all():
                raise UnsupportedModelError(f"{key} of layer {name!r} hold NaN or infinity; look at its activations.")
            tensors[f"{key}/{name}"] = tensor.cpu()
    return tensors
