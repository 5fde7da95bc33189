"""What proxies read: weights, activations, gradients, curvature and quantization errors of every searchable layer.

The network is visited by :mod:`emq_lib.proxies.measuring` and nowhere later: proxies and evolved expressions only read
these numbers, so scoring a thousand of them costs no forward pass. What needs images is stored in the study; what needs
the checkpoint alone (weights, quantization errors) is computed on loading. Explained in chapter 02.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from torch import nn

from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.quantizers import fake_quantize
from emq_lib.proxies.released import ReleasedStatistics, stages

ACTIVATION_IMAGES = 64
FEW_IMAGES = 128  # for what costs a matrix of images, or a pass for every pair of layers
SAMPLE = 4_096  # numbers per layer that are kept of a statistic with one number per weight or input


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the L searchable layers in forward order, at the B choices; batch norm is folded.

    Tensors are float32 on the CPU, arrays float64. Layers that share their bits have one slot; there are S slots.

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
        positive_gradients: R, (C_out, k) per layer: the same of the all-positive network (Synflow's), float64: deep
            networks pass the largest float32.
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
        """Return the sum of the rows of layers that share their bits, (L, ...) -> (S, ...)."""
        summed = np.zeros((self.slot_count, *values.shape[1:]))
        np.add.at(summed, self.slots, values)
        return summed


SAMPLES = ("activations", "gradients", "virtual_gradients", "positive_gradients", "curvature", "channel_products")
NUMBERS = ("trace", "trace_error", "eigenvalue", "similarity", "fisher_error")
NUMBERS += ("output_error", "kl", "loss", "logit_products", "pair_losses")


# What a zero-cost proxy says of each layer -> the part of the measurements that it comes from, and its formula.
SALIENCIES: Mapping[str, tuple[str, str]] = {
    "SNIP": ("gradients", "sum |W * G| (Lee et al. 2019)"),
    "Synflow": ("Synflow", "sum |W * dR/dW| of the all-positive network (Tanaka et al. 2020)"),
    "plain": ("gradients", "sum W * G (Mozer and Smolensky 1989)"),
    "Fisher": ("Fisher", "sum over channels of the squared product of output and gradient (Turner et al. 2020)"),
    "GraSP": ("GraSP", "-sum W * (H g) (Wang et al. 2020)"),
    "grad-norm": ("gradients", "||G|| (Abdelfattah et al. 2021)"),
    "L2": ("errors", "||W|| (Abdelfattah et al. 2021)"),
    "ZiCo": ("ZiCo", "log sum E|g| / std(g) over minibatches (Li et al. 2023)"),
    "Zen": ("Zen", "gain of Gaussian noise (Lin et al. 2021)"),
    "NWOT": ("NWOT", "log det of the kernel of activation patterns (Mellor et al. 2021)"),
}


def sampled_columns(channels: int, columns: int) -> np.ndarray:
    """Return which columns of a (channels, columns) matrix are kept: all, or as many as give 4,096 numbers.

    The same for every statistic of that shape, so that products of statistics meet element by element.
    """
    kept = min(columns, max(1, SAMPLE // channels))
    return np.sort(np.random.default_rng(columns).permutation(columns)[:kept])


def sampled(x: torch.Tensor) -> torch.Tensor:
    """Return the sampled columns of a tensor (..., channels, columns)."""
    return x[..., torch.from_numpy(sampled_columns(*x.shape[-2:])).to(x.device)].contiguous()


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
        stored: as of :func:`emq_lib.proxies.measuring.measure_statistics`.
        choices: the B allowed widths.
        seconds: what was computed -> wall time.

    Raises:
        CorruptArtefactError: a statistic is not among those stored, or is not the finite numbers in the shape that fits
            the layers; the message names it.
    """
    searchable = layers[layers["searchable"]]
    names = tuple(searchable["name"])
    quantized = quantized_weights(model, names, choices)
    weights = tuple(layer_weight(model, name).flatten(1).cpu() for name in names)
    errors = [
        torch.stack([q.flatten(1).cpu() - weight for q in quantized[name]])
        for name, weight in zip(names, weights, strict=True)
    ]
    slots = searchable["slot"].to_numpy()
    by_name = dict(zip(names, weights, strict=True))
    _check_stored(stored, _expected_shapes(len(names), int(slots.max()) + 1, len(choices), by_name))
    return LayerStatistics(
        choices=tuple(choices),
        names=names,
        slots=slots,
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


def _check_stored(stored: Mapping[str, torch.Tensor], expected: Mapping[str, Sequence[int | None]]) -> None:
    """Refuse statistics that lack one of those expected, or hold it in another shape, or NaN or infinity."""
    for name, shape in expected.items():
        if name not in stored:
            raise CorruptArtefactError(f"The statistics lack {name!r}: measure them again.")
        found = tuple(stored[name].shape)
        if len(found) != len(shape) or any(want not in (None, size) for size, want in zip(found, shape, strict=True)):
            raise CorruptArtefactError(f"{name!r} has shape {found}, which does not fit the layers: measure it again.")
        if name.partition("/")[0] in SAMPLES and not stored[name].is_floating_point():
            raise CorruptArtefactError(f"{name!r} holds {stored[name].dtype} numbers: measure the statistics again.")
        if not torch.isfinite(stored[name]).all():
            raise CorruptArtefactError(f"{name!r} holds NaN or infinity: measure the statistics again.")


def _expected_shapes(
    layers: int, slots: int, choices: int, weights: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int | None, ...]]:
    """Return the shape of every stored statistic; None where any size will do."""
    of_layers, of_slots, pairs = (layers, choices), (slots, choices), (slots * choices,) * 2
    shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(NUMBERS, (layers,))
    shapes |= {"fisher_error": of_layers, "output_error": of_layers, "kl": of_slots, "loss": of_slots}
    shapes |= {"logit_products": pairs, "pair_losses": pairs}
    shapes |= {f"saliency {name}": (layers,) for name in SALIENCIES}
    shapes |= {f"released {field.name}": (None,) for field in fields(ReleasedStatistics) if field.name != "seconds"}
    shapes |= {f"released {branch}_branch": (None, choices) for branch in ("gradient", "weight")}
    for name, weight in weights.items():
        kept = (len(weight), len(sampled_columns(*weight.shape)))
        shapes |= {f"{key}/{name}": kept for key in SAMPLES}
        shapes |= {f"activations/{name}": (None, None), f"channel_products/{name}": (len(weight), None)}
    return shapes


def _with_prefix(stored: Mapping[str, torch.Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): stored[key].numpy() for key in stored if key.startswith(prefix)}


def layer_weight(model: nn.Module, name: str) -> torch.Tensor:
    """Return a layer's weight, detached, (C_out, ...) one row after another in memory."""
    return model.get_submodule(name).weight.detach().contiguous()


def quantized_weights(model: nn.Module, names: Sequence[str], choices: Sequence[int]) -> dict[str, list[torch.Tensor]]:
    """Return layer name -> its weight rounded to nearest at each width.

    Raises:
        InvalidBitsError: a width outside 1 to 8.
    """
    return {name: [fake_quantize(layer_weight(model, name), bits) for bits in choices] for name in names}
