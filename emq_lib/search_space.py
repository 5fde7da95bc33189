"""The search space of evolved proxies: inputs, primitives, two structures, genotypes and their text form.

A genotype is a small formula that turns the statistics of one layer at one bit width into a number; the score of a
configuration is the sum of these numbers over its layers. Explained in chapter 03.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from emq_lib.errors import GenotypeSyntaxError
from emq_lib.layer_statistics import LayerStatistics

EPSILON = 1e-9
INPUTS = ("W", "A", "G", "H", "E", "bW", "bA", "bG", "bH")
STRUCTURES = ("linear", "branched")
LINEAR_LENGTH, BRANCH_LENGTH = 4, 2


def _reduce(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Turn a reduction of (B, C * K) to (B,) into a unary on (B, C, K) that returns (B, 1, 1)."""
    return lambda x: function(x.flatten(1)).view(-1, 1, 1)


def _normalize(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(1)
    mean, std = flat.mean(dim=1), flat.std(dim=1, correction=0)
    return (x - mean.view(-1, 1, 1)) / (std.view(-1, 1, 1) + EPSILON)


def _min_max(x: torch.Tensor) -> torch.Tensor:
    low, high = x.flatten(1).amin(dim=1).view(-1, 1, 1), x.flatten(1).amax(dim=1).view(-1, 1, 1)
    return (x - low) / (high - low + EPSILON)


def _invert(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, -1.0, 1.0) / (x.abs() + EPSILON)


# Unaries act on (B, C, K), one slice per bit width, and return that shape or (B, 1, 1). The released operators with
# their traps mended: logarithm and square root read negative inputs as zero, where the release gives NaN or zero;
# division keeps its sign next to zero; the exponent is capped. The release lists the mean twice; sum, maximum, minimum,
# variance and sign stand in the freed places.
UNARIES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "no_op": lambda x: x,
    "log": lambda x: (x.clamp(min=0) + EPSILON).log(),
    "abslog": lambda x: (x.abs() + EPSILON).log(),
    "abs": torch.abs,
    "pow2": torch.square,
    "exp": lambda x: x.clamp(max=30).exp(),
    "sqrt": lambda x: x.clamp(min=0).sqrt(),
    "invert": _invert,
    "negate": torch.neg,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "normalize": _normalize,
    "min_max": _min_max,
    "softmax": lambda x: x.softmax(dim=1),
    "logsoftmax": lambda x: x.log_softmax(dim=1),
    "mean": _reduce(lambda x: x.mean(dim=1)),
    "sum": _reduce(lambda x: x.sum(dim=1)),
    "max": _reduce(lambda x: x.amax(dim=1)),
    "min": _reduce(lambda x: x.amin(dim=1)),
    "std": _reduce(lambda x: x.std(dim=1, correction=0)),
    "var": _reduce(lambda x: x.var(dim=1, correction=0)),
    "l1": _reduce(lambda x: x.abs().mean(dim=1)),
    "frobenius": _reduce(lambda x: x.square().sum(dim=1).sqrt()),
}
SCALAR = ("mean", "sum", "max", "min", "std", "var", "l1", "frobenius")

# Binaries act on two tables (S, B). The release has matrix multiplication for a fourth one, which fails on the scalars
# that branches reduce to; division stands in its place.
BINARIES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sum": np.add,
    "difference": np.subtract,
    "product": np.multiply,
    "ratio": lambda x, y: x / (np.where(y < 0, -1.0, 1.0) * (np.abs(y) + EPSILON)),
}
COMMUTATIVE = ("sum", "product")

# Operation sampling prioritization: how often each operation is drawn, relative to the others. The released weights are
# 2 : 1 for no_op among unaries, and .6 : .3 : .05 : .05 among binaries.
UNARY_WEIGHTS: Mapping[str, float] = {name: 2.0 if name == "no_op" else 1.0 for name in UNARIES}
BINARY_WEIGHTS: Mapping[str, float] = {"sum": 0.6, "difference": 0.3, "product": 0.05, "ratio": 0.05}


@dataclass(frozen=True)
class Branch:
    """An input and the unaries applied to it in order; what comes out is averaged to one number per layer and width."""

    source: str
    unaries: tuple[str, ...]

    def __str__(self) -> str:
        """Return the text form, e.g. ``E: pow2, mean``."""
        return f"{self.source}: {', '.join(self.unaries)}"


