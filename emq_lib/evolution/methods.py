"""Ways to search: what formulas may read, what fitness is, how the search runs; and one search from start to end.

Explained in chapter 03.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.profiles import EvolutionBudget
from emq_lib.evolution.fitness import Judge, Judgements, Problem
from emq_lib.evolution.genotypes import KNOWN, Genotype
from emq_lib.evolution.primitives import INPUTS
from emq_lib.evolution.search import GENES, Generation, evolve, evolve_front, improvements, random_search
from emq_lib.evolution.spaces import Space
from emq_lib.proxies.layer_statistics import ACTIVATION_IMAGES, FEW_IMAGES
from emq_lib.proxies.scores import AGGREGATIONS

BINS, HALVES, FEW, PENALTY = 5, 8, 50, 0.002
GOALS = ("ranks", "rho", "few", "halves", "short", "sizes", "three")


@dataclass(frozen=True)
class Method:
    """One way to search.

    Attributes:
        inputs: what formulas may read.
        goal: what fitness is: "ranks", the paper's; "rho", that of all configurations alone; "few", the paper's on the
            first 50 configurations; "halves", the mean less the deviation over eight random halves; "short", less .002
            for each operation; "sizes", rho inside five bins of size; "three", the paper's, beside cost and complexity.
        separable: whether formulas must be sums over layers.
        rising: whether a layer must never score lower with more bits.
        diversity: whether a newcomer contests every child.
        screening: whether equivalent candidates are recognized.
        prioritized: whether operations are drawn by their weights.
        genes: share of its genes that a mutation draws afresh.
        known: whether the population starts from hand-made proxies.
        islands: populations that share the budget.
        times: how many times the budget's iterations it runs.

    Raises:
        InvalidParameterError: an unknown goal.
    """

    inputs: tuple[str, ...] = tuple(INPUTS)
    goal: str = "ranks"
    separable: bool = True
    rising: bool = False
    diversity: bool = True
    screening: bool = True
    prioritized: bool = True
    genes: float = GENES
    known: bool = False
    islands: int = 1
    times: int = 1

    def __post_init__(self) -> None:
        """Check the goal."""
        _check_goal(self.goal)

    def space(self, structure: str) -> Space:
        """Return what it draws from: genotypes of a structure, all aggregations if they need not be separable."""
        aggregations = ("sum",) if self.separable else tuple(AGGREGATIONS)
        return Space(structure, self.inputs, aggregations, prioritized=self.prioritized)

    def judge(self, problems: Sequence[Problem], journal: Judgements | None = None) -> Judge:
        """Return its judge, for problems of :func:`problems_for` its goal."""
        return Judge(
            problems,
            "stable" if self.goal == "halves" else "mean",
            penalty=PENALTY if self.goal == "short" else 0.0,
            separable=self.separable,
            rising=self.rising,
            screening=self.screening,
            journal=journal,
        )


def _check_goal(goal: str) -> None:
    if not (isinstance(goal, str) and goal in GOALS):
        raise InvalidParameterError(f"unknown goal {goal!r:.80}; there are {', '.join(GOALS)}.")


def problems_for(
    goal: str, problem: Problem, *, sizes: Sequence[float] | np.ndarray, rng: np.random.Generator
) -> list[Problem]:
    """Return what candidates are judged on for a goal.

    Args:
        goal: see :class:`Method`.
        problem: all configurations that a search may see; for "sizes", those spread over sizes.
        sizes: of these configurations, shape (N,).
        rng: source of the random halves.

    Raises:
        InvalidParameterError: an unknown goal, or too few configurations.
    """
    _check_goal(goal)
    if goal == "sizes":
        return [problem.inside_sizes(sizes, BINS)]
    if goal == "rho":
        return [replace(problem, groups=(np.arange(len(problem.configs)),))]
    if goal == "few":
        return [replace(problem, configs=problem.configs[:FEW], accuracy=problem.accuracy[:FEW])]
    return problem.resampled(HALVES, rng=rng) if goal == "halves" else [problem]


def run_search(
    method: Method,
    structure: str,
    problems: Sequence[Problem],
    *,
    budget: EvolutionBudget,
    rng: np.random.Generator,
    images: int = 1_024,
    journal: Judgements | None = None,
) -> list[Generation]:
    """Search once; return the generations that improved the best formula, and the last one.

    Args:
        method: how.
        structure: of the genotypes.
        problems: of :func:`problems_for` the method's goal.
        budget: population and iterations, the latter times the method's times.
        rng: source of randomness; the same stream gives the same generations.
        images: calibration images of the statistics: what cost depends on where it is one of three goals.
        journal: where judgements are kept; a run that was stopped goes on from it.

    Raises:
        InvalidParameterError, DiskFullError, UnwritablePathError: see :func:`~emq_lib.evolution.search.evolve`.
    """
    judge, space = method.judge(problems, journal), method.space(structure)
    budget = replace(budget, iterations=method.times * budget.iterations)
    if method.goal == "three":
        evaluator = problems[0].evaluator
        cost = passes_of(evaluator.slots * len(evaluator.choices), images)
        return improvements(evolve_front(judge, space, budget=budget, rng=rng, cost=cost))
    known = tuple(KNOWN.values()) if method.known else ()
    how = {"diversity": method.diversity, "genes": method.genes, "islands": method.islands}
    return improvements(evolve(judge, space, budget=budget, rng=rng, known=known, **how))


def run_control(
    method: Method,
    structure: str,
    problems: Sequence[Problem],
    *,
    evaluations: int,
    rng: np.random.Generator,
    journal: Judgements | None = None,
) -> list[Generation]:
    """Search at random with as many fitness evaluations as a search made; return as :func:`run_search`."""
    judge, space = method.judge(problems, journal), method.space(structure)
    return improvements(random_search(judge, space, evaluations=evaluations, rng=rng))


def passes_of(options: int, images: int) -> Callable[[Genotype], float]:
    """Return the cost of what a formula reads: images that pass through the network, the same on every machine.

    A backward pass counts as two; the trace takes one for each of ten classes.

    Args:
        options: S B, widths of all slots.
        images: calibration images.

    >>> from emq_lib.evolution.genotypes import parse
    >>> cost = passes_of(18, 1_024)
    >>> [cost(parse(text)) for text in ("sequential(E: pow2)", "sequential(G: abs)", "sequential(K: negate)")]
    [0, 3072, 19456]
    """
    passes = {
        "errors": 0,
        "virtual_gradients": 3,
        "positive_gradients": 3,
        "activations": ACTIVATION_IMAGES,
        "channel_products": 3 * FEW_IMAGES,
        "output_error": 2 * images,
        "gradients": 3 * images,
        "trace": 21 * images,
        "one_slot": (1 + options) * images,
        "pair_losses": (1 + options + options * options // 2) * FEW_IMAGES,
    }
    return lambda genotype: sum(passes[key] for key in genotype.reads)
