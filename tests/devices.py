"""A GPU for machines that have none: real numbers on the CPU, and PyTorch's rules of what may meet on one device.

    with pretended_gpu():
        measure(on_gpu(model), on_gpu(images))

Tensors that a GPU would hold say so (``device``, ``is_cuda``). An operation of such a tensor with one of the CPU is
refused as it is on a real machine, and so is ``numpy()``; what is computed from them is held by the GPU too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_MOVES = ("to", "cpu", "cuda", "copy_", "__set__", "_has_compatible_shallow_copy_type")  # what may take tensors of both
_INDEXES = ("__getitem__", "__setitem__")  # a GPU's tensor may be indexed by one of the CPU


def on_gpu(thing):
    """Return a copy of a tensor, a module, or a dataclass of tensors, as a GPU would hold it."""
    if isinstance(thing, nn.Module):
        thing = copy.deepcopy(thing)
        for tensor in (*thing.parameters(), *thing.buffers()):
            tensor.on_gpu = True
        return thing
    if dataclasses.is_dataclass(thing):
        parts = {field.name: on_gpu(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
        return dataclasses.replace(thing, **parts)
    return _held(thing.clone(), True)


def is_on_gpu(tensor):
    """Return whether a GPU would hold a tensor."""
    return getattr(tensor, "on_gpu", False)


@contextlib.contextmanager
def pretended_gpu():
    """Let tensors of :func:`on_gpu` behave as a GPU's inside the block."""
    create = nn.Parameter.__new__

    def parameter(cls, data=None, requires_grad=True):
        return _held(create(cls, data, requires_grad), is_on_gpu(data))

    with mock.patch.object(nn.Parameter, "__new__", parameter), _Mode():
        yield


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, tensors = getattr(function, "__name__", ""), list(_tensors((args, kwargs)))
        if name in ("device", "_parse_to"):  # words about devices, of no tensor
            return function(*args, **kwargs)
        if name == "__get__" and (place := function.__self__.__name__) in ("device", "is_cuda", "is_cpu"):
            held = is_on_gpu(args[0])
            return {"device": GPU if held else CPU, "is_cuda": held, "is_cpu": not held}[place]
        if name == "__set__" and function.__self__.__name__ == "data":
            _held(args[0], is_on_gpu(args[1]))  # as a module's parameters move
        held = self._check(name, tensors)
        for part in (*args, *kwargs.values()):
            if isinstance(part, torch.device) or (part in ("cpu", "cuda") if isinstance(part, str) else False):
                held = torch.device(part).type == "cuda"
        if name == "to" and len(tensors) > 1:
            held = is_on_gpu(tensors[1])
        held = {"cpu": False, "cuda": True, "copy_": is_on_gpu(tensors[0]) if tensors else False}.get(name, held)
        if held and (source := kwargs.get("generator")) is not None and source.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        args = [CPU if isinstance(part, torch.device) or part_is_name(part) else part for part in args]
        if "device" in kwargs:
            kwargs["device"] = CPU
        return _mark(function(*args, **kwargs), held, tensors)

    def _check(self, name, tensors):
        """Return whether a GPU holds the result of an operation; refuse tensors that may not meet."""
        held = any(map(is_on_gpu, tensors))
        if held and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if held and name not in _MOVES:
            strangers = [tensor for tensor in tensors if not is_on_gpu(tensor) and tensor.dim()]
            if strangers and not (name in _INDEXES and is_on_gpu(tensors[0])):
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu!")
        return held


def part_is_name(part):
    """Return whether an argument names a device."""
    return isinstance(part, str) and part in ("cpu", "cuda")


def _mark(result, held, arguments):
    if isinstance(result, torch.Tensor):
        given = any(result is argument for argument in arguments)
        if given and is_on_gpu(result) != held:  # a move that is none here
            result = result.clone()
        return _held(result, held)
    if isinstance(result, tuple | list):
        for part in result:
            _mark(part, held, ())
    return result


def _held(tensor, held):
    if held or is_on_gpu(tensor):
        tensor.on_gpu = held
    return tensor


def _tensors(parts):
    for part in parts.values() if isinstance(parts, dict) else parts:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, tuple | list | dict):
            yield from _tensors(part)