@dataclass(frozen=True)
class Genotype:
    """A proxy as data: one branch ("linear"), or two joined by a binary ("branched")."""

    branches: tuple[Branch, ...]
    binary: str | None = None

    @property
    def structure(self) -> str:
        """Name of the structure."""
        return "linear" if self.binary is None else "branched"

    def __str__(self) -> str:
        """Return the text form, which :func:`parse` reads back."""
        if self.binary is None:
            return f"linear({self.branches[0]})"
        return f"branched({self.binary}; {self.branches[0]}; {self.branches[1]})"


def parse(text: str) -> Genotype:
    """Return the genotype of a text form.

    Raises:
        GenotypeSyntaxError: the text is not a genotype; the message gives the position and what is expected there.

    >>> str(parse("branched(product; H: no_op, mean; E: pow2, mean)"))
    'branched(product; H: no_op, mean; E: pow2, mean)'
    """
    tokens = [(match.start(), match.group()) for match in re.finditer(r"\w+|[^\w\s]", text)] + [(len(text), "")]
    position = 0

    def take(*expected: str) -> str:
        nonlocal position
        start, token = tokens[position]
        if token not in expected:
            found = repr(token) if token else "the end"
            raise GenotypeSyntaxError(f"{text!r}, position {start}: expected {' or '.join(expected)}, found {found}.")
        position += 1
        return token

    def branch() -> Branch:
        source, unaries = take(*INPUTS), []
        take(":")
        unaries.append(take(*UNARIES))
        while tokens[position][1] == ",":
            take(",")
            unaries.append(take(*UNARIES))
        return Branch(source, tuple(unaries))

    structure, binary = take(*STRUCTURES), None
    take("(")
    if structure == "branched":
        binary = take(*BINARIES)
        take(";")
    branches = [branch()]
    if structure == "branched":
        take(";")
        branches.append(branch())
    take(")")
    take("")
    return Genotype(tuple(branches), binary)


def canonical(genotype: Genotype) -> Genotype:
    """Return a shorter genotype with the same score table, the same one for many equivalent genotypes.

    Identities used: no_op does nothing; a mean, sum, maximum or minimum of one number is that number; abs, relu and
    sign repeat without effect; two negations cancel; sums and products do not depend on the order of their branches.
    """
    branches = tuple(Branch(branch.source, _shortened(branch.unaries)) for branch in genotype.branches)
    if genotype.binary in COMMUTATIVE:
        branches = tuple(sorted(branches, key=str))
    return replace(genotype, branches=branches)


def _shortened(unaries: tuple[str, ...]) -> tuple[str, ...]:
    kept: list[str] = []
    scalar = False
    for unary in unaries:
        if unary == "no_op" or (scalar and unary in ("mean", "sum", "max", "min")):
            continue
        if kept and kept[-1] == unary and unary in ("abs", "relu", "sign"):
            continue
        if kept and kept[-1] == unary == "negate":
            kept.pop()
            continue
        kept.append(unary)
        scalar = scalar or unary in SCALAR
    if kept and kept[-1] == "mean":
        kept.pop()  # every branch ends with a mean
    return tuple(kept) or ("no_op",)


def random_genotype(structure: str, *, rng: np.random.Generator, prioritized: bool = True) -> Genotype:
    """Draw a genotype.

    Args:
        structure: "linear" (four unaries on one input) or "branched" (two on each of two inputs, then a binary).
        rng: source of randomness.
        prioritized: draw operations by their weights instead of uniformly.
    """
    if structure not in STRUCTURES:
        raise GenotypeSyntaxError(f"unknown structure {structure!r}; there are {', '.join(STRUCTURES)}.")
    if structure == "linear":
        return Genotype((_random_branch(LINEAR_LENGTH, rng, prioritized),))
    branches = tuple(_random_branch(BRANCH_LENGTH, rng, prioritized) for _ in range(2))
    return Genotype(branches, _draw(BINARY_WEIGHTS, rng, prioritized))


def _random_branch(length: int, rng: np.random.Generator, prioritized: bool) -> Branch:
    source = INPUTS[rng.integers(len(INPUTS))]
    return Branch(source, tuple(_draw(UNARY_WEIGHTS, rng, prioritized) for _ in range(length)))


def _draw(weights: Mapping[str, float], rng: np.random.Generator, prioritized: bool) -> str:
    shares = np.array(list(weights.values())) if prioritized else np.ones(len(weights))
    return list(weights)[rng.choice(len(weights), p=shares / shares.sum())]


