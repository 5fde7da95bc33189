"""What proxies read: weights, activations, gradients, curvature and quantization errors of every searchable layer.

The network is visited here and nowhere later: proxies and evolved expressions only read these numbers, so scoring a
thousand of them costs no forward pass. What needs images is stored in the study; what needs the checkpoint alone
(weights, quantization errors) is computed on loading. Explained in chapter 02.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import pre_hooks
from emq_lib.core.quantizers import fake_quantize
from emq_lib.proxies import curvature, saliency
from emq_lib.proxies.passes import _losses, divergences, logit_products, one_slot_logits, pair_losses
from emq_lib.proxies.released import ReleasedStatistics, stages

ACTIVATION_IMAGES = 64
FEW_IMAGES = 128  # for what costs a matrix of images, or a pass for every pair of layers
SAMPLE = 4_096  # numbers per layer that are kept of a statistic with one number per weight or input


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the L searchable layers in forward order, at the B choices; batch norm is folded.

    Layers that share their bits have one slot; there are S slots.

    Attributes:
        choices: the B allowed widths.
        names: layer names.
        slots: slot of each layer, shape (L,).
        parameters: weights per layer, shape (L,).
        macs: multiply-accumulates per layer for one image, shape (L,).
        weights: W, (C_out, K) per layer.
        errors: E, (B, C_out, K) per layer: Q_b(W) - W.
        activations: A, (C_in, M) per layer: a sample of the layer's inputs.
        gradients: G, (C_out, k) per layer: gradient of the mean cross-entropy on the calibration images, on the k
            columns of the weight that :func:`sampled_columns` names.
        virtual_gradients: V, (C_out, k) per layer: gradient of the summed logits of an all-ones image.
        positive_gradients: R, (C_out, k) per layer: the same of the all-positive network (Synflow's).
        curvature: H, (C_out, k) per layer: diagonal of the empirical Fisher, the mean squared gradient per image.
        channel_products: C, (C_out, n) per layer: output times its gradient, summed over positions, per image.
        trace: trace of the Hessian of the mean cross-entropy per layer, shape (L,).
        trace_error: its standard error over the calibration images, shape (L,).
        eigenvalue: largest eigenvalue of the same block, on 128 images, shape (L,).
        similarity: CKA of each layer's output with every other layer's, summed, on 128 images, shape (L,).
        saliencies: name -> what a zero-cost proxy says of each layer, shape (L,).
        fisher_error: sum F * (Q_b(W) - W)^2 over all weights, F the diagonal of the empirical Fisher, shape (L, B).
        output_error: ||(Q_b(W) - W) x||^2 / ||W x||^2 over the calibration images, shape (L, B).
        kl: Kullback-Leibler divergence in nats of the predictions when one slot alone is quantized, shape (S, B).
        loss: what the cross-entropy on the calibration images gains thereby, shape (S, B).
        logit_products: mean over images of d' S d*, with d and d* what two slots' quantization does to the logits and
            S = diag(p) - p p' of the float predictions, shape (S B, S B).
        pair_losses: what two slots' quantization adds to the cross-entropy beyond the sum of each alone, on 128 images;
            on the diagonal what each adds alone; shape (S B, S B).
        released: what the released code reads of a random network.
        seconds: what was computed -> wall time.
    """

    choices: tuple[int, ...]
    names: tuple[str, ...]
    slots: np.ndarray
    parameters: np.ndarray
    macs: np.ndarray
    weights: tuple[torch.Tensor, ...]
    errors: tuple[torch.Tensor, ...]
    activations: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]
    virtual_gradients: tuple[torch.Tensor, ...]
    positive_gradients: tuple[torch.Tensor, ...]
    curvature: tuple[torch.Tensor, ...]
    channel_products: tuple[torch.Tensor, ...]
    trace: np.ndarray
    trace_error: np.ndarray
    eigenvalue: np.ndarray
    similarity: np.ndarray
    saliencies: Mapping[str, np.ndarray]
    fisher_error: np.ndarray
    output_error: np.ndarray
    kl: np.ndarray
    loss: np.ndarray
    logit_products: np.ndarray
    pair_losses: np.ndarray
    released: ReleasedStatistics
    seconds: Mapping[str, float]

    @property
    def slot_count(self) -> int:
        """S, the length of a configuration."""
        return int(self.slots.max()) + 1

    @property
    def slot_names(self) -> list[str]:
        """Name of the first layer of each slot."""
        return [self.names[int(np.flatnonzero(self.slots == slot)[0])] for slot in range(self.slot_count)]

    @property
    def stages(self) -> np.ndarray:
        """Resolution stage of each layer, counted from the network's end, shape (L,)."""
        return stages(self.macs / self.parameters)

    def per_slot(self, values: np.ndarray) -> np.ndarray:
        """Sum the rows of layers that share their bits, (L, ...) -> (S, ...)."""
        summed = np.zeros((self.slot_count, *values.shape[1:]))
        np.add.at(summed, self.slots, values)
        return summed


