"""Tracing a network into a graph without in-place operations.

What is computed from a traced network keeps tensors: the input of a layer, the output of a piece. An operation that
overwrites one of them would change what was kept, so each is replaced by its out-of-place form.
"""

from __future__ import annotations

import copy
import linecache
import operator
import os
import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.errors import UnsupportedModelError

_AUGMENTED = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
_FILLING = {"zero_": torch.zeros_like, "fill_": torch.full_like}
_MISNAMED = ("bernoulli_", "resize_", "resize_as_")  # the name without the line is another operation's
_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation mode they return their input itself
_VIEWING = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_MEASURES = ("size", "dim", "ndimension", "numel", "nelement", "item", "stride", "is_contiguous")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_VIEW_ATTRIBUTES = ("data", "T", "mT", "H", "mH", "real", "imag")


class _Proxy(torch.fx.Proxy):
    """A traced value that tells ``x += y``, which others see who hold `x`, from ``x = x + y``."""

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _augmented(target: Callable) -> Callable:
    def method(self: _Proxy, other: object) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _target in _AUGMENTED:
    setattr(_Proxy, f"__{_target.__name__}__", _augmented(_target))


class _Tracer(torch.fx.Tracer):
    """Traces a function of one tensor: further arguments take their defaults."""

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        node.meta["line"] = _line_outside_torch()
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: object = None
    ) -> tuple[Callable, list]:
        def of_one_tensor(root: nn.Module, x: torch.fx.Proxy) -> object:
            return root_fn(root, x)

        return super().create_args_for_root(of_one_tensor, is_module)


def trace(model: nn.Module) -> torch.fx.GraphModule:
    """Return a copy of a network, in evaluation mode, as a graph of out-of-place operations.

    In-place modules, functions, methods and augmented assignments are replaced, and whoever reads an overwritten
    tensor later reads the new one: the graph computes the same function, and writes to nobody's tensor. Its
    convolutions pad by numbers of zeros; an operation before them pads in any other way.

    Args:
        model: network of one tensor, which `torch.fx` can trace; it stays as it is.

    Raises:
        UnsupportedModelError: the network cannot be traced, or an operation overwrites what is read later through
            another view, or a part of the network itself; the message names it and its line.
    """
    model = copy.deepcopy(model).eval()
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the network's own code raises on a value that is not there yet
        raise UnsupportedModelError(
            f"torch.fx cannot trace the network ({error}). Control flow that depends on values has to go."
        ) from error
    for node in graph.nodes:
        node.type = None  # a text, where annotations are not evaluated: such a graph cannot be pickled
        if node.op == "call_module" and "input" in node.kwargs:
            node.args, node.kwargs = (node.kwargs["input"],), {}
    _settle_constants(graph, model)
    _pad_by_hand(graph, model)
    _replace_writes(graph, model)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return torch.fx.GraphModule(model, graph).eval()


def _settle_constants(graph: torch.fx.Graph, root: nn.Module) -> None:
    """Put in the type and the shape of a parameter where the network asks for them."""
    for node in list(graph.nodes):
        if (
            node.target is not getattr
            or node.args[0].op != "get_attr"
            or node.args[1] not in ("dtype", "shape", "ndim")
        ):
            continue
        module, _, name = node.args[0].target.rpartition(".")
        value = getattr(getattr(root.get_submodule(module), name), node.args[1])
        for user in list(node.users):
            user.args, user.kwargs = torch.fx.map_arg(
                (user.args, user.kwargs), lambda other, node=node, value=value: value if other is node else other
            )
        read = node.args[0]
        graph.erase_node(node)
        if not read.users:
            graph.erase_node(read)


def _pad_by_hand(graph: torch.fx.Graph, root: nn.Module) -> None:
    """Take padding by other values than zeros, or on one side, or said in words, out of the convolutions."""
    rewritten = set()
    for node in list(graph.nodes):
        layer = root.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str)):
            continue
        left, right, top, bottom = amounts = tuple(layer._reversed_padding_repeated_twice)
        inside = (top, left) if layer.padding_mode == "zeros" and (left, top) == (right, bottom) else (0, 0)
        if inside != (top, left):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            with graph.inserting_before(node):
                node.args = (graph.call_function(F.pad, (node.args[0], amounts), {"mode": mode}),)
        rewritten.add((layer, inside))
    for layer, inside in rewritten:
        layer.padding, layer.padding_mode = inside, "zeros"


