"""The search space of evolved proxies: inputs, primitives, three structures, genotypes, their text form, their scores.

A genotype is a small formula that turns the statistics of a network into the score of a configuration. Its values have
a geometry: one number per weight, per input, per image and channel, per layer, or per pair of layers. Explained in
chapter 03.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from emq_lib.core.errors import GenotypeSyntaxError
from emq_lib.proxies.handmade import added_logit_changes, clado
from emq_lib.proxies.layer_statistics import LayerStatistics, sampled
from emq_lib.proxies.scores import AGGREGATIONS, score

EPSILON = 1e-9
REMEMBERED = 400  # values that an evaluator keeps
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
FACTOR = tuple(name for name, entry in INPUTS.items() if entry.family == "factor")
ERROR = tuple(name for name, entry in INPUTS.items() if entry.family in ("network", "error", "count"))


@dataclass(frozen=True)
class Genotype:
    """A proxy as data.

    Attributes:
        structure: "sequential": a chain of unaries on one input. "branched": a chain on each of two inputs, a binary, a
            chain on what comes out. "dag": nodes that add what their edges bring, one edge with one unary from each of
            two inputs and each earlier node; the mean of all nodes comes out.
        inputs: one or two keys of :data:`INPUTS`.
        chains: unaries: one chain; one per branch and the last; one per node.
        binary: of a branched genotype.
        aggregation: how layers are combined, a key of :data:`~emq_lib.proxies.scores.AGGREGATIONS`.
    """

    structure: str
    inputs: tuple[str, ...]
    chains: tuple[tuple[str, ...], ...]
    binary: str | None = None
    aggregation: str = "sum"

    def __str__(self) -> str:
        """Return the text form, which :func:`parse` reads back."""
        chains = [", ".join(chain) for chain in self.chains]
        if self.structure == "sequential":
            body = f"{self.inputs[0]}: {chains[0]}"
        elif self.structure == "branched":
            one, two = (f"{name}: {chain}" for name, chain in zip(self.inputs, chains, strict=False))
            body = f"{self.binary}; {one}; {two}; {chains[2]}"
        else:
            body = "; ".join([", ".join(self.inputs), *chains])
        prefix = "" if self.aggregation == "sum" else f"{self.aggregation} "
        return f"{prefix}{self.structure}({body})"

    @property
    def complexity(self) -> int:
        """Number of operations that do something."""
        short = canonical(self)
        unaries = sum(unary != "no_op" for chain in short.chains for unary in chain)
        return len(short.inputs) + unaries + (self.binary is not None) + (self.aggregation != "sum")

    @property
    def reads(self) -> tuple[str, ...]:
        """Statistics that it needs."""
        return tuple(sorted({key for name in self.inputs for key in INPUTS[name].reads}))


def parse(text: str) -> Genotype:
    """Return the genotype of a text form.

    Raises:
        GenotypeSyntaxError: the text is not a genotype; the message gives the position and what is expected there.

    >>> str(parse("branched(product; H: no_op; E: pow2; sum, negate)"))
    'branched(product; H: no_op; E: pow2; sum, negate)'
    """
    tokens = [(match.start(), match.group()) for match in re.finditer(r"\w+|[^\w\s]", text)] + [(len(text), "")]
    position = 0

    def take(expected: str | Sequence[str] | Mapping[str, object]) -> str:
        nonlocal position
        start, token = tokens[position]
        names = [expected] if isinstance(expected, str) else list(expected)
        if token not in names:
            found = repr(token) if token else "the end"
            wanted = " or ".join(name or "the end" for name in names)
            raise GenotypeSyntaxError(f"{text!r}, position {start}: expected {wanted}, found {found}.")
        position += 1
        return token

    def chain() -> tuple[str, ...]:
        unaries = [take(UNARIES)]
        while tokens[position][1] == ",":
            take(",")
            unaries.append(take(UNARIES))
        return tuple(unaries)

    def branch() -> tuple[str, tuple[str, ...]]:
        name = take(INPUTS)
        take(":")
        return name, chain()

    aggregation = "sum" if tokens[0][1] in STRUCTURES else take((*AGGREGATIONS, *STRUCTURES))
    structure, binary = take(STRUCTURES), None
    take("(")
    if structure == "sequential":
        name, unaries = branch()
        inputs, chains = (name,), (unaries,)
    elif structure == "branched":
        binary, parts = take(BINARIES), []
        for _ in range(2):
            take(";")
            parts.append(branch())
        take(";")
        inputs, chains = tuple(name for name, _ in parts), (*(unaries for _, unaries in parts), chain())
    else:
        one = take(INPUTS)
        take(",")
        inputs, nodes = (one, take(INPUTS)), []
        while not nodes or tokens[position][1] == ";":
            take(";")
            start = tokens[position][0]
            nodes.append(chain())
            if len(nodes[-1]) != len(nodes) + 1:
                expected = f"{len(nodes) + 1} unaries, one for each input and earlier node"
                raise GenotypeSyntaxError(f"{text!r}, position {start}: expected {expected}, found {len(nodes[-1])}.")
        chains = tuple(nodes)
    take(")")
    take("")
    return Genotype(structure, inputs, chains, binary, aggregation)


def without_each_term(genotype: Genotype) -> dict[str, Genotype]:
    """Return what is left of a formula without one of its operations or one of its branches, and what is missing."""
    left = {}
    for place, chain in enumerate(genotype.chains):
        for step, unary in enumerate(chain):
            if unary != "no_op":
                shorter = (*chain[:step], "no_op", *chain[step + 1 :])
                chains = (*genotype.chains[:place], shorter, *genotype.chains[place + 1 :])
                left[f"{unary} ({place + 1}.{step + 1})"] = replace(genotype, chains=chains)
    if genotype.structure == "branched":
        *branches, last = genotype.chains
        for gone, name in enumerate(genotype.inputs):
            kept = 1 - gone
            chain = (*branches[kept], *last)
            alone = Genotype("sequential", (genotype.inputs[kept],), (chain,), None, genotype.aggregation)
            left[f"branch {gone + 1} on {name}"] = alone
    return left


_REPEATABLE = ("abs", "relu", "sign", "normalize", "min_max", "center")
_NOT_NEGATIVE = ["abs", "pow2", "exp", "relu", "sigmoid", "sqrt", "log1p", "softplus", "rsqrt", "softmax", "min_max"]
_NOT_NEGATIVE += ["l1", "frobenius", "std", "var", "rms", "linf", "entropy", "p_dist"]
_KEEPS_NUMBERS = ("mean", "sum", "max", "min", "median")


def canonical(genotype: Genotype) -> Genotype:
    """Return a shorter genotype with the same scores, the same one for many equivalent genotypes.

    Identities used: no_op does nothing; a mean, sum, maximum, minimum or median of one number is that number; abs,
    relu and leaky_relu leave alone what is not negative; some unaries repeat without effect; two negations cancel; some
    binaries do not depend on the order of their branches. A DAG keeps its edges.
    """
    if genotype.structure == "dag":
        return genotype
    *branches, last = genotype.chains if genotype.structure == "branched" else (*genotype.chains, ())
    pairs = any(name in PAIRS for name in genotype.inputs)
    short = [(name, _shortened(chain, number=False)) for name, chain in zip(genotype.inputs, branches, strict=True)]
    if genotype.structure == "sequential":
        name, chain = short[0]
        return replace(genotype, chains=(_without_last_mean(chain, pairs=pairs),))
    if genotype.binary in COMMUTATIVE:
        short.sort()
    numbers = all(any(UNARIES[unary].result == "number" for unary in chain) for _, chain in short)
    number = numbers or BINARIES[genotype.binary].result == "number"
    last = _without_last_mean(_shortened(last, number=number), pairs=pairs)
    return replace(genotype, inputs=tuple(name for name, _ in short), chains=(*(chain for _, chain in short), last))


def _shortened(chain: tuple[str, ...], *, number: bool) -> tuple[str, ...]:
    kept: list[str] = []
    for unary in chain:
        before = kept[-1] if kept else ""
        if unary == "no_op" or (number and unary in _KEEPS_NUMBERS):
            continue
        if before == unary and unary in _REPEATABLE:
            continue
        if before in _NOT_NEGATIVE and unary in ("abs", "relu", "leaky_relu"):
            continue
        if before == unary == "negate":
            kept.pop()
            continue
        kept.append(unary)
        number = number or UNARIES[unary].result == "number"
    return tuple(kept) or ("no_op",)


def _without_last_mean(chain: tuple[str, ...], *, pairs: bool) -> tuple[str, ...]:
    """Leave out a mean at the end, which every formula has; that of pairs turns them into numbers per layer."""
    return chain if pairs or chain[-1] != "mean" else chain[:-1] or ("no_op",)


def element_programs(genotype: Genotype) -> dict[tuple[str, ...], tuple[tuple[str, ...], str]]:
    """Return the parts of a formula that are element-wise up to a reduction, as programs for :mod:`emq_lib.kernels`.

    A part is the beginning of a chain on an input, or of what follows the binary of two element-wise branches on inputs
    of like geometry. A DAG has none.

    Returns:
        key of the part -> the program in postfix order, and the reduction that its mean stands for, of
        :data:`REDUCTIONS`.

    >>> element_programs(parse("branched(product; bW: no_op; G: no_op; abs, sum)"))
    {('product', 'G', 'no_op', 'bW', 'no_op', 'abs', 'sum'): (('G', 'W', 'times b', 'product', 'abs'), 'sum')}
    """
    short = canonical(genotype)
    if short.structure == "dag":
        return {}
    geometries = [_GEOMETRY.get(name[-1], "weights") for name in short.inputs]
    joined, parts, branches = short.structure == "branched", {}, []
    for name, chain, geometry in zip(short.inputs, short.chains, geometries, strict=False):
        program = (name,) if len(name) == 1 else (name[1], "times b")
        branches.append((*program, *chain))
        if geometry not in ("number", "pairs"):
            parts |= _part((name,), program, chain if joined else _reduced(chain))
    alike = joined and geometries[0] == geometries[1] and geometries[0] not in ("number", "pairs")
    functions = [UNARIES[unary] for chain in short.chains[:-1] for unary in chain]
    if alike and all(one.result == "element" for one in (*functions, BINARIES[short.binary])):
        parts |= _part(_joined(short), (*branches[0], *branches[1], short.binary), _reduced(short.chains[-1]))
    return parts


def _part(
    head: tuple[str, ...], program: tuple[str, ...], chain: tuple[str, ...]
) -> dict[tuple[str, ...], tuple[tuple[str, ...], str]]:
    """Return the beginning of a chain up to its first reduction; nothing if another function looks at whole layers."""
    for end, unary in enumerate(chain):
        if unary in REDUCTIONS:
            steps = (*program, *chain[:end], *REDUCTIONS[unary][0])
            return {head + chain[: end + 1]: (tuple(step for step in steps if step != "no_op"), unary)}
        if UNARIES[unary].result != "element":
            break
    return {}


def _reduced(chain: tuple[str, ...]) -> tuple[str, ...]:
    """Return a chain with the mean at its end that a formula has, if it does not come to one number before."""
    return chain if _ends_in_number(chain) else (*chain, "mean")


def _joined(genotype: Genotype) -> tuple[str, ...]:
    """Return the key of what a branched formula's binary gives."""
    branches = zip(genotype.inputs, genotype.chains, strict=False)
    return (genotype.binary, *itertools.chain.from_iterable((name, *chain) for name, chain in branches))


