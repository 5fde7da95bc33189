"""Evolved proxies as data: genotypes, their text form, shorter equivalents, and formulas in LaTeX.

Explained in chapter 03.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from emq_lib.core.errors import GenotypeSyntaxError
from emq_lib.evolution.primitives import (
    BINARIES,
    COMMUTATIVE,
    GEOMETRY,
    INPUT_COUNT,
    INPUTS,
    PAIRS,
    STRUCTURES,
    UNARIES,
)
from emq_lib.proxies.scores import AGGREGATIONS

LONGEST = 64  # functions of a genotype; the paper's structures have nine at most
_LONGEST_TEXT = 2_000  # characters


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

    Raises:
        GenotypeSyntaxError: an unknown name, a number of inputs or chains that the structure does not have, or more
            than 64 functions.
    """

    structure: str
    inputs: tuple[str, ...]
    chains: tuple[tuple[str, ...], ...]
    binary: str | None = None
    aggregation: str = "sum"

    def __post_init__(self) -> None:
        """Check the names and how many there are."""
        require_names("structure", (self.structure,), STRUCTURES)
        require_names("input", self.inputs, INPUTS)
        require_names("aggregation", (self.aggregation,), AGGREGATIONS)
        require_names("binary", () if self.binary is None else (self.binary,), BINARIES)
        if not isinstance(self.chains, tuple):
            raise GenotypeSyntaxError(f"chains of functions must be tuples, got {self.chains!r:.80}.")
        for chain in self.chains:
            require_names("unary", chain, UNARIES)
        require_lengths(self.structure, tuple(map(len, self.chains)))
        if len(self.inputs) != INPUT_COUNT[self.structure]:
            raise GenotypeSyntaxError(
                f"a {self.structure} genotype reads {INPUT_COUNT[self.structure]}, got {', '.join(self.inputs) or 0}."
            )
        if (self.binary is not None) != (self.structure == "branched"):
            raise GenotypeSyntaxError(f"a {self.structure} genotype with {self.binary!r} as its binary.")

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


def require_names(what: str, names: tuple[str, ...], known: Sequence[str] | Mapping[str, object]) -> None:
    """Check that all names are known.

    Raises:
        GenotypeSyntaxError: one is not, or the names are no tuple.
    """
    if not isinstance(names, tuple):
        raise GenotypeSyntaxError(f"names of each {what} must be a tuple, got {names!r:.80}.")
    unknown = [name for name in names if not (isinstance(name, str) and name in known)]
    if unknown:
        raise GenotypeSyntaxError(f"unknown {what} {unknown[:3]!r:.200}; there are {', '.join(known)}.")


def require_lengths(structure: str, lengths: tuple[int, ...]) -> None:
    """Check how many unaries the chains of a genotype have.

    Raises:
        GenotypeSyntaxError: the structure has another number of chains, a chain is empty, a node of a DAG does not have
            one unary for each input and earlier node, or there are more than 64 in all.
    """
    nodes = tuple(range(2, 2 + len(lengths)))
    fits = {
        "sequential": len(lengths) == 1,
        "branched": len(lengths) == 3,
        "dag": len(lengths) > 0 and lengths == nodes,
    }[structure]
    if not fits or min(lengths) < 1:
        raise GenotypeSyntaxError(
            f"chains of {lengths[:9]} unaries make no {structure} genotype: a sequential one has one chain, a branched "
            "one three, a node of a DAG one unary for each input and earlier node."
        )
    if sum(lengths) > LONGEST:
        raise GenotypeSyntaxError(f"a genotype of {sum(lengths):,} functions; there may be {LONGEST} at most.")


def require_genotype(genotype: Genotype) -> Genotype:
    """Return a genotype as it is.

    Raises:
        GenotypeSyntaxError: it is none.
    """
    if not isinstance(genotype, Genotype):
        raise GenotypeSyntaxError(f"a Genotype is needed, got {genotype!r:.80}; parse(text) makes one of a text form.")
    return genotype


def parse(text: str) -> Genotype:
    """Return the genotype of a text form.

    Args:
        text: up to 2,000 characters.

    Raises:
        GenotypeSyntaxError: the text is not a genotype; the message gives the position and what is expected there.

    >>> str(parse("branched(product; H: no_op; E: pow2; sum, negate)"))
    'branched(product; H: no_op; E: pow2; sum, negate)'
    """
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
        raise GenotypeSyntaxError(
            f"a genotype is a text of {_LONGEST_TEXT:,} characters at most, got {type(text).__name__}: {text!r:.80}."
        )
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
    for place, chain in enumerate(require_genotype(genotype).chains):
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

    Raises:
        GenotypeSyntaxError: it is no genotype.
    """
    if require_genotype(genotype).structure == "dag":
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


# Hand-made proxies that are points of the space: the same scores as by hand. Formulas read a sample of large layers, so
# those that add up over weights are estimates there, good ones but for bit-plain, whose terms cancel.
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
        kind = "number" if ends_in_number(short.chains[2]) else kind
    total = r"S = \sum_{l, l'} " if kind == "pairs" and genotype.aggregation == "sum" else _TOTALS[genotype.aggregation]
    return total + (formula if kind in ("number", "pairs") else rf"\overline{{{formula}}}")


def ends_in_number(chain: Sequence[str]) -> bool:
    """Return whether a chain of unaries comes to one number per layer."""
    return any(UNARIES[unary].result == "number" for unary in chain)


def _kind(name: str, chain: Sequence[str]) -> str:
    """Return what a chain on an input gives for each layer: one "number", or many, of which kind."""
    return "number" if ends_in_number(chain) else GEOMETRY.get(name[-1], "weights")


_TOTALS = {
    "sum": r"S = \sum_l ",
    "weakest": r"S = \min_l ",
    "depth": r"S = \sum_l l \, ",
    "survival": r"S = \sum_l \prod_{k \le l} \exp ",
}
