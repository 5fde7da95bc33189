"""What genotypes are drawn from, and how they are crossed and mutated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emq_lib.core.errors import GenotypeSyntaxError
from emq_lib.evolution.genotypes import Genotype
from emq_lib.evolution.primitives import BINARIES, CHAINS, INPUTS, STRUCTURES, UNARIES, Binary, Unary
from emq_lib.proxies.scores import AGGREGATIONS


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
