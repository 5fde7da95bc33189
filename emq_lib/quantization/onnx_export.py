"""A quantized network as ONNX.

Explained in chapter 05.
"""

from __future__ import annotations

import io
import pathlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from emq_lib.core.checks import file_path
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.files import write_bytes
from emq_lib.core.networks import QuantizedLayer, QuantizedNetwork

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

ONNX_OPSET = 21  # the first with 4-bit integers


def save_onnx(
    path: pathlib.Path | str,
    network: QuantizedNetwork | torch.fx.GraphModule,
    example: torch.Tensor,
    *,
    exact: bool = False,
) -> None:
    """Write the selected configuration as ONNX with QuantizeLinear and DequantizeLinear nodes (QDQ).

    Weights of up to 4 bits are stored as 4-bit integers, also those of 2 and 3 bits, for ONNX has none smaller; weights
    of 5 to 8 bits as 8-bit integers. Each quantized layer's input is rounded to 8 or 4 bits in front of it.

    Args:
        path: the file; it stays as it was if anything fails.
        network: a quantized network; layers that it leaves in floating point stay so. Or a float network.
        example: an input of one image, shape (1, C, H, W); the file takes any number of images.
        exact: restore integers, and multiply by the scales after each product, as the quantized network does: then sums
            are exact in whatever order a runtime adds, and its predictions are the same. Otherwise scales stand in the
            QDQ nodes, where runtimes look for them to choose integer kernels.

    Raises:
        InvalidParameterError: no network, no path, an example that the network does not take, inputs of other than 8 or
            4 bits, or a layer that the exporter rewrites, e.g. a linear layer on sequences.
        UnsupportedModelError: the exporter does not know an operation of the network.
        DiskFullError: there is no room.
        UnwritablePathError: the place cannot be written: a folder, no permission, a name too long.
    """
    import onnx

    path = file_path(path)
    if not isinstance(network, nn.Module):
        raise InvalidParameterError(f"network must be a torch.nn.Module, got {network!r:.60}.")
    _check_example(network, example)
    quantized = isinstance(network, QuantizedNetwork)
    plain, layers = (network.dequantized(), network.layers) if quantized else (network, {})
    marks = _mark(plain, layers)
    model = _exported(plain, example)
    readers = _readers(model.graph, marks, {name: layer.weight.codes.shape for name, layer in layers.items()})
    for name, layer in layers.items():
        bits = layer.activation_range.bits
        if name not in readers or bits not in (4, 8):
            raise InvalidParameterError(
                f"Layer {name!r} with inputs of {bits} bits cannot be written as ONNX: it has to be a convolution "
                "or a linear layer on vectors, with inputs of 4 or 8 bits."
            )
        _quantize_node(model.graph, readers[name], name, layer, exact=exact)
    onnx.checker.check_model(model)
    write_bytes(path, model.SerializeToString())


def _check_example(network: nn.Module, example: torch.Tensor) -> None:
    if not isinstance(example, torch.Tensor) or example.dtype != torch.float32 or not example.ndim or len(example) != 1:
        raise InvalidParameterError(
            "example must be one image as the network takes it, float32 of shape (1, C, H, W); got "
            + (f"{example.dtype} {tuple(example.shape)}." if isinstance(example, torch.Tensor) else f"{example!r:.60}.")
        )
    try:
        with torch.inference_mode():
            network(example.clone())
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InvalidParameterError(
            f"The network does not take an example of shape {tuple(example.shape)} ({str(error):.200})."
        ) from error


def _mark(plain: nn.Module, layers: Mapping[str, QuantizedLayer]) -> dict[str, float]:
    """Fill the weight and the bias of each layer to be quantized with numbers of its own, and return the weights'.

    The exporter renames tensors, and makes one of those that are equal. By their numbers each is found again; they are
    replaced afterwards.
    """
    marks = {name: float(row + 1) for row, name in enumerate(layers)}
    with torch.no_grad():
        for name, mark in marks.items():
            layer = plain.get_submodule(name)
            layer.weight.fill_(mark)
            if layer.bias is not None:
                layer.bias = nn.Parameter(torch.full_like(layer.bias, -mark))
    return marks