def _replace_writes(graph: torch.fx.Graph, root: nn.Module) -> None:
    """Replace what writes into a tensor, and let later readers of that tensor read the result."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    equal: dict[torch.fx.Node, set[torch.fx.Node]] = {}  # the same tensor under other names
    related: dict[torch.fx.Node, set[torch.fx.Node]] = {}  # what may share its memory

    def reads_later(user: torch.fx.Node) -> bool:
        return position[user] > position[node]

    for node in list(graph.nodes):
        sources, same = _sources(node, root)
        if _writes(node, root):
            written, (sources, same) = _written(node), ([], False)
            if not _is_number(written):  # numbers are never overwritten: `n += 1` gives the name to another one
                _check_parts(node, related[written])
                _check_readers(node, [z for z in related[written] - equal[written] if any(map(reads_later, z.users))])
                for name in equal[written]:
                    name.replace_all_uses_with(node, delete_user_cb=reads_later)
            _make_out_of_place(node)
        related[node] = set().union({node}, *(related[source] for source in sources))
        for other in related[node]:
            related[other] = related[node]
        equal[node] = equal[sources[0]] if same else set()
        equal[node].add(node)


def _writes(node: torch.fx.Node, root: nn.Module) -> bool:
    """Return whether an operation overwrites a tensor that it is given."""
    if node.op == "call_module":
        return getattr(root.get_submodule(node.target), "inplace", False)
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _AUGMENTED:
        return True
    named = _name(node).endswith("_") and not _is_operator(node)
    return bool(named or node.kwargs.get("inplace") or node.kwargs.get("out")) or node.target is operator.setitem


def _written(node: torch.fx.Node) -> torch.fx.Node:
    """Return the value that a writing operation overwrites."""
    written = node.kwargs.get("out") or next(iter((*node.args, *node.kwargs.values())))
    if not isinstance(written, torch.fx.Node):
        raise UnsupportedModelError(f"{place(node)}: overwrites what is no single tensor of the network.")
    return written


def _make_out_of_place(node: torch.fx.Node) -> None:
    """Give a node that writes into a tensor the operation that returns the result instead."""
    name = _name(node)
    if node.op == "call_module":
        return
    node.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "out")}
    if node.target in _AUGMENTED:
        node.target = _AUGMENTED[node.target]
    elif name in _FILLING:
        node.op, node.target = "call_function", _FILLING[name]
    elif name.endswith("_"):
        places = [torch.Tensor] if node.op == "call_method" else [F, torch]
        found = next((getattr(place, name[:-1]) for place in places if hasattr(place, name[:-1])), None)
        if found is None or name in _MISNAMED or getattr(node.target, "__module__", "") == "torch.nn.init":
            raise UnsupportedModelError(f"{place(node)}: {name} has no out-of-place form. Write one.")
        node.target = name[:-1] if node.op == "call_method" else found
    elif node.target is operator.setitem:
        raise UnsupportedModelError(f"{place(node)}: assigns to a part of a tensor. Build the whole, as by torch.cat.")


def _check_readers(node: torch.fx.Node, readers: Iterable[torch.fx.Node]) -> None:
    for other in readers:
        raise UnsupportedModelError(
            f"{place(node)}: {_name(node)} overwrites memory that {other.name} may share, which the network reads "
            "later. Use the out-of-place form."
        )


def _check_parts(node: torch.fx.Node, related: Iterable[torch.fx.Node]) -> None:
    for other in related:
        if other.op == "get_attr":
            raise UnsupportedModelError(
                f"{place(node)}: {_name(node)} overwrites {other.target}, so that the network changes with every "
                "pass. Use the out-of-place form."
            )


def is_one_tensor(node: torch.fx.Node) -> bool:
    """Return whether a traced value is a tensor, and neither a number nor several tensors, as far as one can tell."""
    indexed = any(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    if indexed or _is_number(node):
        return False
    if node.op not in ("call_function", "call_method") or _is_operator(node):
        return True
    return all([str(returned.type) for returned in schema.returns] == ["Tensor"] for schema in _schemas(_name(node)))


def _sources(node: torch.fx.Node, root: nn.Module) -> tuple[list[torch.fx.Node], bool]:
    """Return the nodes whose memory a node's value may share, and whether it is known to be the first one's tensor."""
    if node.op in ("placeholder", "get_attr", "output") or _is_number(node):
        return [], False
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        passes = isinstance(module, _PASSING)
        return (node.all_input_nodes if passes or isinstance(module, _VIEWING) else []), passes
    if node.target is getattr:
        views = node.args[1] in _VIEW_ATTRIBUTES
    elif _is_operator(node):
        views = node.target is operator.getitem
    else:
        views = _may_be_a_view(_name(node))
    return (node.all_input_nodes if views else []), False


def _may_be_a_view(name: str) -> bool:
    """Return whether the result of an operation may share the memory of its arguments: by its schemas, if known."""
    schemas = _schemas(name)
    shared = any(returned.alias_info is not None for schema in schemas for returned in schema.returns)
    return shared or not schemas or "dropout" in name


def _schemas(name: str) -> list[torch._C.FunctionSchema]:
    """Return how PyTorch declares an operation on tensors of this name; empty if it does not."""
    packet = getattr(torch.ops.aten, name, None)
    found = [getattr(packet, each)._schema for each in packet.overloads() if "out" not in each] if packet else []
    return [schema for schema in found if any("Tensor" in str(argument.type) for argument in schema.arguments)]


def _is_number(value: object) -> bool:
    """Return whether a traced value is known to be no tensor: a size, or what is computed from sizes."""
    if not isinstance(value, torch.fx.Node):
        return True
    if value.op == "call_method":
        return value.target in _MEASURES
    if value.target is getattr:
        return value.args[1] not in _VIEW_ATTRIBUTES
    plain = _is_operator(value) or getattr(value.target, "__module__", "") in ("builtins", "math")
    return value.op == "call_function" and plain and all(map(_is_number, value.all_input_nodes))


def _is_operator(node: torch.fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "_operator"


def _name(node: torch.fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def place(node: torch.fx.Node) -> str:
    """Return a traced node's name and the line of the network's own code that it stems from."""
    file, number = node.meta["line"]
    return f"{node.name} ({file}:{number}: {linecache.getline(file, number).strip()})"


def _line_outside_torch() -> tuple[str, int]:
    """Return file and number of the innermost line that runs and belongs neither to PyTorch nor to this module."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith((_TORCH, __file__)):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