def mutate(genotype: Genotype, *, rng: np.random.Generator, probability: float = 0.5) -> Genotype:
    """Return a copy in which each gene is drawn afresh with the given probability (the release uses one half)."""
    return cross(genotype, random_genotype(genotype.structure, rng=rng), rng=rng, probability=probability)


def cross(first: Genotype, second: Genotype, *, rng: np.random.Generator, probability: float = 0.5) -> Genotype:
    """Return a genotype that takes each gene from the second parent with the given probability, else from the first."""

    def gene(one: str, two: str) -> str:
        return two if rng.random() < probability else one

    branches = tuple(
        Branch(gene(one.source, two.source), tuple(map(gene, one.unaries, two.unaries)))
        for one, two in zip(first.branches, second.branches, strict=True)
    )
    return Genotype(branches, None if first.binary is None else gene(first.binary, second.binary))


class Evaluator:
    """Computes score tables of genotypes on one study's statistics; a branch is computed once and remembered.

    Args:
        statistics: of S layers at B choices.
    """

    def __init__(self, statistics: LayerStatistics) -> None:
        self._choices = torch.tensor(statistics.choices, dtype=torch.float32).view(-1, 1, 1)
        self._shape = (len(statistics.names), len(statistics.choices))
        self._per_slot = statistics.per_slot
        self._inputs = {
            "W": statistics.weights,
            "A": statistics.activations,
            "G": statistics.gradients,
            "H": statistics.curvature,
            "E": statistics.errors,
        }
        self._branches: dict[Branch, np.ndarray] = {}

    def table(self, genotype: Genotype) -> np.ndarray:
        """Return the score table, float64, shape (S, B); it may hold NaN or infinity, which screening rejects."""
        parts = [self.branch(branch) for branch in genotype.branches]
        with np.errstate(over="ignore", invalid="ignore"):
            joined = parts[0] if genotype.binary is None else BINARIES[genotype.binary](*parts)
            return self._per_slot(joined)

    def branch(self, branch: Branch) -> np.ndarray:
        """Return a branch's mean per layer and choice, shape (S, B); computed in float32, averaged in float64."""
        if branch not in self._branches:
            table = np.empty(self._shape)
            for slot, tensor in enumerate(self._inputs[branch.source[-1]]):
                x = tensor if branch.source == "E" else tensor[None]
                if branch.source.startswith("b"):
                    x = x * self._choices.to(x.device)
                for unary in branch.unaries:
                    x = UNARIES[unary](x)
                table[slot] = x.mean(dim=(1, 2), dtype=torch.float64).cpu().numpy()
            self._branches[branch] = table
        return self._branches[branch]


_SYMBOLS = {"W": "W", "A": "A", "G": "G", "H": "H", "E": "E_b", "bW": "b W", "bA": "b A", "bG": "b G", "bH": "b H"}
_LATEX = {
    "log": r"\log(@)_+",
    "abslog": r"\log\lvert @\rvert",
    "abs": r"\lvert @\rvert",
    "pow2": r"(@)^2",
    "exp": r"e^{@}",
    "sqrt": r"\sqrt{(@)_+}",
    "invert": r"(@)^{-1}",
    "negate": r"-(@)",
    "relu": r"(@)_+",
    "sum": r"\textstyle\sum @",
    "l1": r"\overline{\lvert @\rvert}",
    "mean": r"\overline{@}",
    "frobenius": r"\lVert @\rVert",
}
_JOINED = {"sum": "@ + @", "difference": "@ - @", "product": r"@ \cdot @", "ratio": r"\frac{@}{@}"}


def to_latex(genotype: Genotype) -> str:
    r"""Return the proxy as a formula; a bar is the mean over a layer, $(x)_+$ the positive part.

    >>> to_latex(parse("linear(E: pow2, negate)"))
    'S = \\sum_l \\overline{-((E_b)^2)}'
    """
    parts = []
    for branch in canonical(genotype).branches:
        formula = _SYMBOLS[branch.source]
        for unary in branch.unaries:
            if unary != "no_op":
                template = _LATEX.get(unary, rf"\operatorname{{{unary.replace('_', '')}}}(@)")
                formula = template.replace("@", formula)
        parts.append(formula if set(SCALAR) & set(branch.unaries) else rf"\overline{{{formula}}}")
    joined = "@" if genotype.binary is None else _JOINED[genotype.binary]
    for part in parts:
        joined = joined.replace("@", part, 1)
    return r"S = \sum_l " + joined