SAMPLES = ("activations", "gradients", "virtual_gradients", "positive_gradients", "curvature", "channel_products")
NUMBERS = ("trace", "trace_error", "eigenvalue", "similarity", "fisher_error")
NUMBERS += ("output_error", "kl", "loss", "logit_products", "pair_losses")


def sampled_columns(channels: int, columns: int) -> np.ndarray:
    """Return which columns of a (channels, columns) matrix are kept: all, or as many as give 4,096 numbers.

    The same for every statistic of that shape, so that products of statistics meet element by element.
    """
    kept = min(columns, max(1, SAMPLE // channels))
    return np.sort(np.random.default_rng(columns).permutation(columns)[:kept])


def sampled(x: torch.Tensor) -> torch.Tensor:
    """Return the sampled columns of a tensor (..., channels, columns)."""
    return x[..., torch.from_numpy(sampled_columns(*x.shape[-2:])).to(x.device)].contiguous()


@torch.inference_mode()
def activation_samples(model: nn.Module, names: Sequence[str], split: Split) -> list[torch.Tensor]:
    """Return a sample of each named layer's inputs on the first images of a split, shape (C_in, M)."""
    samples = {}

    def take(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].movedim(-1, 1) if isinstance(module, nn.Linear) else inputs[0]
            samples[name] = sampled(x.transpose(0, 1).flatten(1))

        return hook

    with pre_hooks(model, {name: take(name) for name in names}):
        model(split[:ACTIVATION_IMAGES].inputs())
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
    """
    energy = {name: torch.zeros(1 + len(tensors), dtype=torch.float64) for name, tensors in errors.items()}

    def accumulate(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for row, weight in enumerate((module.weight, *errors[name])):
                energy[name][row] += _linear_part(module, inputs[0], weight).double().square().sum().item()

        return hook

    with pre_hooks(model, {name: accumulate(name) for name in errors}):
        for start in range(0, len(split), batch_size):
            model(split[start : start + batch_size].inputs())
    return np.stack([(row[1:] / row[0]).numpy() for row in energy.values()])


def measure_statistics(
    model: torch.fx.GraphModule,
    layers: pd.DataFrame,
    calibration: Split,
    *,
    choices: Sequence[int],
    released: ReleasedStatistics,
    streams: Callable[[str], torch.Generator],
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Compute everything that needs images or many passes through the network; explained in chapter 02.

    Args:
        model: network with folded batch norm, on the device of the images.
        layers: its layer table.
        calibration: the calibration images.
        choices: the B allowed widths.
        released: what the released code reads, see :func:`emq_lib.proxies.released.measure_released`.
        streams: name of what is drawn ("traces", "zen") -> source of randomness.

    Returns:
        name -> tensor, as :func:`assemble_statistics` takes them; and what was computed -> wall time in seconds.

    Raises:
        InvalidParameterError: all images are of one class.
        UnsupportedModelError: a statistic is NaN or infinite; the message names it and the layer.
    """
    if len(calibration.labels.unique()) < 2:
        raise InvalidParameterError("All calibration images are of one class, so gradients say nothing; draw others.")
    searchable = layers[layers["searchable"]]
    names, few, shape = list(searchable["name"]), calibration[:FEW_IMAGES], tuple(calibration.images.shape[1:])
    members = [list(group) for _, group in searchable.groupby("slot")["name"]]
    seconds: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {}
    tensors: dict[str, Sequence[torch.Tensor]] = {}
    with _timed(seconds, "errors"):
        quantized = _quantized_weights(model, names, choices)
        errors = {name: [weight - _weight(model, name) for weight in quantized[name]] for name in names}
    with _timed(seconds, "gradients"):
        gradients, fisher = curvature.gradient_moments(model, names, calibration)
        arrays["fisher_error"] = np.array(
            [
                [(f * e.flatten(1).square()).double().sum().item() for e in errors[name]]
                for name, f in zip(names, fisher, strict=True)
            ]
        )
    tensors |= {"gradients": [sampled(g) for g in gradients], "curvature": [sampled(f) for f in fisher]}
    with _timed(seconds, "virtual_gradients"):
        tensors["virtual_gradients"] = [sampled(v) for v in saliency.virtual_gradients(model, names, shape)]
    with _timed(seconds, "positive_gradients"):
        tensors["positive_gradients"] = [sampled(r).float() for r in saliency.positive_gradients(model, names, shape)]
    with _timed(seconds, "channel_products"):
        tensors["channel_products"] = [sampled(c) for c in saliency.channel_products(model, names, few)]
    with _timed(seconds, "activations"):
        tensors["activations"] = activation_samples(model, names, calibration)
    with _timed(seconds, "trace"):
        traces = curvature.hessian_traces(model, names, calibration, generator=streams("traces"))
        arrays["trace"], arrays["trace_error"] = traces
    with _timed(seconds, "eigenvalue"):
        arrays["eigenvalue"] = curvature.top_eigenvalues(model, names, few)
    with _timed(seconds, "similarity"):
        arrays["similarity"] = saliency.linear_cka(model, names, few).sum(axis=1) - 1
    pairs = [(_weight(model, name).flatten(1), g) for name, g in zip(names, gradients, strict=True)]
    measures: dict[str, Callable[[], list | np.ndarray]] = {
        "SNIP": lambda: [(w * g).abs().sum() for w, g in pairs],
        "plain": lambda: [(w * g).sum() for w, g in pairs],
        "grad-norm": lambda: [g.norm() for _, g in pairs],
        "L2": lambda: [w.norm() for w, _ in pairs],
        "Synflow": lambda: saliency.synflow(model, names, shape),
        "Fisher": lambda: saliency.channel_fisher(model, names, few),
        "GraSP": lambda: saliency.grasp(model, names, few),
        "ZiCo": lambda: saliency.zico(model, names, calibration),
        "Zen": lambda: saliency.zen(model, names, shape, images=len(few), generator=streams("zen")),
        "NWOT": lambda: saliency.nwot(model, names, few),
    }
    for name, measure in measures.items():
        with _timed(seconds, name):
            arrays[f"saliency {name}"] = np.array([float(value) for value in measure()])
    with _timed(seconds, "output_error"):
        arrays["output_error"] = output_errors(model, errors, calibration)
    with _timed(seconds, "one_slot"):
        float_logits, logits = one_slot_logits(model, members, quantized, calibration)
        arrays["kl"] = divergences(float_logits, logits)
        arrays["loss"] = _losses(float_logits, logits, calibration.labels)
        arrays["logit_products"] = logit_products(float_logits, logits)
    with _timed(seconds, "pair_losses"):
        arrays["pair_losses"] = pair_losses(model, members, quantized, few)
    arrays |= {f"released {key}": array for key, array in asdict(released).items() if key != "seconds"}
    seconds["released"] = released.seconds
    _refuse_infinite(tensors, arrays, names)
    stored = {f"{key}/{name}": tensor for key in tensors for name, tensor in zip(names, tensors[key], strict=True)}
    stored |= {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
    return stored, seconds


def assemble_statistics(
    model: torch.fx.GraphModule,
    layers: pd.DataFrame,
    stored: Mapping[str, torch.Tensor],
    choices: Sequence[int],
    seconds: Mapping[str, float],
) -> LayerStatistics:
    """Put together what was measured and what follows from the weights alone.

    Args:
        model: network with folded batch norm.
        layers: its layer table.
        stored: as of :func:`measure_statistics`.
        choices: the B allowed widths.
        seconds: what was computed -> wall time.

    Raises:
        KeyError: a statistic is not among those stored.
    """
    searchable = layers[layers["searchable"]]
    names = tuple(searchable["name"])
    quantized = _quantized_weights(model, names, choices)
    weights = tuple(_weight(model, name).flatten(1) for name in names)
    errors = [
        torch.stack([q.flatten(1) - weight for q in quantized[name]])
        for name, weight in zip(names, weights, strict=True)
    ]
    return LayerStatistics(
        choices=tuple(choices),
        names=names,
        slots=searchable["slot"].to_numpy(),
        parameters=searchable["parameters"].to_numpy(),
        macs=searchable["macs"].to_numpy(),
        weights=weights,
        errors=tuple(errors),
        **{key: tuple(stored[f"{key}/{name}"] for name in names) for key in SAMPLES},
        **{key: stored[key].numpy() for key in NUMBERS},
        saliencies=_with_prefix(stored, "saliency "),
        released=ReleasedStatistics(**_with_prefix(stored, "released "), seconds=seconds.get("released", 0.0)),
        seconds=seconds,
    )


def _with_prefix(stored: Mapping[str, torch.Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): stored[key].numpy() for key in stored if key.startswith(prefix)}


def _refuse_infinite(
    tensors: Mapping[str, Sequence[torch.Tensor]], arrays: Mapping[str, np.ndarray], names: Sequence[str]
) -> None:
    for key, per_layer in tensors.items():
        for name, tensor in zip(names, per_layer, strict=True):
            if not torch.isfinite(tensor).all():
                raise UnsupportedModelError(f"{key} of layer {name!r} hold NaN or infinity; look at its activations.")
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            where = repr(names[row]) if len(array) == len(names) else f"in row {row}"
            raise UnsupportedModelError(f"{key} is NaN or infinite at {where}; look at that layer's activations.")


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.detach().contiguous()


def _quantized_weights(model: nn.Module, names: Sequence[str], choices: Sequence[int]) -> dict[str, list[torch.Tensor]]:
    return {name: [fake_quantize(_weight(model, name), bits) for bits in choices] for name in names}


def _linear_part(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply a layer with another weight and no bias."""
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)
    return F.linear(x, weight)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Enter the wall time of the block under `key`."""
    started = time.perf_counter()
    yield
    seconds[key] = time.perf_counter() - started
