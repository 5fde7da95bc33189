"""One configuration, layer after layer: each is rounded on what the quantized layers before it pass on.

A layer sees other inputs x^ than in the float network, where they are x. The weight that makes up for it, as far as a
linear layer can, is T = W E[x x^'] E[x^ x^']^-1: its output on x^ is nearest to W x. It is T, drawn a little towards W,
that is rounded on the moments of x^ (so do GPTAQ, Li et al. 2025, and Qronos, Zhang et al. 2025). So errors do not add
up from layer to layer. Both networks are walked through together, node after node, so that every layer runs once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import nn

from emq_lib.core.bank import WeightBank, build_weight_bank
from emq_lib.core.datasets import Split
from emq_lib.core.networks import QuantizedLayer, QuantizedNetwork
from emq_lib.core.quantizers import ActivationRange, QuantizedWeight
from emq_lib.quantization.learned import learn_weight
from emq_lib.quantization.moments import patches, positions_per_image
from emq_lib.quantization.prepare import check_layers, checked_images

RIDGE = 0.1  # of the mean of M's diagonal: how strongly T is drawn to W
BATCH = 64  # images at a time


@torch.no_grad()
def round_in_order(
    model: torch.fx.GraphModule,
    layers: pd.DataFrame,
    config: Sequence[int],
    calibration: Split,
    ranges: Mapping[str, ActivationRange],
) -> QuantizedNetwork:
    """Round one configuration layer after layer, and return its quantized network.

    Takes one pass of the float and one of the quantized network over the images, whose values stay in memory from the
    node that makes them to the last that reads them.

    Args:
        model: network with folded batch norm; it is not changed.
        layers: its layer table; pinned layers are rounded to nearest.
        config: bits, S of them.
        calibration: the calibration images; they stay as they are.
        ranges: layer name -> range of its input.

    Raises:
        InvalidBitsError, ConfigLengthError: the configuration is none of this network's.
        InvalidParameterError: no calibration images, or with NaN; a layer without a range.
        UnsupportedModelError: see :func:`emq_lib.quantization.prepare.check_layers`.
    """
    check_layers(model, layers, ranges)
    images = checked_images(calibration).inputs()
    model = copy.deepcopy(model).requires_grad_(False)
    nearest = build_weight_bank(model, layers, sorted(set(map(int, config))))
    weights, modules = nearest.select(config), dict(model.named_modules())
    walks = [(_start(model, batch), _start(model, batch)) for batch in images.split(BATCH)]
    for node in model.graph.nodes:
        quantized = None
        if node.op == "call_module" and node.target in weights:
            layer, seen = modules[node.target], ranges[node.target]
            if node.target in nearest.searchable:
                pairs = [tuple(_input(walk, node) for walk in pair) for pair in walks]
                weights[node.target] = _rounded(layer, weights[node.target].bits, pairs, seen, len(images))
            weight = weights[node.target]
            quantized = QuantizedLayer(layer, {weight.bits: weight}, seen)
        for exact, changed in walks:
            changed.env[node] = changed.run_node(node) if quantized is None else quantized(_input(changed, node))
            exact.env[node] = exact.run_node(node)
            for walk in (exact, changed):
                for read in walk.user_to_last_uses.get(node, ()):
                    del walk.env[read]
    return QuantizedNetwork(model, WeightBank.of(weights), ranges)


def _start(model: torch.fx.GraphModule, images: torch.Tensor) -> torch.fx.Interpreter:
    """Return a walk through a network that stands before its first node."""
    walk = torch.fx.Interpreter(model)
    walk.args_iter = iter((images,))
    return walk


def _input(walk: torch.fx.Interpreter, node: torch.fx.Node) -> torch.Tensor:
    """Return what a layer is given on a walk."""
    args, kwargs = walk.fetch_args_kwargs_from_env(node)
    return args[0] if args else kwargs["input"]


def _rounded(
    layer: nn.Conv2d | nn.Linear,
    bits: int,
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    seen: ActivationRange,
    images: int,
) -> QuantizedWeight:
    """Round a layer's weight on inputs of the quantized network, towards its output on those of the float one."""
    most, both, own, count = positions_per_image(layer, images), 0, 0, 0
    for exact, changed in inputs:
        x, y = (patches(layer, each, most) for each in (exact, seen.fake_quantize(changed)))
        both, own, count = both + (x @ y.mT).double(), own + (y @ y.mT).double(), count + y.shape[-1]
    both, own = both / count, own / count
    weight = layer.weight.double().flatten(1).unflatten(0, (len(own), -1))
    ridge = RIDGE * own.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    pull = torch.diag_embed(ridge[:, None].expand(-1, own.shape[-1]))
    target = torch.linalg.solve(own + pull, weight @ (both + pull), left=False)
    return learn_weight(layer.weight, (bits,), own, target=target.reshape(layer.weight.shape))[0]
