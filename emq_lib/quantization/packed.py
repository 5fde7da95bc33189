"""Export: a quantized network as one file that is really as small as claimed, and back; and as ONNX.

Codes are packed bit by bit, least significant bit first, each layer from a byte of its own. The file is in safetensors
format with a single uint8 tensor, `payload`: for each layer in order its packed codes, its scales (float32,
little-endian), its zero points (uint8) and its biases (float32); then what the network keeps in floating point. Ranges
of inputs stand in the header. Nothing in the file is executed when it is read.

Explained in chapter 05.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
import torch

from emq_lib.core.bank import WeightBank
from emq_lib.core.costs import BIAS_BYTES, SCALE_BYTES, ZERO_POINT_BYTES, weight_bytes
from emq_lib.core.errors import CorruptArtefactError, InvalidBitsError, InvalidParameterError, MissingArtefactError
from emq_lib.core.files import atomic_path, to_json
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.quantizers import ActivationRange, QuantizedWeight

FORMAT_VERSION = 2
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its header as a 64-bit integer
_KEY = "emq-packed"


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers of `bits` bits without gaps, least significant bit first.

    Args:
        codes: uint8, shape (n,), values 0 to 2^bits - 1.
        bits: bit width, 1 to 8.

    Returns:
        uint8 array of ceil(n * bits / 8) bytes; the bits left over in the last one are zero.

    Raises:
        InvalidBitsError: a width outside 1 to 8.
        InvalidParameterError: not a flat uint8 array, or a code that does not fit into `bits` bits.

    >>> pack_codes(np.array([1, 2, 3, 0], dtype=np.uint8), bits=2)
    array([57], dtype=uint8)
    """
    _check_bits(bits)
    codes = np.asarray(codes)
    if codes.dtype != np.uint8 or codes.ndim != 1:
        raise InvalidParameterError(f"Codes must be a flat uint8 array; got {codes.dtype} of shape {codes.shape}.")
    if codes.size and codes.max() >= 2**bits:
        raise InvalidParameterError(
            f"Code {codes.max()} does not fit into {bits} bits; clamp codes to 0..{2**bits - 1}, or pack more bits."
        )
    return np.packbits(np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undo :func:`pack_codes`.

    Args:
        packed: uint8, shape (ceil(count * bits / 8),).
        bits: bit width, 1 to 8.
        count: how many integers were packed.

    Returns:
        uint8 array of shape (count,).

    Raises:
        InvalidBitsError: a width outside 1 to 8.
        InvalidParameterError: the number of bytes does not match `count`.

    >>> unpack_codes(np.array([57], dtype=np.uint8), bits=2, count=4)
    array([1, 2, 3, 0], dtype=uint8)
    """
    _check_bits(bits)
    if len(packed) != weight_bytes(count, bits):
        raise InvalidParameterError(
            f"{count} codes of {bits} bits take {weight_bytes(count, bits)} bytes; got {len(packed)}."
        )
    flat = np.unpackbits(packed, count=count * bits, bitorder="little")
    return np.packbits(flat.reshape(count, bits), axis=1, bitorder="little").reshape(count)


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
    """
    plain = network.dequantized()
    state = plain.state_dict()
    weights = {name: layer.weight for name, layer in network.layers.items()}
    biases = {name: plain.get_submodule(name).bias for name in weights}
    quantized = {f"{name}.{part}" for name in weights for part in ("weight", "bias")}
    rest = {name: tensor for name, tensor in state.items() if name not in quantized}
    inputs = {name: layer.activation_range for name, layer in network.layers.items()}
    save_packed(path, weights, biases, inputs=inputs, rest=rest, metadata=metadata)


def load_network(path: pathlib.Path | str, model: torch.nn.Module) -> QuantizedNetwork:
    """Read a file of :func:`save_network` into a network of the same architecture.

    Args:
        path: the file.
        model: the float network, with any weights; it stays as it is.

    Returns:
        The quantized network, on the CPU: every number in it is the file's.

    Raises:
        MissingArtefactError, CorruptArtefactError: see :func:`load_packed`.
        InvalidParameterError: the file is of another architecture, or has no ranges of inputs.
    """
    packed = load_packed(path)
    if set(packed.inputs) != set(packed.weights):
        raise InvalidParameterError(
            f"{path} has no ranges of inputs. Write it with emq_lib.quantization.packed.save_network."
        )
    state = packed.rest | {f"{name}.weight": weight.dequantize() for name, weight in packed.weights.items()}
    state |= {f"{name}.bias": bias for name, bias in packed.biases.items() if bias is not None}
    folded = fold_batchnorm(copy.deepcopy(model).cpu())
    try:
        folded.load_state_dict(state)
    except RuntimeError as error:
        raise InvalidParameterError(f"{path} is of another architecture ({error}).") from error
    return QuantizedNetwork(folded, WeightBank.of(packed.weights), packed.inputs)


def payload_bytes(
    weights: Mapping[str, QuantizedWeight],
    biases: Mapping[str, torch.Tensor | None],
    rest: Mapping[str, torch.Tensor] | None = None,
) -> int:
    """Return the size that a quantized network claims: packed weights, scales, zero points, biases, rest, in bytes.

    Without a rest it equals the "size" of :func:`emq_lib.core.costs.size_cost`; it is the file less its header.

    Raises:
        InvalidParameterError: see :func:`save_packed`.
    """
    return sum(part.size for part in (*_describe(weights, biases, {}), *_describe_rest(rest or {})))


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
        InvalidParameterError: a bias or a range without a layer, or a tensor of the wrong shape or type; nothing is
            written.
        InvalidBitsError: a width outside 1 to 8.
    """
    from safetensors.numpy import save_file

    layers, others = _describe(weights, biases, inputs or {}), _describe_rest(rest or {})
    texts = {str(key): str(value) for key, value in (metadata or {}).items()}
    payload = np.concatenate(
        [
            np.zeros(0, np.uint8),
            *(part for layer in layers for part in _parts(weights[layer.name], biases, layer)),
            *(_to_bytes(rest[other.name], other.dtype) for other in others),
        ]
    )
    description = {
        "format_version": FORMAT_VERSION,
        "layers": [astuple(layer) for layer in layers],
        "rest": [astuple(other) for other in others],
        "metadata": texts,
    }
    signed = description | {"sha256": _digest(description, payload)}
    with atomic_path(pathlib.Path(path)) as temporary:
        save_file({"payload": payload}, temporary, metadata={_KEY: to_json(signed)})


def load_packed(path: pathlib.Path | str) -> Packed:
    """Read a file of :func:`save_packed`.

    Returns:
        everything bit for bit as it was saved, on the CPU.

    Raises:
        MissingArtefactError: no such file.
        CorruptArtefactError: truncated, altered, not a packed network, or of a later format.
    """
    path = pathlib.Path(path)
    remedy = "Restore the file, or pack the network again with emq_lib.quantization.packed.save_packed."
    signed, payload = _read(path, remedy)
    if signed.get("format_version") != FORMAT_VERSION:
        raise CorruptArtefactError(
            f"{path} has format version {signed.get('format_version')}, this library reads {FORMAT_VERSION}. "
            "Update the library, or pack the network again."
        )
    description = {key: value for key, value in signed.items() if key != "sha256"}
    if signed.get("sha256") != _digest(description, payload):
        raise CorruptArtefactError(f"{path} does not match its own SHA-256: it was altered. {remedy}")
    try:
        layers = [_Layer(name, tuple(shape), *facts) for name, shape, *facts in description["layers"]]
        others = [_Other(name, tuple(shape), dtype) for name, shape, dtype in description["rest"]]
        described = sum(part.size for part in (*layers, *others))
        inputs = {layer.name: ActivationRange(*layer.input) for layer in layers if layer.input}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptArtefactError(f"{path} describes its layers in an unknown way ({error}). {remedy}") from error
    if described != len(payload):
        raise CorruptArtefactError(f"{path} describes {described} bytes, but holds {len(payload)}. {remedy}")
    weights, biases = {}, {}
    sizes = [size for layer in layers for size in layer.part_sizes] + [other.size for other in others]
    parts = np.split(payload, np.cumsum(sizes)[:-1])
    for index, layer in enumerate(layers):
        weights[layer.name], biases[layer.name] = _assemble(layer, parts[4 * index : 4 * index + 4])
    kept = zip(others, parts[4 * len(layers) :], strict=False)  # without any parts, one empty part is left
    rest = {other.name: _from_bytes(part, other.dtype).view(other.shape) for other, part in kept}
    return Packed(weights, biases, inputs, rest, description["metadata"])


def header_bytes(path: pathlib.Path | str) -> int:
    """Return the bytes of a packed file that come before its payload: names, shapes, widths, metadata and the hash.

    Raises:
        MissingArtefactError: no such file.
        CorruptArtefactError: truncated before its header ends.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise MissingArtefactError(f"{path} does not exist. Make it with emq_lib.quantization.packed.save_packed.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little") + _LENGTH_BYTES
    if path.stat().st_size < max(length, _LENGTH_BYTES + 1):
        raise CorruptArtefactError(f"{path} is truncated, or not a packed network. Restore it, or pack again.")
    return length


@dataclass(frozen=True)
class _Layer:
    """What the header says of one layer."""

    name: str
    shape: tuple[int, ...]
    bits: int
    bias: bool
    input: tuple[float, int, int] | None = None

    @property
    def part_sizes(self) -> tuple[int, int, int, int]:
        """Bytes of the packed codes, the scales, the zero points and the biases."""
        channels = self.shape[0]
        return (
            weight_bytes(math.prod(self.shape), self.bits),
            channels * SCALE_BYTES,
            channels * ZERO_POINT_BYTES,
            channels * BIAS_BYTES * self.bias,
        )

    @property
    def size(self) -> int:
        """Bytes of the whole layer."""
        return sum(self.part_sizes)


@dataclass(frozen=True)
class _Other:
    """What the header says of a tensor outside the quantized layers."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as numpy writes it, with the order of bytes

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise InvalidBitsError(f"bits must lie in 1 to 8, got {bits}.")


def _describe(
    weights: Mapping[str, QuantizedWeight],
    biases: Mapping[str, torch.Tensor | None],
    inputs: Mapping[str, ActivationRange],
) -> list[_Layer]:
    """Check every tensor's type and shape, and return one description per layer."""
    if unknown := sorted({*biases, *inputs} - set(weights)):
        raise InvalidParameterError(f"Biases or ranges without a weight: {unknown}; the layers are {list(weights)}.")
    layers = []
    for name, weight in weights.items():
        _check_bits(weight.bits)
        bias = biases.get(name)
        channels = weight.codes.shape[:1]
        expected = [
            ("codes", weight.codes, torch.uint8, weight.codes.shape or (1,)),
            ("scale", weight.scale, torch.float32, channels),
            ("zero point", weight.zero_point, torch.uint8, channels),
            *([] if bias is None else [("bias", bias, torch.float32, channels)]),
        ]
        for what, tensor, dtype, shape in expected:
            if tensor.dtype != dtype or tensor.shape != shape:
                raise InvalidParameterError(
                    f"The {what} of layer {name!r} must be {dtype} of shape {tuple(shape)}; "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}. Convert it before packing."
                )
        seen = astuple(inputs[name]) if name in inputs else None
        layers.append(_Layer(name, tuple(weight.codes.shape), int(weight.bits), bias is not None, seen))
    return layers


