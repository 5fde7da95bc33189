"""What proxies read: weights, activations, gradients, curvature and quantization errors of every searchable layer.

The network is visited here and nowhere later: proxies and evolved expressions only read these numbers, so scoring a
thousand of them costs no forward pass. What needs images is stored in the study; what needs the checkpoint alone
(weights, quantization errors) is computed on loading. Explained in chapter 02.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from emq_lib.artefacts import checked_path, read_facts, record, save_tensors, sha256, study_folder
from emq_lib.datasets import Split
from emq_lib.errors import CorruptArtefactError
from emq_lib.models import INPUT_SHAPES, fold_batchnorm, layer_table, load_checkpoint, pre_hooks, segments
from emq_lib.profiles import Profile
from emq_lib.quantizers import fake_quantize

ACTIVATION_IMAGES, ACTIVATION_POSITIONS = 64, 256


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the S searchable layers in slot order, at the B choices; batch norm is folded.

    Attributes:
        choices: the B allowed widths.
        names: layer names.
        parameters: weights per layer, shape (S,).
        macs: multiply-accumulates per layer for one image, shape (S,).
        weights: W, (C_out, K) per layer.
        activations: A, (C_in, M) per layer: a fixed sample of the layer's inputs.
        gradients: G, (C_out, K) per layer: gradient of the mean cross-entropy on the calibration images.
        curvature: H, (C_out, K) per layer: diagonal of the empirical Fisher, the mean squared gradient per image.
        errors: E, (B, C_out, K) per layer: Q_b(W) - W.
        trace: trace of the Hessian of the mean cross-entropy per layer, shape (S,).
        trace_error: its standard error over the calibration images, shape (S,).
        synflow: sum of |W * dR/dW| per layer, shape (S,) (Tanaka et al. 2020).
        output_error: ||(Q_b(W) - W) x||^2 / ||W x||^2 over the calibration images, shape (S, B).
        kl: Kullback-Leibler divergence in nats of the predictions when one layer alone is quantized, shape (S, B).
        seconds: what was computed -> wall time.
    """

    choices: tuple[int, ...]
    names: tuple[str, ...]
    parameters: np.ndarray
    macs: np.ndarray
    weights: tuple[torch.Tensor, ...]
    activations: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]
    curvature: tuple[torch.Tensor, ...]
    errors: tuple[torch.Tensor, ...]
    trace: np.ndarray
    trace_error: np.ndarray
    synflow: np.ndarray
    output_error: np.ndarray
    kl: np.ndarray
    seconds: Mapping[str, float]


