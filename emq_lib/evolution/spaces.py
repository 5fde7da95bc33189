"""What genotypes are drawn from, and how they are crossed and mutated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emq_lib.core.checks import random_source, real_number, whole_number
from emq_lib.core.errors import GenotypeSyntaxError
from emq_lib.evolution.genotypes import Genotype, require_genotype, require_lengths, require_names
from emq_lib.evolution.primitives import BINARIES, CHAINS, INPUT_COUNT, INPUTS, STRUCTURES, UNARIES, Binary, Unary
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

    >>> Space("sequential", inputs=("W", "E"), unaries=("abs", "log"), chains=(3,)).size
    16
    """

    structure: str
    inputs: tuple[str, ...] = tuple(INPUTS)
    aggregations: tuple[str, ...] = ("sum",)
    unaries: tuple[str, ...] = tuple(UNARIES)
    binaries: tuple[str, ...] = tuple(BINARIES)
    chains: tuple[int, ...] | None = None
    prioritized: bool = True

    def __post_init__(self) -> None:
        """Check the names and the lengths of the chains.

        Raises:
            GenotypeSyntaxError: an unknown structure, input, aggregation or operation, or one that stands twice; chains
                that the structure does not have.
        """
        for what, names, known in (
            ("structure", (self.structure,), STRUCTURES),
            ("input", self.inputs, INPUTS),
            ("aggregation", self.aggregations, AGGREGATIONS),
            ("unary", self.unaries, UNARIES),
            ("binary", self.binaries, BINARIES),
        ):
            require_names(what, names, known)
            if not names or len(set(names)) < len(names):
                raise GenotypeSyntaxError(f"a space needs names of each {what}, each of them once, got {names}.")
        if not isinstance(self._chains, tuple):
            raise GenotypeSyntaxError(f"lengths of chains must be a tuple, got {self.chains!r:.80}.")
        for length in self._chains:
            whole_number(length, "the length of a chain", 1)
        require_lengths(self.structure, self._chains)

    @property
    def size(self) -> int:
        """Number of genotypes, equivalent ones included."""
        inputs = len(self.inputs) ** INPUT_COUNT[self.structure]
        binaries = len(self.binaries) if self.structure == "branched" else 1
        return inputs * len(self.unaries) ** sum(self._chains) * binaries * len(self.aggregations)

    def __iter__(self) -> Iterator[Genotype]:
        """Yield every genotype, equivalent ones included."""
        binaries = self.binaries if self.structure == "branched" else (None,)
        for inputs in itertools.product(self.inputs, repeat=INPUT_COUNT[self.structure]):
            for unaries in itertools.product(self.unaries, repeat=sum(self._chains)):  # never a list of all: it is long
                genes = iter(unaries)
                chains = tuple(tuple(itertools.islice(genes, length)) for length in self._chains)
                for binary, aggregation in itertools.product(binaries, self.aggregations):
                    yield Genotype(self.structure, inputs, chains, binary, aggregation)

    @property
    def _chains(self) -> tuple[int, ...]:
        return CHAINS[self.structure] if self.chains is None else self.chains

    def random(self, rng: np.random.Generator) -> Genotype:
        """Draw a genotype.

        Raises:
            InvalidParameterError: no source of randomness.
        """
        random_source(rng)
        inputs = tuple(self.inputs[rng.integers(len(self.inputs))] for _ in range(INPUT_COUNT[self.structure]))
        chains = tuple(tuple(self._draw(self.unaries, UNARIES, rng) for _ in range(length)) for length in self._chains)
        binary = self._draw(self.binaries, BINARIES, rng) if self.structure == "branched" else None
        aggregation = self.aggregations[rng.integers(len(self.aggregations))]
        return Genotype(self.structure, inputs, chains, binary, aggregation)

    def fit(self, genotype: Genotype) -> Genotype | None:
        """Return a genotype of this space with the same ranks, or None if it does not fit in.

        Chains are filled up with no_op; a chain on one input becomes the sum of two such branches.

        Raises:
            GenotypeSyntaxError: it is no genotype.
        """
        lengths, chains = self._chains, require_genotype(genotype).chains
        inputs, binary = genotype.inputs, genotype.binary
        if genotype.structure == "sequential" and self.structure == "branched":
            inputs, chains, binary = inputs * 2, (*chains * 2, ("no_op",)), "sum"
        elif genotype.structure != self.structure:
            return None
        if len(chains) != len(lengths) or any(map(int.__gt__, map(len, chains), lengths)):
            return None
        filled = tuple(
            chain + ("no_op",) * (length - len(chain)) for chain, length in zip(chains, lengths, strict=True)
        )
        fits = set(inputs) <= set(self.inputs) and set(itertools.chain.from_iterable(filled)) <= set(self.unaries)
        fits = fits and binary in (*self.binaries, None) and genotype.aggregation in self.aggregations
        return Genotype(self.structure, inputs, filled, binary, genotype.aggregation) if fits else None

    def _draw(self, names: Sequence[str], primitives: Mapping[str, Unary | Binary], rng: np.random.Generator) -> str:
        if not self.prioritized:
            return names[rng.integers(len(names))]
        ends = np.cumsum([primitives[name].weight for name in names])
        return names[np.searchsorted(ends, rng.random() * ends[-1], side="right")]

    def mutate(self, genotype: Genotype, *, rng: np.random.Generator, probability: float = 0.5) -> Genotype:
        """Return a copy in which each gene is drawn afresh with the given probability (the release uses one half).

        Raises:
            GenotypeSyntaxError: it is no genotype, or its structure is not the space's.
            InvalidParameterError: a probability outside 0 to 1, or no source of randomness.
        """
        return cross(genotype, self.random(rng), rng=rng, probability=probability)


def cross(first: Genotype, second: Genotype, *, rng: np.random.Generator, probability: float = 0.5) -> Genotype:
    """Return a genotype that takes each gene from the second parent with the given probability, else from the first.

    Raises:
        GenotypeSyntaxError: a parent is no genotype, or their structures or the lengths of their chains differ.
        InvalidParameterError: a probability outside 0 to 1, or no source of randomness.
    """
    random_source(rng)
    real_number(probability, "the probability of taking a gene", 0, 1, ends=True)
    shapes = [(one.structure, *map(len, one.chains)) for one in map(require_genotype, (first, second))]
    if shapes[0] != shapes[1]:
        raise GenotypeSyntaxError(f"{first} and {second} have other structures or lengths, so genes do not correspond.")

    def gene(one: str | None, two: str | None) -> str | None:
        return two if rng.random() < probability else one

    return Genotype(
        first.structure,
        tuple(map(gene, first.inputs, second.inputs)),
        tuple(tuple(map(gene, one, two)) for one, two in zip(first.chains, second.chains, strict=True)),
        gene(first.binary, second.binary),
        gene(first.aggregation, second.aggregation),
    )