def _exported(plain: nn.Module, example: torch.Tensor) -> ModelProto:
    import onnx
    from onnx import version_converter

    buffer = io.BytesIO()
    axes = {"images": {0: "N"}, "logits": {0: "N"}}
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_axes": axes}
    with warnings.catch_warnings(action="ignore"):  # this exporter is to give way to one that needs more packages
        try:
            torch.onnx.export(plain, (example,), buffer, dynamo=False, opset_version=17, **names)
        except torch.onnx.errors.OnnxExporterError as error:
            raise UnsupportedModelError(f"PyTorch cannot write the network as ONNX ({error}).") from error
    return version_converter.convert_version(onnx.load_from_string(buffer.getvalue()), ONNX_OPSET)


def _readers(
    graph: GraphProto, marks: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NodeProto]:
    """Return the node that reads each marked weight, as far as it is a convolution or a product with vectors."""
    from onnx import numpy_helper

    nodes = {node.input[1]: node for node in graph.node if node.op_type in ("Conv", "Gemm")}
    names = {mark: name for name, mark in marks.items()}
    found = {}
    for tensor in graph.initializer:
        if tensor.name in nodes:
            values = numpy_helper.to_array(tensor)
            name = names.get(float(values.flat[0])) if values.dtype == np.float32 and values.size else None
            if name is not None and values.shape == shapes[name] and (values == values.flat[0]).all():
                found[name] = nodes[tensor.name]
    return found


def _quantize_node(graph: GraphProto, reader: NodeProto, name: str, layer: QuantizedLayer, *, exact: bool) -> None:
    """Put the roundings in front of one layer's node, and its scales behind it if sums are to be exact."""
    from onnx import helper, numpy_helper

    weight, seen = layer.weight, layer.activation_range
    scale, stored = weight.scale.detach().cpu().numpy(), 4 if weight.bits <= 4 else 8
    parts = {
        "codes": _onnx_integers(weight.codes, stored),
        "zero": _onnx_integers(weight.zero_point, stored),
        "scale": np.ones_like(scale) if exact else scale,
        "input_scale": np.float32(1.0 if exact else seen.scale),
        "input_zero": _onnx_integers(torch.tensor(seen.zero_point), seen.bits),
    }
    (before, _, *_), (after,) = reader.input, reader.output
    if exact:
        parts["input_factor"] = np.float32(1 / seen.scale)
        parts["factor"], parts["bias"] = layer.factor().cpu().numpy(), layer.bias.cpu().numpy()
    elif len(reader.input) > 2:
        parts["bias"] = layer.bias.cpu().flatten().numpy()
    places = {part: f"{name}.{part}" for part in parts}
    for old in [tensor for tensor in graph.initializer if tensor.name in reader.input[1:]]:
        graph.initializer.remove(old)
    graph.initializer.extend(numpy_helper.from_array(value, places[part]) for part, value in parts.items())

    def make(kind: str, inputs: list[str], output: str, **attributes: int) -> NodeProto:
        return helper.make_node(kind, [places.get(text, text) for text in inputs], [output], **attributes)

    codes, restored = f"{name}.input_codes", f"{name}.input"
    scaled = f"{name}.input_scaled" if exact else before
    front = [make("Mul", [before, "input_factor"], scaled)] if exact else []
    front += [
        make("QuantizeLinear", [scaled, "input_scale", "input_zero"], codes),
        make("DequantizeLinear", [codes, "input_scale", "input_zero"], restored),
        make("DequantizeLinear", ["codes", "scale", "zero"], f"{name}.weight", axis=0),
    ]
    back = []
    if exact:
        total, product = f"{name}.total", f"{name}.product"
        back = [make("Mul", [total, "factor"], product), make("Add", [product, "bias"], after)]
        del reader.input[2:]
        reader.output[0] = total
    elif "bias" in parts:
        reader.input[2] = places["bias"]
    reader.input[0], reader.input[1] = restored, f"{name}.weight"
    at = list(graph.node).index(reader)
    for offset, node in enumerate(front):
        graph.node.insert(at + offset, node)
    for offset, node in enumerate(back):
        graph.node.insert(at + len(front) + 1 + offset, node)


def _onnx_integers(values: torch.Tensor, bits: int) -> np.ndarray:
    """Return unsigned integers of 4 or 8 bits."""
    import ml_dtypes

    return values.detach().cpu().numpy().astype(np.uint8).astype(ml_dtypes.uint4 if bits == 4 else np.uint8)