def per_image_gradients(
    model: nn.Module,
    names: Sequence[str],
    inputs: torch.Tensor,
    seeds: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> Iterator[list[torch.Tensor]]:
    """Yield, per seed, each named layer's weight gradient for every single image.

    One forward pass serves all seeds. A convolution's gradient for one image is the product of the gradient at its
    output with the unfolded input, so that a batched matrix product gives those of all images.

    Args:
        model: the network.
        names: layers.
        inputs: shape (N, C, H, W).
        seeds: logits (N, classes) -> gradients at the logits, each (N, classes).

    Yields:
        one tensor (N, C_out, K) per layer.
    """
    seen: dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = (module, _unfolded(module, args[0].detach()), output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        logits = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [seen[name][2] for name in names]
    for seed in seeds(logits.detach()):
        gradients = torch.autograd.grad(logits, outputs, grad_outputs=seed, retain_graph=True)
        yield [
            torch.bmm(gradient.reshape(*gradient.shape[:2], -1), seen[name][1])
            for name, gradient in zip(names, gradients, strict=True)
        ]


def gradient_moments(
    model: nn.Module, names: Sequence[str], split: Split, *, batch_size: int = 32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the mean and the mean square over images of the cross-entropy's gradient, per named layer.

    The mean is G; the mean square is the diagonal of the empirical Fisher matrix, H = (1/N) sum_n (dl_n/dW)^2, with the
    true labels.

    Returns:
        two lists of tensors (C_out, K).
    """
    first: list = [0.0] * len(names)
    second: list = [0.0] * len(names)
    for start in range(0, len(split), batch_size):
        batch = split[start : start + batch_size]
        seeds = functools.partial(_cross_entropy_seed, labels=batch.labels)
        for gradients in per_image_gradients(model, names, batch.inputs(), seeds):
            first = [total + g.sum(dim=0) / len(split) for total, g in zip(first, gradients, strict=True)]
            second = [total + g.square().sum(dim=0) / len(split) for total, g in zip(second, gradients, strict=True)]
    return first, second


def hessian_traces(
    model: nn.Module, names: Sequence[str], split: Split, *, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Return the trace of each layer's block of the Hessian of the mean cross-entropy, and its standard error.

    The logits of a network of linear layers, ReLUs and averages are piecewise linear in the weight of any one layer, so
    its block of the Hessian is J' S J almost everywhere, with J the Jacobian of the logits and S = diag(p) - p p' the
    Hessian of the cross-entropy at the logits. S = sum_k s_k s_k' with s_k = sqrt(p_k) (e_k - p), hence

        tr H_l = (1/N) sum_n sum_k ||J' s_k||^2:

    one backward pass per class gives the traces of all layers exactly, with none of the noise of random probes. The
    standard error is that of the mean over images.

    Returns:
        two float64 arrays of shape (S,).
    """
    per_image = []
    for start in range(0, len(split), batch_size):
        batch = split[start : start + batch_size]
        per_seed = [
            torch.stack([g.double().square().sum(dim=(1, 2)) for g in gradients])
            for gradients in per_image_gradients(model, names, batch.inputs(), _hessian_seeds)
        ]
        per_image.append(torch.stack(per_seed).sum(dim=0))
    traces = torch.cat(per_image, dim=1)
    return traces.mean(dim=1).numpy(), (traces.std(dim=1) / len(split) ** 0.5).numpy()


def _cross_entropy_seed(logits: torch.Tensor, *, labels: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradient of the summed cross-entropy at the logits."""
    return [logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])]


def _hessian_seeds(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return the columns of a square root of the cross-entropy's Hessian at the logits."""
    p = logits.softmax(dim=1)
    basis = torch.eye(p.shape[1], device=p.device)
    return [p[:, k : k + 1].sqrt() * (basis[k] - p) for k in range(p.shape[1])]


def _unfolded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return a layer's input as (N, positions, K): one row per output position, one column per weight."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    return x[:, None, :]


def synflow_scores(model: nn.Module, names: Sequence[str], input_shape: tuple[int, ...]) -> np.ndarray:
    """Return sum |W * dR/dW| per named layer, R the sum of outputs of the all-positive network on an all-ones image.

    Tanaka et al. 2020, in double precision; needs no data. Shape (S,).
    """
    positive = {key: value.detach().double().abs() for key, value in model.state_dict().items()}
    tracked = [positive[f"{name}.weight"].requires_grad_(True) for name in names]
    total = functional_call(model, positive, (torch.ones(1, *input_shape, dtype=torch.float64),)).sum()
    gradients = torch.autograd.grad(total, tracked)
    return np.array([(w * g).abs().sum().item() for w, g in zip(tracked, gradients, strict=True)])


@torch.inference_mode()
def activation_samples(model: nn.Module, names: Sequence[str], split: Split) -> list[torch.Tensor]:
    """Return a fixed sample of each named layer's inputs on the first images of a split, shape (C_in, M)."""
    samples = {}

    def take(name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            channels = inputs[0].transpose(0, 1).flatten(1)
            stride = max(1, channels.shape[1] // ACTIVATION_POSITIONS)
            samples[name] = channels[:, ::stride][:, :ACTIVATION_POSITIONS].clone()

        return hook

    with pre_hooks(model, {name: take(name) for name in names}):
        model(split[:ACTIVATION_IMAGES].inputs())
    return [samples[name].contiguous() for name in names]


@torch.inference_mode()
def output_errors(
    model: nn.Module, errors: Mapping[str, Sequence[torch.Tensor]], split: Split, *, batch_size: int = 256
) -> np.ndarray:
    """Return ||E_b x||^2 / ||W x||^2 per layer and choice, x the float network's inputs of that layer, shape (S, B).

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


@torch.inference_mode()
def one_layer_kl(
    model: torch.fx.GraphModule, quantized: Mapping[str, Sequence[torch.Tensor]], split: Split, *, batch_size: int = 256
) -> np.ndarray:
    """Return the mean KL divergence from the float predictions when one layer alone takes a quantized weight.

    The layers before the quantized one are computed once per batch.

    Args:
        model: folded float network; its weights are changed and restored.
        quantized: layer name -> one weight per choice.
        split: images.
        batch_size: images per forward pass.

    Returns:
        nats, shape (S, B), rows in the order of `quantized`.
    """
    pieces = segments(model, list(quantized))
    row_of = {name: row for row, name in enumerate(quantized)}
    total = np.zeros((len(quantized), len(next(iter(quantized.values())))))
    for start in range(0, len(split), batch_size):
        outputs = [split[start : start + batch_size].inputs()]
        for piece, _ in pieces:
            outputs.append(piece(outputs[-1]))
        reference = F.log_softmax(outputs[-1].double(), dim=1)
        for number, (_, names) in enumerate(pieces):
            for name in names:
                module = model.get_submodule(name)
                original = module.weight.data
                for column, weight in enumerate(quantized[name]):
                    module.weight.data = weight
                    x = outputs[number]
                    for piece, _ in pieces[number:]:
                        x = piece(x)
                    changed = F.log_softmax(x.double(), dim=1)
                    total[row_of[name], column] += F.kl_div(changed, reference, reduction="sum", log_target=True).item()
                module.weight.data = original
    return total / len(split)


def measure_statistics(profile: Profile, calibration: Split) -> dict[str, torch.Tensor | dict[str, float]]:
    """Compute everything that needs images or many passes through the network; explained in chapter 02.

    Args:
        profile: the study; its checkpoint must exist.
        calibration: the calibration images.

    Returns:
        name -> tensor as stored in ``statistics.safetensors``, and "seconds": name -> wall time.
    """
    model, layers = _load_folded(profile)
    names = list(layers.loc[layers["searchable"], "name"])
    seconds: dict[str, float] = {}
    stored: dict[str, torch.Tensor] = {}
    with _timed(seconds, "errors"):
        quantized = _quantized_weights(model, names, profile.choices)
        errors = {name: [weight - _weight(model, name) for weight in quantized[name]] for name in names}
    with _timed(seconds, "gradients"):
        moments = dict(zip(("gradients", "curvature"), gradient_moments(model, names, calibration), strict=True))
    with _timed(seconds, "activations"):
        moments["activations"] = activation_samples(model, names, calibration)
    for key, tensors in moments.items():
        stored |= {f"{key}/{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
    with _timed(seconds, "trace"):
        traces = hessian_traces(model, names, calibration)
        stored["trace"], stored["trace_error"] = map(torch.from_numpy, traces)
    with _timed(seconds, "synflow"):
        stored["synflow"] = torch.from_numpy(synflow_scores(model, names, INPUT_SHAPES[profile.dataset]))
    with _timed(seconds, "output_error"):
        stored["output_error"] = torch.from_numpy(output_errors(model, errors, calibration))
    with _timed(seconds, "kl"):
        stored["kl"] = torch.from_numpy(one_layer_kl(model, quantized, calibration))
    return stored | {"seconds": seconds}


def build_statistics(profile: Profile, calibration: Split) -> None:
    """Measure the statistics and write ``statistics.safetensors``."""
    stored = measure_statistics(profile, calibration)
    seconds = stored.pop("seconds")
    facts = {"seconds": seconds, "checkpoint": sha256(study_folder(profile) / "model.safetensors")}
    save_tensors(profile, "statistics.safetensors", stored, facts)
    command = f"emq_lib.layer_statistics.build_statistics on {profile.name}"
    record(profile, "statistics.safetensors", command=command, seconds=sum(seconds.values()))


def load_statistics(profile: Profile) -> LayerStatistics:
    """Load a study's statistics; weights and quantization errors come from its checkpoint. Needs no images.

    Raises:
        MissingArtefactError: the statistics were not built.
        CorruptArtefactError: they belong to another checkpoint, or the file is truncated.
    """
    path, checkpoint = (checked_path(profile, name) for name in ("statistics.safetensors", "model.safetensors"))
    model, layers = _load_folded(profile)
    searchable = layers[layers["searchable"]]
    names = tuple(searchable["name"])
    stored, facts = load_file(str(path)), read_facts(profile, "statistics.safetensors")
    if facts["checkpoint"] != sha256(checkpoint):
        raise CorruptArtefactError(f"{path} was measured on another checkpoint. Build it again with REBUILD=True.")
    quantized = _quantized_weights(model, names, profile.choices)
    weights = tuple(_weight(model, name).flatten(1) for name in names)
    return LayerStatistics(
        choices=profile.choices,
        names=names,
        parameters=searchable["parameters"].to_numpy(),
        macs=searchable["macs"].to_numpy(),
        weights=weights,
        errors=tuple(
            torch.stack([q.flatten(1) - weight for q in quantized[name]])
            for name, weight in zip(names, weights, strict=True)
        ),
        activations=tuple(stored[f"activations/{name}"] for name in names),
        gradients=tuple(stored[f"gradients/{name}"] for name in names),
        curvature=tuple(stored[f"curvature/{name}"] for name in names),
        **{key: stored[key].numpy() for key in ("trace", "trace_error", "synflow", "output_error", "kl")},
        seconds=facts["seconds"],
    )


def _load_folded(profile: Profile) -> tuple[torch.fx.GraphModule, pd.DataFrame]:
    model = fold_batchnorm(load_checkpoint(profile, checked_path(profile, "model.safetensors")))
    return model, layer_table(model, profile)


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
