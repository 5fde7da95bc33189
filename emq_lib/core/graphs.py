"""Traced networks: batch norm folded, the ordered table of quantizable layers, pieces, hooks."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.tracing import is_one_tensor, place, trace


def fold_batchnorm(model: nn.Module) -> torch.fx.GraphModule:
    """Return a traced copy in evaluation mode whose convolutions carry the batch norms' scale and shift.

    The folded network computes the same function; its layers keep their names. Folding multiplies each output channel
    of a weight by a constant, so per-channel quantization is unaffected by it. No operation of the folded network
    writes into a tensor that another one made: see :func:`emq_lib.core.tracing.trace`.

    Args:
        model: network of one tensor; it stays as it is.

    Raises:
        UnsupportedModelError: the network cannot be traced, or not without in-place operations.
    """
    traced = trace(model)
    graph, modules = traced.graph, dict(traced.named_modules())
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    calls = collections.Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op != "call_module" or type(norm := modules[node.target]) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op != "call_module" or type(layer := modules[before.target]) is not nn.Conv2d:
            continue
        if len(before.users) > 1 or calls[before.target] > 1 or before.target in read or not norm.track_running_stats:
            continue
        modules[before.target] = fuse_conv_bn_eval(layer, norm)
        traced.set_submodule(before.target, modules[before.target])
        node.replace_all_uses_with(before)
        graph.erase_node(node)
    return torch.fx.GraphModule(traced, graph).eval()


def describe_layers(
    model: nn.Module, example: torch.Tensor, *, pinned: Mapping[str, int], tied: Mapping[str, str]
) -> pd.DataFrame:
    """Return one row per convolution and linear layer in forward order.

    Args:
        model: the network.
        example: an input of one image, shape (1, C, H, W).
        pinned: layer name -> bits, of the layers outside the search.
        tied: layer name -> layer that it takes its bits from.

    Returns:
        Columns name, kind ("Conv2d" or "Linear"), shape (text), parameters (weights), channels (outputs), biases, macs
        (multiply-accumulates for one image), searchable, slot (position in a configuration, -1 if pinned; a tied layer
        has the slot of the layer that it is tied to), pinned_bits.

    Raises:
        UnsupportedModelError: a layer that runs twice in one pass, two layers that share one weight, a network that
            reads the weight of a layer itself, or a pinned or tied layer that it does not have.
    """
    calls: list[tuple[str, nn.Module, int]] = []

    def record(name: str) -> Callable:
        def hook(module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
            positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else output[0].numel() // output.shape[-1]
            calls.append((name, module, positions * module.weight.numel()))

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    training = [module for module in model.modules() if module.training]
    try:
        with torch.inference_mode():
            model.eval()(example.clone())
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    names = [name for name, _, _ in calls]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UnsupportedModelError(f"Layers {repeated} run more than once in a pass; give each use its own layer.")
    _check_weights_unread(model, names)
    weights = [module.weight for _, module, _ in calls]
    if shared := [name for name, weight in zip(names, weights, strict=True) if sum(weight is w for w in weights) > 1]:
        raise UnsupportedModelError(f"Layers {shared} share one weight; give each its own.")
    if unknown := sorted({*pinned, *tied, *tied.values()} - set(names)):
        raise UnsupportedModelError(f"{unknown} are to be pinned or tied, but the network has the layers {names}.")
    if both := sorted({*pinned} & {*tied}):
        raise UnsupportedModelError(f"Layers {both} are to be pinned and tied; they can have one width only.")
    free = [name for name in names if name not in pinned and name not in tied]
    slots = {name: slot for slot, name in enumerate(free)}
    if homeless := sorted(set(tied.values()) - set(free)):
        raise UnsupportedModelError(f"Layers are tied to {homeless}, which have no bits to share.")
    slots |= {name: slots[target] for name, target in tied.items()}
    rows = []
    for name, module, macs in calls:
        rows.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "shape": "x".join(map(str, module.weight.shape)),
                "parameters": module.weight.numel(),
                "channels": module.weight.shape[0],
                "biases": 0 if module.bias is None else module.bias.numel(),
                "macs": macs,
                "searchable": name in slots,
                "slot": slots.get(name, -1),
                "pinned_bits": pinned.get(name, 0),
            }
        )
    columns = ["name", "kind", "shape", "parameters", "channels", "biases", "macs", "searchable", "slot", "pinned_bits"]
    return pd.DataFrame(rows, columns=columns)


def _check_weights_unread(model: nn.Module, names: Sequence[str]) -> None:
    """Raise UnsupportedModelError if a traced network reads a parameter of a layer outside of the layer itself."""
    for node in model.graph.nodes if isinstance(model, torch.fx.GraphModule) else ():
        if node.op == "get_attr" and node.target.rpartition(".")[0] in names:
            raise UnsupportedModelError(
                f"{place(node)}: the network itself reads {node.target}, which quantizing replaces. Let the layer "
                "alone read it."
            )


_LINEAR_MODULES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.Identity, nn.Flatten, nn.Dropout)
_PIECEWISE_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_PIECEWISE_NAMES = "add cat flatten pad getitem relu relu6 max_pool2d avg_pool2d adaptive_avg_pool2d mean view dropout"


def is_piecewise_linear(model: torch.fx.GraphModule) -> bool:
    """Return whether the logits are known to be piecewise linear in the weight of any one layer.

    So they are if the traced network in evaluation mode has nothing but linear layers, ReLUs, pooling, sums and
    changes of shape. An operation that is not on this list counts as not piecewise linear.

    >>> is_piecewise_linear(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    True
    >>> is_piecewise_linear(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.GELU())))
    False
    """
    names = _PIECEWISE_NAMES.split()
    for node in model.graph.nodes:
        if node.op == "call_module":
            known = isinstance(model.get_submodule(node.target), _LINEAR_MODULES + _PIECEWISE_MODULES)
        elif node.op in ("call_function", "call_method"):
            known = getattr(node.target, "__name__", node.target) in names
        else:
            known = True
        if not known:
            return False
    return True


def segments(model: torch.fx.GraphModule, layers: Sequence[str]) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Cut a traced network into the shortest consecutive pieces that begin with a layer and pass on a single tensor.

    Args:
        model: traced network.
        layers: names of its quantizable layers.

    Returns:
        (piece, names of its layers) in forward order; applying the pieces one after another is applying the network.
    """
    nodes = list(model.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    last_use = [max((position[user] for user in node.users), default=index) for index, node in enumerate(nodes)]
    part, parts, held = 0, {}, [[]]
    for index, node in enumerate(nodes):
        parts[node] = part
        if node.op == "call_module" and node.target in layers:
            held[part].append(node.target)
        alive = [other for other in range(index + 1) if last_use[other] > index]
        following = nodes[min(index + 1, len(nodes) - 1)]
        goes_on = following.op == "get_attr" or (last_use[index] == index + 1 and following.target not in layers)
        if alive == [index] and held[part] and following.op != "output" and not goes_on and is_one_tensor(node):
            part += 1
            held.append([])
    if not held[-1]:
        held.pop()
        parts = {node: min(number, len(held) - 1) for node, number in parts.items()}
    pieces = [[node for node in nodes if parts[node] == number] for number in range(len(held))]
    return [(_piece(model, part), tuple(names)) for part, names in zip(pieces, held, strict=True)]


def _piece(model: torch.fx.GraphModule, nodes: Sequence[torch.fx.Node]) -> torch.fx.GraphModule:
    """Return consecutive nodes of a traced network as a module of the one tensor that they take from before."""
    graph, copies = torch.fx.Graph(), {}

    def copy_of(node: torch.fx.Node) -> torch.fx.Node:
        return copies[node] if node in copies else copies.setdefault(node, graph.placeholder("x"))

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    if nodes[-1].op != "output":
        graph.output(copies[nodes[-1]])
    return torch.fx.GraphModule(model, graph)


@contextlib.contextmanager
def pre_hooks(model: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """Register forward pre-hooks by layer name for the duration of the block.

    Args:
        model: the network.
        hooks: layer name -> function of the layer and its inputs.

    Raises:
        UnsupportedModelError: the network has no layer of a name.
    """
    modules = dict(model.named_modules())
    if unknown := sorted(set(hooks) - set(modules)):
        raise UnsupportedModelError(f"The network has no layers {unknown}: the layer table is of another network.")
    handles = [modules[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
