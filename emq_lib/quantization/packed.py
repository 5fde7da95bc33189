"""Export: a quantized network as one file that is really as small as claimed, and back; and as ONNX.

Codes are packed bit by bit, least significant bit first, each layer from a byte of its own. The file is in safetensors
format with a single uint8 tensor, `payload`: for each layer in order its packed codes, its scales (float32,
little-endian), its zero points (uint8) and its biases (float32); then what the network keeps in floating point. Ranges
of inputs stand in the header. Nothing in the file is executed when it is read.

Explained in chapter 05.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from emq_lib.core.bank import WeightBank
from emq_lib.core.checks import file_path
from emq_lib.core.errors import CorruptArtefactError, InvalidParameterError, MissingArtefactError
from emq_lib.core.files import to_json, write_bytes
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.quantizers import ActivationRange, QuantizedWeight
from emq_lib.quantization.packing import (
    PackedLayer,
    PackedTensor,
    UnpackableError,
    describe_layers,
    describe_tensors,
    from_bytes,
    pack_codes,
    to_bytes,
    unpack_codes,
)
from emq_lib.quantization.prepare import folded_copy

__all__ = [
    "FORMAT_VERSION",
    "Packed",
    "header_bytes",
    "load_network",
    "load_packed",
    "pack_codes",
    "payload_bytes",
    "save_network",
    "save_packed",
    "unpack_codes",
]

FORMAT_VERSION = 2
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its header as a 64-bit integer
_KEY = "emq-packed"
_REMEDY = "Restore the file, or pack the network again with emq_lib.quantization.packed.save_packed."


class Packed(NamedTuple):
    """What a packed file holds.

    Attributes:
        weights: layer name -> quantized weight.
        biases: layer name -> float32 bias of shape (C_out,), None for a layer without one.
        inputs: layer name -> range of its input; empty if the file says nothing of inputs.
        rest: name -> tensor of everything that the network keeps in floating point.
        metadata: texts that were saved with the network.
    """

    weights: dict[str, QuantizedWeight]
    biases: dict[str, torch.Tensor | None]
    inputs: dict[str, ActivationRange]
    rest: dict[str, torch.Tensor]
    metadata: dict[str, str]


def save_network(
    path: pathlib.Path | str, network: QuantizedNetwork, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the selected configuration of a quantized network, whole, into one small file.

    Layers that stay in floating point and the ranges of inputs are in it too. See :func:`save_packed`, also for errors.

    Raises:
        InvalidParameterError: the network is not quantized.
    """
    if not isinstance(network, QuantizedNetwork):
        raise InvalidParameterError(
            f"network must be quantized, as by quantize_model; got {type(network).__name__}. Nothing was written."
        )
    plain = network.dequantized()
    state = plain.state_dict()
    weights = {name: layer.weight for name, layer in network.layers.items()}
    biases = {name: plain.get_submodule(name).bias for name in weights}
    quantized = {f"{name}.{part}" for name in weights for part in ("weight", "bias")}
    rest = {name: tensor for name, tensor in state.items() if name not in quantized}
    inputs = {name: layer.activation_range for name, layer in network.layers.items()}
    save_packed(path, weights, biases, inputs=inputs, rest=rest, metadata=metadata)


def load_network(path: pathlib.Path | str, model: nn.Module) -> QuantizedNetwork:
    """Read a file of :func:`save_network` into a network of the same architecture.

    Args:
        path: the file.
        model: the float network, with any weights; it stays as it is.

    Returns:
        The quantized network, on the CPU: every number in it is the file's.

    Raises:
        MissingArtefactError, CorruptArtefactError: see :func:`load_packed`.
        InvalidParameterError: the file is of another architecture, or has no ranges of inputs; or no network is given.
        UnsupportedModelError: see :func:`emq_lib.quantization.prepare.folded_copy`.
    """
    packed = load_packed(path)
    if set(packed.inputs) != set(packed.weights):
        raise InvalidParameterError(
            f"{path} has no ranges of inputs. Write it with emq_lib.quantization.packed.save_network."
        )
    state = packed.rest | {f"{name}.weight": weight.dequantize() for name, weight in packed.weights.items()}
    state |= {f"{name}.bias": bias for name, bias in packed.biases.items() if bias is not None}
    folded = folded_copy(model).cpu()
    try:
        folded.load_state_dict(state)
    except RuntimeError as error:
        raise InvalidParameterError(f"{path} is of another architecture ({error}).") from error
    if odd := [name for name in packed.weights if not isinstance(folded.get_submodule(name), nn.Conv2d | nn.Linear)]:
        raise InvalidParameterError(f"{path} is of another architecture: here {odd} are no layers to quantize.")
    return QuantizedNetwork(folded, WeightBank.of(packed.weights), packed.inputs)