def _describe_rest(rest: Mapping[str, torch.Tensor]) -> list[_Other]:
    """Return one description per tensor; only types that numpy has too can be written."""
    try:
        types = {name: tensor.detach().cpu().numpy().dtype.newbyteorder("<").str for name, tensor in rest.items()}
    except TypeError as error:
        raise InvalidParameterError(f"A tensor of the rest cannot be written: {error}. Convert it first.") from error
    return [_Other(name, tuple(tensor.shape), types[name]) for name, tensor in rest.items()]


def _parts(weight: QuantizedWeight, biases: Mapping[str, torch.Tensor | None], layer: _Layer) -> Iterator[np.ndarray]:
    """Yield a layer's bytes: packed codes, scales, zero points, biases."""
    yield pack_codes(weight.codes.detach().cpu().contiguous().flatten().numpy(), layer.bits)
    yield _to_bytes(weight.scale)
    yield weight.zero_point.detach().cpu().numpy()
    if layer.bias:
        yield _to_bytes(biases[layer.name])


def _to_bytes(values: torch.Tensor, dtype: str = "<f4") -> np.ndarray:
    """Return numbers as bytes."""
    return np.frombuffer(values.detach().cpu().numpy().astype(dtype).tobytes(), dtype=np.uint8)


def _from_bytes(part: np.ndarray, dtype: str = "<f4") -> torch.Tensor:
    """Undo :func:`_to_bytes`."""
    numbers = np.frombuffer(part.tobytes(), dtype=dtype)
    return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("=")))


