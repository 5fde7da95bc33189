"""What evolved proxies are made of: inputs, functions of one and of two values, and the shapes of formulas.

Explained in chapter 03.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

EPSILON = 1e-9
Tensor = torch.Tensor


@dataclass(frozen=True)
class Input:
    """A statistic that formulas read.

    Attributes:
        meaning: in words.
        family: "network" (knows nothing of bits), "factor" (a statistic of the network times the bit width, as the
            released code lets bits enter), "error" (what rounding does to weights or outputs), "passes" (what
            quantizing one or two layers does to the predictions) or "count".
        latex: symbol.
        reads: statistics whose cost it bears.
    """

    meaning: str
    family: str
    latex: str
    reads: tuple[str, ...] = ()


_NETWORK = {
    "W": Input("weights", "network", "W"),
    "A": Input("inputs of the layer", "network", "A", ("activations",)),
    "G": Input("gradient of the loss", "network", "G", ("gradients",)),
    "V": Input("virtual gradient: of the summed logits of an all-ones image", "network", "V", ("virtual_gradients",)),
    "R": Input("virtual gradient of the all-positive network", "network", "R", ("positive_gradients",)),
    "H": Input("diagonal of the empirical Fisher", "network", "H", ("gradients",)),
    "C": Input(
        "output times its gradient, per channel and image; its squares add up to Fisher pruning's score",
        "network",
        "C",
        ("channel_products",),
    ),
    "T": Input("mean of the Hessian's diagonal, from its trace", "network", r"\tau", ("trace",)),
}
INPUTS: Mapping[str, Input] = {
    "b": Input("bit width", "count", "b"),
    "n": Input("number of weights", "count", "n"),
    **_NETWORK,
    **{
        f"b{name}": Input(f"bit width times {entry.meaning}", "factor", f"b {entry.latex}", entry.reads)
        for name, entry in _NETWORK.items()
    },
    "E": Input("quantization error of the weights", "error", "E_b", ("errors",)),
    "O": Input("relative error of the layer's output", "error", "O_b", ("output_error",)),
    "K": Input("divergence when one layer is quantized", "passes", "K_b", ("one_slot",)),
    "L": Input("loss when one layer is quantized", "passes", "L_b", ("one_slot",)),
    "P": Input("loss by pairs of layers (CLADO's)", "passes", "P_{bb'}", ("pair_losses",)),
    "D": Input("divergence by pairs of layers, their changes of the logits added", "passes", "D_{bb'}", ("one_slot",)),
}
PAIRS = ("P", "D")


@dataclass(frozen=True)
class Unary:
    """A function of one value.

    Attributes:
        function: for "element" of a tensor of any shape; else of one layer (R, C, K), R rows of bit widths or one, and
            the number of elements that the layer has, of which C K are seen.
        result: "element" and "layer" keep the shape, the latter looking at the whole layer; "number" gives (R, 1, 1);
            "matrix" gives (R, C, C).
        latex: with @ for the argument; empty: its name as an operator.
        released: the same in the released code where that differs, and None elsewhere.
        weight: how often it is drawn, relative to the others (operation sampling prioritization).
    """

    function: Callable[..., Tensor]
    result: str = "element"
    latex: str = ""
    released: Callable[..., Tensor] | None = None
    weight: float = 1.0


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2), keepdim=True)


def _std(x: Tensor) -> Tensor:
    return (x - _mean(x)).square().mean(dim=(1, 2), keepdim=True).sqrt()


def _min_max(x: Tensor, _: int) -> Tensor:
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return (x - low) / (high - low + EPSILON)


def _invert(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0) / (x.abs() + EPSILON)


def _frobenius(x: Tensor, n: int) -> Tensor:
    return (_mean(x.square()) * n).sqrt()


def _gram(x: Tensor, _: int) -> Tensor:
    return x @ x.mT


def _slogdet(x: Tensor, _: int) -> Tensor:
    channels, elements = x.shape[1:]
    short = x if channels <= elements else x.mT  # the other eigenvalues of the channels' Gram matrix are zero
    identity = torch.eye(short.shape[1], device=x.device, dtype=x.dtype)
    found = torch.linalg.slogdet(_gram(short, 0) / elements + EPSILON * identity).logabsdet
    return (found + (channels - short.shape[1]) * math.log(EPSILON)).view(-1, 1, 1)


def _channel_distance(x: Tensor, _: int) -> Tensor:
    return torch.cdist(x, x).sum(dim=(1, 2), keepdim=True) / max(1, x.shape[1] * (x.shape[1] - 1))


def _entropy(x: Tensor, _: int) -> Tensor:
    share = x.abs() / (x.abs().sum(dim=(1, 2), keepdim=True) + EPSILON)
    return -(share * (share + EPSILON).log()).sum(dim=(1, 2), keepdim=True)


def _number(function: Callable[[Tensor], Tensor], latex: str = "", weight: float = 1.0) -> Unary:
    return Unary(lambda x, _: function(x), "number", latex, weight=weight)


# The thirty that public sources name (mean and square root have two names there), with their traps mended: logarithms
# and roots read what is negative as zero, where the release gives NaN or zero; division keeps its sign next to zero;
# the exponent is capped; the determinant is that of the channels' Gram matrix. Those that the release defines and does
# not use, and twelve more, which the known proxies or a bounded range ask for, are drawn half as often.
UNARIES: Mapping[str, Unary] = {
    "no_op": Unary(lambda x: x, latex="@", weight=2.0),
    "log": Unary(
        lambda x: (x.clamp(min=0) + EPSILON).log(),
        latex=r"\log(@)_+",
        released=lambda x: torch.where(x < 0, torch.nan, x + EPSILON).log(),
    ),
    "abslog": Unary(
        lambda x: (x.abs() + EPSILON).log(),
        latex=r"\log\lvert @\rvert",
        released=lambda x: x.where(x != 0, 1.0).abs().log(),
    ),
    "abs": Unary(torch.abs, latex=r"\lvert @\rvert"),
    "pow2": Unary(torch.square, latex="(@)^2"),
    "exp": Unary(lambda x: x.clamp(max=30).exp(), latex="e^{@}", released=torch.exp),
    "normalize": Unary(lambda x, _: (x - _mean(x)) / (_std(x) + EPSILON), "layer"),
    "relu": Unary(torch.relu, latex="(@)_+"),
    "invert": Unary(_invert, latex="(@)^{-1}", released=lambda x: 1 / (x + EPSILON)),
    "frobenius": Unary(_frobenius, "number", r"\lVert @\rVert"),
    "mean": _number(_mean, r"\overline{@}", weight=2.0),
    "l1": _number(lambda x: _mean(x.abs()), r"\overline{\lvert @\rvert}"),
    "softmax": Unary(lambda x, _: x.softmax(dim=1), "layer"),
    "sigmoid": Unary(torch.sigmoid),
    "logsoftmax": Unary(lambda x, _: x.log_softmax(dim=1), "layer"),
    "sqrt": Unary(lambda x: x.clamp(min=0).sqrt(), latex=r"\sqrt{(@)_+}"),
    "negate": Unary(torch.neg, latex="-(@)"),
    "min_max": Unary(_min_max, "layer"),
    "std": _number(_std),
    "mish": Unary(F.mish, weight=0.5),
    "swish": Unary(F.silu, weight=0.5),
    "leaky_relu": Unary(lambda x: F.leaky_relu(x, 0.1), weight=0.5),
    "sign": Unary(torch.sign, weight=0.5),
    "p_dist": Unary(_channel_distance, "number", weight=0.5),
    "slogdet": Unary(_slogdet, "number", weight=0.5),
    "sum": Unary(lambda x, n: _mean(x) * n, "number", r"\textstyle\sum @", weight=0.5),
    "var": _number(lambda x: _std(x).square(), weight=0.5),
    "min": _number(lambda x: x.amin(dim=(1, 2), keepdim=True), weight=0.5),
    "max": _number(lambda x: x.amax(dim=(1, 2), keepdim=True), weight=0.5),
    "gram": Unary(_gram, "matrix", r"@ (@)^{\top}", weight=0.5),
    "cube": Unary(lambda x: x**3, latex="(@)^3", weight=0.5),
    "cbrt": Unary(lambda x: x.sign() * x.abs().pow(1 / 3), latex=r"\sqrt[3]{@}", weight=0.5),
    "log1p": Unary(lambda x: x.abs().log1p(), latex=r"\log(1 + \lvert @\rvert)", weight=0.5),
    "tanh": Unary(torch.tanh, latex=r"\tanh(@)", weight=0.5),
    "softplus": Unary(F.softplus, weight=0.5),
    "rsqrt": Unary(lambda x: (x.abs() + EPSILON).rsqrt(), latex=r"\lvert @\rvert^{-1/2}", weight=0.5),
    "center": Unary(lambda x, _: x - _mean(x), "layer", weight=0.5),
    "unit": Unary(lambda x, n: x / (_frobenius(x, n) + EPSILON), "layer", weight=0.5),
    "rms": _number(lambda x: _mean(x.square()).sqrt(), weight=0.5),
    "linf": _number(lambda x: x.abs().amax(dim=(1, 2), keepdim=True), r"\lVert @\rVert_\infty", weight=0.5),
    "median": _number(lambda x: x.flatten(1).median(dim=1).values.view(-1, 1, 1), weight=0.5),
    "entropy": Unary(_entropy, "number", weight=0.5),
}

# Reductions that a mean gives: functions of the numbers before it, and what becomes of the mean of n numbers.
REDUCTIONS: Mapping[str, tuple[tuple[str, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": ((), lambda mean, _: mean),
    "sum": ((), lambda mean, n: mean * n),
    "l1": (("abs",), lambda mean, _: mean),
    "rms": (("pow2",), lambda mean, _: mean.sqrt()),
    "frobenius": (("pow2",), lambda mean, n: (mean * n).sqrt()),
}


@dataclass(frozen=True)
class Binary:
    """A function of two values of like geometry; attributes as in :class:`Unary`."""

    function: Callable[[Tensor, Tensor], Tensor]
    result: str = "element"
    latex: str = ""
    weight: float = 0.05


def _rows(function: Callable[[Tensor, Tensor], Tensor]) -> Binary:
    """Turn a function of two vectors per row into a binary whose result is a number."""
    return Binary(
        lambda x, y: function(*(z.flatten(1) for z in torch.broadcast_tensors(x, y))).view(-1, 1, 1), "number"
    )


def _divergence(x: Tensor, y: Tensor) -> Tensor:
    p, q = x.log_softmax(dim=1), y.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


# The fourteen that public sources name, and three more. The released weights are .6 for a sum, .3 for a difference.
BINARIES: Mapping[str, Binary] = {
    "sum": Binary(torch.add, latex="@ + @", weight=0.6),
    "difference": Binary(torch.sub, latex="@ - @", weight=0.3),
    "product": Binary(torch.mul, latex=r"@ \cdot @"),
    "matmul": Binary(lambda x, y: x @ y.mT, "matrix", r"@ \, (@)^{\top}"),
    "average": Binary(lambda x, y: (x + y) / 2, latex=r"\tfrac12 (@ + @)"),
    "less": Binary(lambda x, y: (x < y).to(x.dtype), latex="[@ < @]"),
    "greater": Binary(lambda x, y: (x > y).to(x.dtype), latex="[@ > @]"),
    "equal": Binary(lambda x, y: (x == y).to(x.dtype), latex="[@ = @]"),
    "hamming": Binary(lambda x, y: ((x > 0) != (y > 0)).to(x.dtype)),
    "distance": _rows(lambda x, y: (x - y).norm(dim=1)),
    "divergence": _rows(_divergence),
    "cosine": _rows(lambda x, y: F.cosine_similarity(x, y, dim=1)),
    "mse": _rows(lambda x, y: (x - y).square().mean(dim=1)),
    "l1_distance": _rows(lambda x, y: (x - y).abs().mean(dim=1)),
    "ratio": Binary(lambda x, y: x * _invert(y), latex=r"\frac{@}{@}"),
    "maximum": Binary(torch.maximum, latex=r"\max(@, @)"),
    "minimum": Binary(torch.minimum, latex=r"\min(@, @)"),
}
COMMUTATIVE = ("sum", "product", "average", "equal", "hamming", "distance", "cosine", "mse", "l1_distance")
COMMUTATIVE += ("maximum", "minimum")

# Chains of unaries in each structure, of the paper's lengths. A branched genotype may go on after its binary, by two
# unaries; with no_op there and a number at the end of each branch it is the released one. Node i of a DAG has one edge
# from each input and earlier node.
CHAINS: Mapping[str, tuple[int, ...]] = {"sequential": (4,), "branched": (2, 2, 2), "dag": (2, 3, 4)}
STRUCTURES = tuple(CHAINS)
INPUT_COUNT: Mapping[str, int] = {"sequential": 1, "branched": 2, "dag": 2}
FACTOR = tuple(name for name, entry in INPUTS.items() if entry.family == "factor")
ERROR = tuple(name for name, entry in INPUTS.items() if entry.family in ("network", "error", "count"))
# What an input holds for each layer, the letter b in front of it aside: all others have the geometry of the weights.
GEOMETRY = {"A": "inputs", "C": "channels"} | dict.fromkeys("bnTOKL", "number") | dict.fromkeys(PAIRS, "pairs")