def payload_bytes(
    weights: Mapping[str, QuantizedWeight],
    biases: Mapping[str, torch.Tensor | None],
    rest: Mapping[str, torch.Tensor] | None = None,
) -> int:
    """Return the size that a quantized network claims: packed weights, scales, zero points, biases, rest, in bytes.

    Without a rest it equals the "size" of :func:`emq_lib.core.costs.size_cost`; it is the file less its header.

    Args:
        weights: layer name -> quantized weight.
        biases: layer name -> float32 bias of shape (C_out,), None or absent for a layer without one.
        rest: name -> tensor that stays as it is.

    Raises:
        InvalidParameterError, InvalidBitsError: see :func:`save_packed`.
    """
    return sum(part.size for part in (*describe_layers(weights, biases, {}), *describe_tensors(rest or {})))


def save_packed(
    path: pathlib.Path | str,
    weights: Mapping[str, QuantizedWeight],
    biases: Mapping[str, torch.Tensor | None],
    *,
    inputs: Mapping[str, ActivationRange] | None = None,
    rest: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write quantized layers into one small file; a file that was there stays as it was if anything fails.

    The same content gives the same bytes. A SHA-256 over the description and the payload vouches for both.

    Args:
        path: the file, usually named ``*.safetensors``.
        weights: layer name -> quantized weight.
        biases: layer name -> float32 bias of shape (C_out,), None or absent for a layer without one.
        inputs: layer name -> range of its input.
        rest: name -> tensor that stays as it is.
        metadata: texts to keep with the network, e.g. the profile and the configuration.

    Raises:
        InvalidParameterError: a bias or a range without a layer, a tensor of the wrong shape or type, numbers that no
            layer has, or no path; nothing is written.
        InvalidBitsError: a width outside 1 to 8.
        DiskFullError: there is no room.
        UnwritablePathError: the place cannot be written: a folder, no permission, a name too long.
    """
    from safetensors.numpy import save

    path = file_path(path)
    if not isinstance(metadata, Mapping | None):
        raise InvalidParameterError(f"metadata must be a dictionary of texts, got {metadata!r:.60}.")
    layers, others = describe_layers(weights, biases, inputs or {}), describe_tensors(rest or {})
    payload = np.concatenate(
        [
            np.zeros(0, np.uint8),
            *(part for layer in layers for part in layer.pack(weights[layer.name], biases.get(layer.name))),
            *(to_bytes(rest[other.name], other.dtype) for other in others),
        ]
    )
    description = {
        "format_version": FORMAT_VERSION,
        "layers": [astuple(layer) for layer in layers],
        "rest": [astuple(other) for other in others],
        "metadata": {str(key): str(value) for key, value in (metadata or {}).items()},
    }
    signed = description | {"sha256": _digest(description, payload)}
    write_bytes(path, save({"payload": payload}, metadata={_KEY: to_json(signed)}))


def load_packed(path: pathlib.Path | str) -> Packed:
    """Read a file of :func:`save_packed`.

    Args:
        path: the file.

    Returns:
        everything bit for bit as it was saved, on the CPU.

    Raises:
        MissingArtefactError: no such file.
        CorruptArtefactError: truncated, altered, not a packed network, of a later format, or with numbers that no layer
            has.
        InvalidParameterError: no path.
    """
    path = file_path(path)
    signed, payload = _read(path)
    if signed.get("format_version") != FORMAT_VERSION:
        raise CorruptArtefactError(
            f"{path} has format version {signed.get('format_version')!r:.20}, this library reads {FORMAT_VERSION}. "
            "Update the library, or pack the network again."
        )
    description = {key: value for key, value in signed.items() if key != "sha256"}
    if signed.get("sha256") != _digest(description, payload):
        raise CorruptArtefactError(f"{path} does not match its own SHA-256: it was altered. {_REMEDY}")
    try:
        layers, others, metadata = _parsed(description)
        described = sum(part.size for part in (*layers, *others))
        if described != len(payload):
            raise UnpackableError(f"{described} bytes are described, {len(payload)} are there")
        sizes = [size for layer in layers for size in layer.part_sizes] + [other.size for other in others]
        parts = np.split(payload, np.cumsum(sizes, dtype=np.int64)[:-1])
        found = {layer.name: layer.unpack(parts[4 * row : 4 * row + 4]) for row, layer in enumerate(layers)}
    except UnpackableError as error:
        raise CorruptArtefactError(f"{path} describes no network: {error}. {_REMEDY}") from error
    kept = zip(others, parts[4 * len(layers) :], strict=False)  # without any parts, one empty part is left
    return Packed(
        weights={name: weight for name, (weight, _) in found.items()},
        biases={name: bias for name, (_, bias) in found.items()},
        inputs={layer.name: layer.input for layer in layers if layer.input},
        rest={other.name: from_bytes(part, other.dtype).view(other.shape) for other, part in kept},
        metadata=metadata,
    )


def _parsed(description: Mapping[str, object]) -> tuple[list[PackedLayer], list[PackedTensor], dict[str, str]]:
    """Return what the header says of layers, of other tensors, and the texts.

    Raises:
        UnpackableError: it is no description.
    """
    try:
        layers = [PackedLayer.parsed(*entry) for entry in description["layers"]]
        others = [PackedTensor.parsed(*entry) for entry in description["rest"]]
        metadata = dict(description["metadata"].items())
    except (KeyError, TypeError, AttributeError) as error:
        raise UnpackableError(f"its parts are not those of a packed network ({error})") from error
    names = [part.name for part in (*layers, *others)]
    if len(set(names)) < len(names) or not all(isinstance(text, str) for text in metadata.values()):
        raise UnpackableError("a name stands twice, or a text is none")
    return layers, others, metadata


def header_bytes(path: pathlib.Path | str) -> int:
    """Return the bytes of a packed file that come before its payload: names, shapes, widths, metadata and the hash.

    Args:
        path: the file.

    Raises:
        MissingArtefactError: no such file.
        CorruptArtefactError: truncated before its header ends.
        InvalidParameterError: no path.
    """
    path = file_path(path)
    if not path.is_file():
        raise MissingArtefactError(f"{path} does not exist. Make it with emq_lib.quantization.packed.save_packed.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little") + _LENGTH_BYTES
    if path.stat().st_size < max(length, _LENGTH_BYTES + 1):
        raise CorruptArtefactError(f"{path} is truncated, or not a packed network. Restore it, or pack again.")
    return length


def _digest(description: Mapping[str, object], payload: np.ndarray) -> str:
    """Return the hexadecimal SHA-256 of the description and the payload."""
    return hashlib.sha256(to_json(description).encode() + b"\n" + payload.tobytes()).hexdigest()


def _read(path: pathlib.Path) -> tuple[dict, np.ndarray]:
    """Return the description with its hash, and the payload, of a well-formed file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingArtefactError(f"{path} does not exist. {_REMEDY}")
    try:
        with safe_open(path, framework="numpy") as file:
            texts, names = file.metadata() or {}, file.keys()
            payload = file.get_tensor("payload") if "payload" in names else None
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise CorruptArtefactError(f"{path} is truncated, or no safetensors file ({error}). {_REMEDY}") from error
    try:
        signed = json.loads(texts[_KEY])
        to_json(signed)
    except (KeyError, ValueError, RecursionError) as error:
        raise CorruptArtefactError(f"{path} is not a packed network: its description is absent. {_REMEDY}") from error
    if not isinstance(signed, dict) or payload is None or payload.dtype != np.uint8 or payload.ndim != 1:
        raise CorruptArtefactError(f"{path} is not a packed network: its payload is no string of bytes. {_REMEDY}")
    return signed, payload
