"""A network that takes any configuration from a weight bank and multiplies integers.

Explained in chapter 01.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.bank import WeightBank
from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.graphs import segments
from emq_lib.core.quantizers import ActivationRange, QuantizedWeight


class QuantizedLayer(nn.Module):
    """A convolution or a linear layer that multiplies integers: codes of its input and codes of its weight.

    Whole numbers below 2^24 add up in float32 without an error, in whatever order. So the sums, and with them the
    output, are the same to the last bit for every batch size, number of threads and processor. On processors with
    8-bit instructions convolutions use them.

    Args:
        layer: the float layer.
        weights: bits -> its quantized weight.
        activation_range: range of its input.

    Raises:
        UnsupportedModelError: a convolution that does not pad by numbers of zeros, as those of a folded network do.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, weights: Mapping[int, QuantizedWeight], activation_range: ActivationRange
    ) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            raise UnsupportedModelError(f"{layer} does not pad by numbers of zeros; take it from a folded network.")
        self.activation_range, self._weights = activation_range, weights
        self._float = (layer,)  # in a tuple, so that it does not count as a part of this module
        self._channel = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        bias = torch.zeros(layer.weight.shape[0], device=layer.weight.device) if layer.bias is None else layer.bias
        self.bias = bias.detach().view(self._channel)
        self._products = {bits: _product(layer, weight, activation_range) for bits, weight in weights.items()}
        self._scales = {bits: (activation_range.scale * w.scale).view(self._channel) for bits, w in weights.items()}
        self.bits = next(iter(weights))

    @property
    def weight(self) -> QuantizedWeight:
        """The quantized weight at the selected bits."""
        return self._weights[self.bits]

    def factor(self) -> torch.Tensor:
        """Return what the sums of integers are multiplied by: one scale per output channel, shape (C_out, 1, 1)."""
        return self._scales[self.bits]

    def dequantized(self) -> nn.Conv2d | nn.Linear:
        """Return a float layer with the quantized weight at the selected bits."""
        layer = copy.deepcopy(self._float[0])
        layer.weight = nn.Parameter(self.weight.dequantize(), requires_grad=False)
        return layer

    def forward(self, x: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        """Return the layer's float32 output of a float32 input, in the float layer's shapes.

        Args:
            x: the input, as the float layer takes it.
            in_place: whether its memory may be overwritten.
        """
        total = self._products[self.bits](self.activation_range.integers(x, in_place=in_place))
        return total.mul_(self._scales[self.bits]).add_(self.bias)


def _product(
    layer: nn.Conv2d | nn.Linear, weight: QuantizedWeight, activation_range: ActivationRange
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from an input's integers to the exact sums of products with a weight's integers."""
    integers = weight.integers()
    if isinstance(layer, nn.Linear):
        return functools.partial(F.linear, weight=integers.float())
    how = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.weight.device.type == "cpu" and integers.abs().max() < 128 and _has_int8_convolution():
        return _int8_convolution(integers, how, activation_range)
    kernel = integers.float().contiguous(memory_format=torch.channels_last)
    return lambda x: F.conv2d(x, kernel, None, *how)


def _int8_convolution(
    integers: torch.Tensor, how: tuple, activation_range: ActivationRange
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return oneDNN's convolution of 8-bit integers with 32-bit sums, with every scale 1 so that nothing is rounded."""
    zero, (stride, padding, dilation, groups) = activation_range.zero_point, how
    ones, zeros = torch.ones(len(integers)), torch.zeros(len(integers), dtype=torch.int64)
    places = (list(stride), list(padding), list(dilation), groups)
    packed = torch.ops.onednn.qconv_prepack(integers.to(torch.int8), ones, 1.0, zero, *places, None)

    def convolve(x: torch.Tensor) -> torch.Tensor:
        codes = x.add_(zero + 2**23).view(torch.int32).to(torch.uint8)  # the low byte of 2^23 + k is k
        rest = (None, *places, 1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qconv_pointwise(codes, 1.0, zero, packed, ones, zeros, *rest)

    return convolve


@functools.cache
def _has_int8_convolution() -> bool:
    """Return whether this processor's 8-bit convolution is there and exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 253, (2, 8, 6, 6), generator=generator).float().contiguous(memory_format=torch.channels_last)
    kernel = torch.randint(-127, 128, (8, 8, 3, 3), generator=generator).short()
    try:
        found = _int8_convolution(kernel, ((1, 1), (1, 1), (1, 1), 1), ActivationRange(1.0, 3, 8))(x.clone())
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, F.conv2d(x, kernel.float(), None, 1, 1))


class QuantizedNetwork(nn.Module):
    """A folded network that takes any configuration by selecting weights from a bank; inputs of layers are quantized.

    Args:
        model: network with folded batch norm; its layers are replaced and it must not be used otherwise.
        bank: its weight bank.
        activation_ranges: layer name -> range of its input.

    Raises:
        UnsupportedModelError: a layer that is in one of network, bank and ranges only, or is quantized already.
    """

    def __init__(
        self, model: torch.fx.GraphModule, bank: WeightBank, activation_ranges: Mapping[str, ActivationRange]
    ) -> None:
        super().__init__()
        self.model, self.bank, self.activation_ranges = model.eval().requires_grad_(False), bank, activation_ranges
        self.layers: dict[str, QuantizedLayer] = {}
        modules, held = dict(model.named_modules()), {name for name, _ in bank.weights}
        if odd := sorted(held ^ set(activation_ranges)):
            raise UnsupportedModelError(f"Layers {odd} have either a quantized weight or a range, but need both.")
        if odd := [name for name in activation_ranges if not isinstance(modules.get(name), nn.Conv2d | nn.Linear)]:
            raise UnsupportedModelError(f"The network has no float layers {odd}: the bank is of another network.")
        for name, activation_range in activation_ranges.items():
            weights = {bits: weight for (layer, bits), weight in bank.weights.items() if layer == name}
            self.layers[name] = QuantizedLayer(model.get_submodule(name), weights, activation_range)
            model.set_submodule(name, self.layers[name])

    def select(self, config: Sequence[int]) -> QuantizedNetwork:
        """Take a configuration. Returns the network itself.

        Raises:
            ConfigLengthError, InvalidBitsError: see :meth:`WeightBank.widths`.
        """
        for name, bits in self.bank.widths(config).items():
            self.layers[name].bits = bits
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) of inputs (N, C, H, W) under the configuration selected last."""
        return self.model(x)

    def dequantized(self) -> torch.fx.GraphModule:
        """Return a float network with the selected weights; its activations are not quantized."""
        plain = torch.fx.GraphModule(self.model, copy.deepcopy(self.model.graph))
        for name, layer in self.layers.items():
            plain.set_submodule(name, layer.dequantized())
        return plain

    @functools.cached_property
    def pieces(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """The network cut as by :func:`emq_lib.core.graphs.segments`, sparing memory traffic inside each piece.

        The same numbers: results that nobody else reads are overwritten in place, and a ReLU (or ReLU6) is left out
        whose readers all round what it cuts off to the same code anyway.
        """
        pieces = segments(self.model, list(self.layers))
        for piece, _ in pieces:
            _spare_memory(piece)
        return pieces


def _spare_memory(piece: torch.fx.GraphModule) -> None:
    """Rewrite a piece of a quantized network as :attr:`QuantizedNetwork.pieces` says.

    Only what an operation of the piece itself made, and one other reads, is overwritten: neither the piece's input,
    nor its output, nor a part of the network. The piece has no other in-place operation, see
    :func:`emq_lib.core.tracing.trace`.
    """

    def layer(node: torch.fx.Node) -> QuantizedLayer | None:
        module = piece.get_submodule(node.target) if node.op == "call_module" else None
        return module if isinstance(module, QuantizedLayer) else None

    def disposable(node: object) -> bool:
        """Say whether a node makes a new tensor that one other node reads."""
        if not isinstance(node, torch.fx.Node) or len(node.users) != 1:
            return False
        return layer(node) is not None or ceiling(node) is not None or node.target in (operator.add, _add_into)

    def ceiling(node: torch.fx.Node) -> float | None:
        """Return the largest output of a ReLU (infinity) or ReLU6 (6), or None if the node is neither."""
        module = piece.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.ReLU) or node.target is F.relu:
            return float("inf")
        return 6.0 if isinstance(module, nn.ReLU6) or node.target is F.relu6 else None

    def repeats(reader: QuantizedLayer | None, top: float) -> bool:
        """Say whether a layer rounds what lies outside 0 to `top` to its lowest and highest codes."""
        if reader is None:
            return False
        seen = reader.activation_range
        return seen.zero_point == 0 and top / seen.scale > 2**seen.bits - 1.25

    for node in list(piece.graph.nodes):
        if node.target is operator.add:
            first = next((index for index, term in enumerate(node.args) if disposable(term)), None)
            if first is not None:
                node.target, node.args = _add_into, (node.args[first], node.args[1 - first])
        elif (top := ceiling(node)) is not None:
            if all(repeats(layer(user), top) for user in node.users):
                node.replace_all_uses_with(node.args[0])
                piece.graph.erase_node(node)
            elif disposable(node.args[0]):
                node.op, node.target = "call_function", F.relu6 if top == 6.0 else F.relu
                node.kwargs = {"inplace": True}
        elif layer(node) is not None and disposable(node.args[0]):
            node.kwargs = {"in_place": True}
    piece.recompile()


def _add_into(total: torch.Tensor, term: torch.Tensor | float) -> torch.Tensor:
    """Return a sum, in the memory of its first term where it fits."""
    alike = isinstance(total, torch.Tensor) and isinstance(term, torch.Tensor) and term.dtype == total.dtype
    if alike and torch.broadcast_shapes(total.shape, term.shape) == total.shape:
        return total.add_(term)
    return total + term