@dataclass(frozen=True)
class Space:
    """What genotypes are drawn from.

    Args:
        structure: "sequential", "branched" or "dag".
        inputs: keys of :data:`INPUTS`.
        aggregations: keys of :data:`~emq_lib.proxies.scores.AGGREGATIONS`.
        unaries: keys of :data:`UNARIES`.
        binaries: keys of :data:`BINARIES`.
        chains: lengths of the chains of unaries; None: those of the paper.
        prioritized: draw operations by their weights instead of uniformly.
    """

    structure: str
    inputs: tuple[str, ...] = tuple(INPUTS)
    aggregations: tuple[str, ...] = ("sum",)
    unaries: tuple[str, ...] = tuple(UNARIES)
    binaries: tuple[str, ...] = tuple(BINARIES)
    chains: tuple[int, ...] | None = None
    prioritized: bool = True

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            GenotypeSyntaxError: an unknown structure, input, aggregation or operation.
        """
        for what, names, known in (
            ("structure", (self.structure,), STRUCTURES),
            ("input", self.inputs, INPUTS),
            ("aggregation", self.aggregations, AGGREGATIONS),
            ("unary", self.unaries, UNARIES),
            ("binary", self.binaries, BINARIES),
        ):
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise GenotypeSyntaxError(f"unknown {what} {unknown or names}; there are {', '.join(known)}.")

    @property
    def size(self) -> int:
        """Number of genotypes, equivalent ones included."""
        inputs = len(self.inputs) ** (1 if self.structure == "sequential" else 2)
        binaries = len(self.binaries) if self.structure == "branched" else 1
        return inputs * len(self.unaries) ** sum(self._chains) * binaries * len(self.aggregations)

    def __iter__(self) -> Iterator[Genotype]:
        """Yield every genotype, equivalent ones included."""
        count = 1 if self.structure == "sequential" else 2
        binaries = self.binaries if self.structure == "branched" else (None,)
        chains = itertools.product(*(itertools.product(self.unaries, repeat=length) for length in self._chains))
        inputs = itertools.product(self.inputs, repeat=count)
        for genes in itertools.product(inputs, chains, binaries, self.aggregations):
            yield Genotype(self.structure, *genes)

    @property
    def _chains(self) -> tuple[int, ...]:
        return self.chains or CHAINS[self.structure]

    def random(self, rng: np.random.Generator) -> Genotype:
        """Draw a genotype."""
        count = 1 if self.structure == "sequential" else 2
        inputs = tuple(self.inputs[rng.integers(len(self.inputs))] for _ in range(count))
        chains = tuple(tuple(self._draw(self.unaries, UNARIES, rng) for _ in range(length)) for length in self._chains)
        binary = self._draw(self.binaries, BINARIES, rng) if self.structure == "branched" else None
        aggregation = self.aggregations[rng.integers(len(self.aggregations))]
        return Genotype(self.structure, inputs, chains, binary, aggregation)

    def fit(self, genotype: Genotype) -> Genotype | None:
        """Return a genotype of this space with the same ranks, or None if it does not fit in.

        Chains are filled up with no_op; a chain on one input becomes the sum of two such branches.
        """
        if genotype.structure == "sequential" and self.structure == "branched":
            chain = genotype.chains[0]
            genotype = Genotype("branched", genotype.inputs * 2, (chain, chain, ("no_op",)), "sum")
        lengths = self._chains
        fits = (genotype.structure, len(genotype.chains)) == (self.structure, len(lengths))
        fits = fits and set(genotype.inputs) <= set(self.inputs) and genotype.aggregation in self.aggregations
        if not fits or any(len(chain) > length for chain, length in zip(genotype.chains, lengths, strict=True)):
            return None
        filled = (
            chain + ("no_op",) * (length - len(chain)) for chain, length in zip(genotype.chains, lengths, strict=True)
        )
        return replace(genotype, chains=tuple(filled))

    def _draw(self, names: Sequence[str], primitives: Mapping[str, Unary | Binary], rng: np.random.Generator) -> str:
        if not self.prioritized:
            return names[rng.integers(len(names))]
        ends = np.cumsum([primitives[name].weight for name in names])
        return names[np.searchsorted(ends, rng.random() * ends[-1], side="right")]

    def mutate(self, genotype: Genotype, *, rng: np.random.Generator, probability: float = 0.5) -> Genotype:
        """Return a copy in which each gene is drawn afresh with the given probability (the release uses one half)."""
        return cross(genotype, self.random(rng), rng=rng, probability=probability)


def cross(first: Genotype, second: Genotype, *, rng: np.random.Generator, probability: float = 0.5) -> Genotype:
    """Return a genotype that takes each gene from the second parent with the given probability, else from the first."""

    def gene(one: str | None, two: str | None) -> str | None:
        return two if rng.random() < probability else one

    return Genotype(
        first.structure,
        tuple(map(gene, first.inputs, second.inputs)),
        tuple(tuple(map(gene, one, two)) for one, two in zip(first.chains, second.chains, strict=True)),
        gene(first.binary, second.binary),
        gene(first.aggregation, second.aggregation),
    )


@dataclass(frozen=True)
class Value:
    """Numbers of all layers, one after the other.

    Attributes:
        data: (R, elements), R = B rows, one per bit width, or one row.
        shapes: (C, K) of each layer; of pairs, a single (S B, S B).
        counts: elements of each layer, of which C K are seen.
        pairs: whether these are pairs of layers.
    """

    data: Tensor
    shapes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    pairs: bool = False

    def layers(self) -> list[Tensor]:
        """Return one (R, C, K) per layer."""
        parts = self.data.split([rows * columns for rows, columns in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @staticmethod
    def of(parts: Sequence[Tensor], counts: Sequence[int] | None = None) -> Value:
        """Return the value of one (R, C, K) per layer."""
        shapes = tuple((part.shape[1], part.shape[2]) for part in parts)
        seen = tuple(rows * columns for rows, columns in shapes)
        return Value(torch.cat([part.flatten(1) for part in parts], dim=1), shapes, tuple(counts or seen))


class Evaluator:
    """Computes the scores of genotypes on one study's statistics; a part that was seen before is remembered.

    Args:
        statistics: of L layers in S slots at B choices.
        mode: "corrected", or "released": primitives with the traps of the released code.
        device: where statistics with one number per weight are kept.
        batched: whether the element-wise formulas of a population run in one launch of a kernel; None: on a GPU.
    """

    def __init__(
        self, statistics: LayerStatistics, *, mode: str = "corrected", device: str = "cpu", batched: bool | None = None
    ) -> None:
        if mode not in ("corrected", "released"):
            raise GenotypeSyntaxError(f"unknown mode {mode!r}; there are corrected and released.")
        self.choices, self.slots = statistics.choices, statistics.slot_count
        self._statistics, self._mode, self._device = statistics, mode, device
        self._batched = device != "cpu" if batched is None else batched
        self._slot_of = torch.tensor(statistics.slots, device=device)
        self._known: dict[tuple, Value] = {}
        self._inputs: dict[str, Value] = {}
        self._prepared: dict[tuple, Value] = {}

    def prepare(self, genotypes: Sequence[Genotype]) -> None:
        """Compute the element-wise parts of a population's formulas in one launch for each geometry, if batched."""
        self._prepared = {}
        if not self._batched or self._mode == "released":
            return
        from emq_lib.kernels import postfix_means  # Triton takes seconds to import

        groups: dict[tuple, dict[tuple[str, ...], tuple[tuple[str, ...], str]]] = {}
        for genotype in genotypes:
            for key, part in element_programs(genotype).items():
                groups.setdefault(self.input(part[0][0]).shapes, {})[key] = part
        for shapes, parts in groups.items():
            programs = [program for program, _ in parts.values()]
            inputs = {name: self.input(name) for program in programs for name in program if name in INPUTS}
            data = {name: value.data for name, value in inputs.items()}
            means = postfix_means(programs, data, [rows * columns for rows, columns in shapes], self.choices)
            counts = torch.tensor(next(iter(inputs.values())).counts, device=means.device)
            for (key, (_, reduction)), mean in zip(parts.items(), means, strict=True):
                numbers = REDUCTIONS[reduction][1](mean, counts)
                self._prepared[key] = Value(numbers, ((1, 1),) * len(shapes), (1,) * len(shapes))

    def scores(self, genotype: Genotype) -> np.ndarray:
        """Return the score table (S, B), or the matrix of pairs (S B, S B) of a formula that ends in one, float64.

        It may hold NaN or infinity, which screening rejects.
        """
        with torch.inference_mode():
            value = self._value(canonical(genotype))
            if value.pairs:
                return value.data.view(value.shapes[0]).double().cpu().numpy()
            rows = self._means(value).data.double().cpu().numpy()
        table = np.broadcast_to(rows, (len(self.choices), rows.shape[1])).T
        return self._statistics.per_slot(table)

    def score(self, genotype: Genotype, configs: np.ndarray) -> np.ndarray:
        """Return the score of each configuration (N, S), shape (N,)."""
        return score(self.scores(genotype), configs, self.choices, aggregation=genotype.aggregation)

    def _value(self, genotype: Genotype) -> Value:
        if genotype.structure == "sequential":
            (name,), (chain,) = genotype.inputs, genotype.chains
            return self._batched_chain((name,), _reduced(chain)) or self._chain(name, chain)
        if genotype.structure == "branched":
            *branches, last = genotype.chains
            value = self._batched_chain(_joined(genotype), _reduced(last))
            if value is None:
                one, two = (
                    self._batched_chain((name,), chain) or self._chain(name, chain)
                    for name, chain in zip(genotype.inputs, branches, strict=True)
                )
                value = self._binary(genotype.binary, one, two)
                for unary in last:
                    value = self._unary(unary, value)
            return value
        states = [self.input(name) for name in genotype.inputs]
        for chain in genotype.chains:
            edges = [self._unary(unary, state) for unary, state in zip(chain, states, strict=True)]
            node = edges[0]
            for edge in edges[1:]:
                node = self._binary("sum", node, edge)
            states.append(node)
        nodes = [self._means(node) for node in states[2:]]
        mean = sum(node.data for node in nodes) / len(nodes)
        return replace(nodes[0], data=mean)

    def _batched_chain(self, head: tuple[str, ...], chain: tuple[str, ...]) -> Value | None:
        """Return the value after the unaries from the longest part that :meth:`prepare` computed; None if none."""
        for end in range(len(chain), 0, -1):
            if value := self._prepared.get(head + chain[:end]):
                for unary in chain[end:]:
                    value = self._unary(unary, value)
                return value
        return None

    def _chain(self, name: str, chain: Sequence[str]) -> Value:
        """Return the value after the unaries; every beginning of a chain is remembered."""
        value = self.input(name)
        for end in range(1, len(chain) + 1):
            key = (name, *chain[:end])
            if key not in self._known:
                if len(self._known) >= REMEMBERED:
                    del self._known[next(iter(self._known))]
                self._known[key] = self._unary(chain[end - 1], value)
            value = self._known[key]
        return value

    def _unary(self, name: str, value: Value) -> Value:
        unary = UNARIES[name]
        function = unary.released if self._mode == "released" and unary.released else unary.function
        if unary.result == "element":
            return replace(value, data=function(value.data))
        if not value.pairs:
            parts = [function(layer, count) for layer, count in zip(value.layers(), value.counts, strict=True)]
            return Value.of(parts, value.counts if unary.result == "layer" else None)
        if unary.result == "number":
            return self._over_others(value, function)
        (matrix,) = value.layers()
        return replace(value, data=function(matrix, value.counts[0]).flatten(1))

    def _over_others(self, value: Value, function: Callable[[Tensor, int], Tensor]) -> Value:
        """Reduce pairs to a number per layer and width: average over the other layer's widths, then reduce.

        A pair stands twice in the matrix, so its entries count twice; on the diagonal stands a layer alone. The sum is
        then the expected score of a layer at a width, whatever the others do.
        """
        choices = len(self.choices)
        matrix = value.data.view(self.slots * choices, self.slots, choices)
        others = 2 * matrix.mean(dim=2)
        own = torch.arange(self.slots, device=matrix.device).repeat_interleave(choices)
        options = torch.arange(len(own), device=matrix.device)
        others[options, own] = value.data.view(value.shapes[0]).diagonal()
        numbers = function(others[:, None, :], self.slots).reshape(self.slots, choices)
        return self._of_slots(numbers)

    def _binary(self, name: str, one: Value, two: Value) -> Value:
        binary = BINARIES[name]
        if one.shapes != two.shapes or one.pairs != two.pairs:
            one, two = self._means(one), self._means(two)
        if binary.result == "element":
            return replace(one, data=binary.function(one.data, two.data))
        parts = [binary.function(x, y) for x, y in zip(one.layers(), two.layers(), strict=True)]
        if one.pairs:
            return replace(one, data=parts[0].flatten(1).expand(1, one.data.shape[1]))
        return Value.of(parts)

    def _means(self, value: Value) -> Value:
        """Return one number per layer."""
        return self._unary("mean", value) if value.pairs or set(value.shapes) != {(1, 1)} else value

    def input(self, name: str) -> Value:
        """Return an input's value."""
        if name not in self._inputs:
            self._inputs[name] = self._load(name)
        return self._inputs[name]

    def _load(self, name: str) -> Value:
        statistics = self._statistics
        if len(name) == 2:
            plain = self.input(name[1])
            bits = torch.tensor(self.choices, dtype=torch.float32, device=self._device)[:, None]
            return replace(plain, data=bits * plain.data)
        if name in PAIRS:
            matrix = -clado(statistics) if name == "P" else -added_logit_changes(statistics)
            data = torch.from_numpy(matrix).float().to(self._device).reshape(1, -1)
            return Value(data, (matrix.shape,), (matrix.size,), pairs=True)
        per_layer = {
            "b": lambda: np.repeat(np.array(self.choices)[:, None], len(statistics.names), axis=1),
            "n": lambda: statistics.parameters[None],
            "T": lambda: (statistics.trace / statistics.parameters)[None],
            "O": lambda: statistics.output_error.T,
        }
        if name in per_layer:
            return self._of_layers(per_layer[name]())
        if name in ("K", "L"):
            return self._of_slots(torch.tensor(statistics.kl if name == "K" else statistics.loss))
        tensors: Sequence[Tensor] = {
            "W": lambda: [sampled(w)[None] for w in statistics.weights],
            "E": lambda: [sampled(e) for e in statistics.errors],
            "A": lambda: [a[None] for a in statistics.activations],
            "G": lambda: [g[None] for g in statistics.gradients],
            "V": lambda: [v[None] for v in statistics.virtual_gradients],
            "R": lambda: [r[None] for r in statistics.positive_gradients],
            "H": lambda: [h[None] for h in statistics.curvature],
            "C": lambda: [c[None] / (2 * c.shape[1]) ** 0.5 for c in statistics.channel_products],
        }[name]()
        counts = None if name in ("A", "C") else statistics.parameters.tolist()
        return Value.of([tensor.float().to(self._device) for tensor in tensors], counts)

    def _of_layers(self, rows: np.ndarray) -> Value:
        data = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to(self._device)
        return Value(data, ((1, 1),) * data.shape[1], (1,) * data.shape[1])

    def _of_slots(self, table: Tensor) -> Value:
        """Share what is known of a slot (S, B) equally among its layers."""
        rows = table.to(self._device).T[:, self._slot_of] / self._slot_of.bincount()[self._slot_of]
        return Value(rows.float(), ((1, 1),) * rows.shape[1], (1,) * rows.shape[1])


