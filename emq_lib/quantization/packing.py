"""What a packed file holds, byte by byte: codes without gaps, descriptions of layers, and checks of both.

Explained in chapter 05.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from emq_lib.core.checks import WIDEST, bit_width
from emq_lib.core.costs import BIAS_BYTES, SCALE_BYTES, ZERO_POINT_BYTES, weight_bytes
from emq_lib.core.errors import InvalidBitsError, InvalidParameterError
from emq_lib.core.quantizers import ActivationRange, QuantizedWeight

_TYPES = ("|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16")


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
    bits = bit_width(bits, "bits")
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
    bits = bit_width(bits, "bits")
    if len(packed) != weight_bytes(count, bits):
        raise InvalidParameterError(
            f"{count} codes of {bits} bits take {weight_bytes(count, bits)} bytes; got {len(packed)}."
        )
    flat = np.unpackbits(packed, count=count * bits, bitorder="little")
    return np.packbits(flat.reshape(count, bits), axis=1, bitorder="little").reshape(count)


class UnpackableError(ValueError):
    """What a description or its bytes cannot be; the reader of the file names the file."""


@dataclass(frozen=True)
class PackedLayer:
    """What the header says of one layer."""

    name: str
    shape: tuple[int, ...]
    bits: int
    bias: bool
    input: ActivationRange | None = None

    @classmethod
    def parsed(cls, name: object, shape: object, bits: object, bias: object, seen: object) -> PackedLayer:
        """Return a description that was read from a file.

        Raises:
            UnpackableError: it is none.
        """
        if not (_is_shape(shape) and shape and 0 not in shape and _is_width(bits) and isinstance(bias, bool)):
            raise UnpackableError(f"layer {name!r:.60} has shape {shape!r:.60}, bits {bits!r:.20}, bias {bias!r:.20}")
        try:
            return cls(_name(name), tuple(shape), bits, bias, None if seen is None else ActivationRange(*seen))
        except (TypeError, InvalidParameterError, InvalidBitsError) as error:
            raise UnpackableError(f"the range of layer {name!r:.60} is {seen!r:.60} ({error})") from error

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

    def pack(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> Iterator[np.ndarray]:
        """Yield the layer's bytes: packed codes, scales, zero points, biases."""
        yield pack_codes(weight.codes.detach().cpu().contiguous().flatten().numpy(), self.bits)
        yield to_bytes(weight.scale)
        yield weight.zero_point.detach().cpu().numpy()
        if bias is not None:
            yield to_bytes(bias)

    def unpack(self, parts: list[np.ndarray]) -> tuple[QuantizedWeight, torch.Tensor | None]:
        """Return the layer's quantized weight and its bias from its four parts.

        Raises:
            UnpackableError: a scale, a zero point or a bias that none is, or a spare bit that is set.
        """
        codes, scales, zero_points, biases = parts
        count = math.prod(self.shape)
        if (spare := -count * self.bits % 8) and codes[-1] >> (8 - spare):
            raise UnpackableError(f"spare bits behind the codes of layer {self.name!r} are set")
        weight = QuantizedWeight(
            torch.from_numpy(unpack_codes(codes, self.bits, count)).view(self.shape),
            from_bytes(scales),
            torch.from_numpy(zero_points.copy()),
            self.bits,
        )
        bias = from_bytes(biases) if self.bias else None
        check_numbers(self.name, weight, bias)
        return weight, bias


@dataclass(frozen=True)
class PackedTensor:
    """What the header says of a tensor outside the quantized layers."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as numpy writes it, with the order of bytes

    @classmethod
    def parsed(cls, name: object, shape: object, dtype: object) -> PackedTensor:
        """Return a description that was read from a file.

        Raises:
            UnpackableError: it is none.
        """
        if not (_is_shape(shape) and isinstance(dtype, str) and dtype in _TYPES):
            raise UnpackableError(f"tensor {name!r:.60} has shape {shape!r:.60} and type {dtype!r:.20}")
        return cls(_name(name), tuple(shape), dtype)

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise UnpackableError(f"the name {value!r:.60} is no text")
    return value


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_width(value: object) -> bool:
    return type(value) is int and 1 <= value <= WIDEST


def check_numbers(name: str, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
    """Check the numbers of a layer.

    Raises:
        UnpackableError: a scale that is not positive and finite, a zero point beyond the codes, a bias that is not
            finite.
    """
    if not (weight.scale.isfinite() & (weight.scale > 0)).all():
        raise UnpackableError(f"a scale of layer {name!r} is not positive and finite")
    if weight.zero_point.numel() and int(weight.zero_point.max()) >= 2**weight.bits:
        raise UnpackableError(f"a zero point of layer {name!r} is beyond the codes of {weight.bits} bits")
    if bias is not None and not bias.isfinite().all():
        raise UnpackableError(f"a bias of layer {name!r} is NaN or infinite")


def describe_layers(
    weights: Mapping[str, QuantizedWeight],
    biases: Mapping[str, torch.Tensor | None],
    inputs: Mapping[str, ActivationRange],
) -> list[PackedLayer]:
    """Check every tensor's type, shape and numbers, and return one description per layer.

    Args:
        weights: layer name -> quantized weight.
        biases: layer name -> bias of shape (C_out,), None or absent for a layer without one.
        inputs: layer name -> range of its input; may lack layers.

    Raises:
        InvalidParameterError: a bias or a range without a layer; a tensor of the wrong shape or type, or numbers that
            no layer has.
        InvalidBitsError: a width outside 1 to 8.
    """
    if unknown := sorted({*biases, *inputs} - set(weights)):
        raise InvalidParameterError(f"Biases or ranges without a weight: {unknown}; the layers are {list(weights)}.")
    layers = []
    for name, weight in weights.items():
        bits = bit_width(weight.bits, f"layer {name!r}")
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
        try:
            check_numbers(name, weight, bias)
        except UnpackableError as error:
            raise InvalidParameterError(f"Layer {name!r} cannot be packed: {error}. Quantize it again.") from error
        if not weight.codes.numel():
            raise InvalidParameterError(f"Layer {name!r} has no weights: nothing can be packed.")
        layers.append(PackedLayer(name, tuple(weight.codes.shape), bits, bias is not None, inputs.get(name)))
    return layers


def describe_tensors(rest: Mapping[str, torch.Tensor]) -> list[PackedTensor]:
    """Return one description per tensor.

    Raises:
        InvalidParameterError: a type that numpy lacks.
    """
    found = []
    for name, tensor in rest.items():
        try:
            dtype = tensor.detach().cpu().numpy().dtype.newbyteorder("<").str
        except TypeError as error:
            raise InvalidParameterError(f"The tensor {name!r} cannot be written: {error}. Convert it first.") from error
        found.append(PackedTensor(name, tuple(tensor.shape), dtype))
    return found


def to_bytes(values: torch.Tensor, dtype: str = "<f4") -> np.ndarray:
    """Return numbers as bytes, uint8, shape (n,)."""
    return np.frombuffer(values.detach().cpu().numpy().astype(dtype).tobytes(), dtype=np.uint8)


def from_bytes(part: np.ndarray, dtype: str = "<f4") -> torch.Tensor:
    """Undo :func:`to_bytes`; returns a flat tensor."""
    numbers = np.frombuffer(part.tobytes(), dtype=dtype)
    return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("=")))