def _assemble(layer: _Layer, parts: list[np.ndarray]) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """Return a layer's quantized weight and its bias from its four parts."""
    codes, scale, zero_point, bias = parts
    weight = QuantizedWeight(
        torch.from_numpy(unpack_codes(codes, layer.bits, math.prod(layer.shape))).view(layer.shape),
        _from_bytes(scale),
        torch.from_numpy(zero_point.copy()),
        layer.bits,
    )
    return weight, _from_bytes(bias) if layer.bias else None


def _digest(description: Mapping[str, object], payload: np.ndarray) -> str:
    """Return the hexadecimal SHA-256 of the description and the payload."""
    return hashlib.sha256(to_json(description).encode() + b"\n" + payload.tobytes()).hexdigest()


def _read(path: pathlib.Path, remedy: str) -> tuple[dict, np.ndarray]:
    """Return the description with its hash, and the payload, of a well-formed file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingArtefactError(f"{path} does not exist. {remedy}")
    try:
        with safe_open(path, framework="numpy") as file:
            signed = json.loads((file.metadata() or {})[_KEY])
            payload = file.get_tensor("payload")
    except (SafetensorError, OSError) as error:
        raise CorruptArtefactError(f"{path} is truncated, or no safetensors file ({error}). {remedy}") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise CorruptArtefactError(f"{path} is not a packed network: its description is absent. {remedy}") from error
    if not isinstance(signed, dict) or payload.dtype != np.uint8 or payload.ndim != 1:
        raise CorruptArtefactError(f"{path} is not a packed network: its payload is no string of bytes. {remedy}")
    return signed, payload