# Hand-made proxies that are points of the space.
KNOWN: Mapping[str, Genotype] = {
    name: parse(text)
    for name, text in {
        "bit sum": "sequential(b: no_op)",
        "parameter bits": "branched(product; b: no_op; n: no_op; no_op)",
        "HAWQ-V2": "branched(product; T: no_op; E: pow2, sum; negate)",
        "EMQ": "branched(product; bV: abslog, softmax, mean; bW: relu, sqrt, mean; no_op)",
        "Fisher error": "branched(product; H: no_op; E: pow2; sum, negate)",
        "relative weight error": "branched(ratio; E: pow2, sum; W: pow2, sum; negate)",
        "SQNR": "branched(ratio; W: frobenius; E: frobenius; log)",
        "relative output error": "sequential(O: negate)",
        "one-layer loss": "sequential(L: negate)",
        "one-layer KL": "sequential(K: negate)",
        "sqrt one-layer KL": "sequential(K: sqrt, negate)",
        "CLADO": "sequential(P: negate)",
        "added logit changes": "sequential(D: negate)",
        "bit-SNIP": "branched(product; bW: no_op; G: no_op; abs, sum)",
        "bit-Synflow": "branched(product; bW: no_op; R: no_op; abs, sum)",
        "bit-plain": "branched(product; bW: no_op; G: no_op; sum)",
        "bit-Fisher": "branched(product; b: no_op; C: pow2, sum; no_op)",
        "bit-grad-norm": "branched(product; b: no_op; G: frobenius; no_op)",
        "bit-L2": "branched(product; b: no_op; W: frobenius; no_op)",
    }.items()
}


def to_latex(genotype: Genotype) -> str:
    r"""Return the proxy as a formula; a bar is the mean over a layer, $(x)_+$ the positive part.

    >>> to_latex(parse("sequential(E: pow2, negate)"))
    'S = \\sum_l \\overline{-((E_b)^2)}'
    """
    short = canonical(genotype)

    def chained(formula: str, chain: Sequence[str]) -> str:
        for unary in chain:
            template = UNARIES[unary].latex or rf"\operatorname{{{unary.replace('_', '')}}}(@)"
            formula = template.replace("@", formula)
        return formula

    if short.structure == "dag":
        states = [INPUTS[name].latex for name in short.inputs]
        for chain in short.chains:
            edges = [chained(state, (unary,)) for unary, state in zip(chain, states, strict=True)]
            states.append(f"({' + '.join(edges)})")
        formula = rf"\tfrac1{len(short.chains)} \overline{{{' + '.join(states[2:])}}}"
        return _TOTALS[genotype.aggregation] + formula
    branches = list(zip(short.inputs, short.chains, strict=False))
    kinds = [_kind(name, chain) for name, chain in branches]
    parts = [chained(INPUTS[name].latex, chain) for name, chain in branches]
    formula, kind = parts[0], kinds[0]
    if short.structure == "branched":
        if kinds[0] != kinds[1]:
            parts = [
                part if kind == "number" else rf"\overline{{{part}}}" for part, kind in zip(parts, kinds, strict=True)
            ]
            kind = "number"
        template = BINARIES[short.binary].latex or rf"\operatorname{{{short.binary.replace('_', '')}}}(@, @)"
        one, two = (rf"\left({part}\right)" if " " in part and "frac" not in template else part for part in parts)
        formula = chained(template.replace("@", one, 1).replace("@", two, 1), short.chains[2])
        kind = "number" if _ends_in_number(short.chains[2]) else kind
    total = r"S = \sum_{l, l'} " if kind == "pairs" and genotype.aggregation == "sum" else _TOTALS[genotype.aggregation]
    return total + (formula if kind in ("number", "pairs") else rf"\overline{{{formula}}}")


def _ends_in_number(chain: Sequence[str]) -> bool:
    return any(UNARIES[unary].result == "number" for unary in chain)


def _kind(name: str, chain: Sequence[str]) -> str:
    """Return what a chain on an input gives for each layer: one "number", or many, of which kind."""
    return "number" if _ends_in_number(chain) else _GEOMETRY.get(name[-1], "weights")


_TOTALS = {
    "sum": r"S = \sum_l ",
    "weakest": r"S = \min_l ",
    "depth": r"S = \sum_l l \, ",
    "survival": r"S = \sum_l \prod_{k \le l} \exp ",
}
_GEOMETRY = {"A": "inputs", "C": "channels"} | dict.fromkeys("bnTOKL", "number") | dict.fromkeys(PAIRS, "pairs")
