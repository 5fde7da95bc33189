"""The evolutionary search for proxies: the loop, its control, and its variant for several goals.

After EMQ (Dong et al. 2023): parents from the better half, crossover, mutation, diversity-prompting selection, early
rejection and an equivalence check. Explained in chapter 03.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from emq_lib.core.checks import random_source, real_number, whole_number
from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.profiles import EvolutionBudget
from emq_lib.evolution.fitness import ATTEMPTS, Individual, Judge
from emq_lib.evolution.genotypes import Genotype
from emq_lib.evolution.spaces import Space, cross

PARENTS = 0.5  # share of the population that may become parents
CROSSOVER = MUTATION = GENES = 0.5  # of children that are crossed, of children and of their genes that are mutated
MIGRATION = 25  # rounds between exchanges of islands


@dataclass(frozen=True)
class Generation:
    """State after one iteration.

    Attributes:
        iteration: counted from 0, the initial population.
        evaluations: fitness evaluations so far.
        rejected: candidates turned away before fitness: not finite, all equal, or not separable or rising where that is
            asked.
        duplicates: candidates recognized as equivalent to an earlier one.
        best: text form of the fittest genotype so far.
        fitness: its fitness on the search half.
        mean: mean fitness of the population.
        front: text forms that no member beats in fitness, cost and complexity at once; of a search that has these three
            goals.
    """

    iteration: int
    evaluations: int
    rejected: int
    duplicates: int
    best: str
    fitness: float
    mean: float
    front: tuple[str, ...] = ()


def evolve(
    judge: Judge,
    space: Space,
    *,
    budget: EvolutionBudget,
    rng: np.random.Generator,
    diversity: bool = True,
    genes: float = GENES,
    known: Sequence[Genotype] = (),
    islands: int = 1,
) -> Iterator[Generation]:
    """Evolve proxies, one generation at a time.

    Each iteration draws two parents from the better half of the population, crosses them with probability one half
    (else copies the first), mutates the child with probability one half, and pits it against a random newcomer; the
    better of the two enters (diversity-prompting selection) and the worst of the population leaves. A candidate that
    ranks exactly like a member does not enter.

    Args:
        judge: fitness and screening.
        space: what genotypes are drawn from.
        budget: population and iterations.
        rng: source of randomness; the same stream gives the same generations.
        diversity: False leaves the newcomer out.
        genes: share of its genes that a mutation draws afresh.
        known: genotypes that the population starts from, as far as they fit into the space; the rest is drawn.
        islands: populations that share the budget; each evolves alone in its turn, and after every 25 turns of all, the
            best of each takes the place of the worst of the next.

    Yields:
        the state after the initial populations and after every iteration.

    Raises:
        InvalidParameterError: islands of fewer than four, numbers that are none or out of range, no source of
            randomness; or a space without enough valid formulas.
        GenotypeSyntaxError: what is known is no genotype.
        DiskFullError, UnwritablePathError: the judge's journal cannot be written.
    """
    _check(judge, space, rng)
    _check_budget(budget)
    real_number(genes, "the share of genes that a mutation draws", 0, 1, ends=True)
    size = budget.population // whole_number(islands, "the number of islands", 1)
    if size < 4:
        raise InvalidParameterError(f"{islands} islands of {budget.population} have {size} members; give each 4.")
    populations: list[list[Individual]] = []
    fitting = [genotype for genotype in map(space.fit, known) if genotype is not None]
    for _ in range(islands):
        population = _unlike(filter(None, judge.judge_many(fitting)))[:size]
        while len(population) < size:
            population.append(judge.newcomer(space, rng, {member.fingerprint for member in population}))
        populations.append(_sorted(population))
    yield _state(0, judge, populations)
    parents = max(2, int(PARENTS * size))
    for iteration in range(1, budget.iterations + 1):
        turn, island = divmod(iteration - 1, islands)
        if islands > 1 and island == 0 and turn and turn % MIGRATION == 0:
            best = [population[0] for population in populations]
            for population, guest in zip(populations, best[-1:] + best[:-1], strict=True):
                _enter(population, [guest])
        population = populations[island]
        one, two = (population[index].genotype for index in rng.choice(parents, size=2, replace=False))
        child = cross(one, two, rng=rng) if rng.random() < CROSSOVER else one
        if rng.random() < MUTATION:
            child = space.mutate(child, rng=rng, probability=genes)
        _enter(population, judge.judge_many([child, space.random(rng)] if diversity else [child]))
        yield _state(iteration, judge, populations)


def _check(judge: Judge, space: Space, rng: np.random.Generator) -> None:
    if not (isinstance(judge, Judge) and isinstance(space, Space)):
        raise InvalidParameterError(f"a search needs a Judge and a Space, got {judge!r:.80} and {space!r:.80}.")
    random_source(rng)


def _check_budget(budget: EvolutionBudget) -> None:
    if not isinstance(budget, EvolutionBudget):
        raise InvalidParameterError(f"a search needs an EvolutionBudget, got {budget!r:.80}.")
    whole_number(budget.population, "the population", 4)
    whole_number(budget.iterations, "the number of iterations", 0)


def _sorted(population: Iterable[Individual]) -> list[Individual]:
    return sorted(population, key=lambda member: -member.fitness)


def _unlike(members: Iterable[Individual]) -> list[Individual]:
    """Return the members without those that rank like an earlier one."""
    return list({member.fingerprint: member for member in reversed(list(members))}.values())[::-1]


def _enter(population: list[Individual], contestants: Sequence[Individual | None]) -> None:
    """Let the best contestant that ranks unlike every member take the place of the worst."""
    taken = {member.fingerprint for member in population}
    fresh = [one for one in contestants if one is not None and one.fingerprint not in taken]
    if fresh:
        population.append(max(fresh, key=lambda member: member.fitness))
        population[:] = _sorted(population)[:-1]


def random_search(judge: Judge, space: Space, *, evaluations: int, rng: np.random.Generator) -> Iterator[Generation]:
    """Draw random genotypes until as many were evaluated as an evolution did: the control for it.

    It ends early when 400 draws in a row bring nothing new: it has then seen the space.

    Args:
        judge: fitness and screening.
        space: what genotypes are drawn from.
        evaluations: how many.
        rng: source of randomness.

    Yields:
        the state after every valid genotype; the population is the best one alone.

    Raises:
        InvalidParameterError: no number of evaluations, no source of randomness, or a space without valid formulas.
        DiskFullError, UnwritablePathError: the judge's journal cannot be written.
    """
    _check(judge, space, rng)
    whole_number(evaluations, "the number of evaluations", 0)
    best: list[Individual] = []
    known = 0  # draws in a row that were known
    for iteration in itertools.count():
        before = judge.evaluations
        if before >= evaluations or known == ATTEMPTS:
            return
        best = _sorted([judge.newcomer(space, rng), *best])[:1]
        known = known + 1 if judge.evaluations == before else 0
        yield _state(iteration, judge, [best])


def evolve_front(
    judge: Judge,
    space: Space,
    *,
    budget: EvolutionBudget,
    rng: np.random.Generator,
    cost: Callable[[Genotype], float],
) -> Iterator[Generation]:
    """Evolve proxies for three goals at once: fitness, the cost of what they read, few operations (NSGA-II).

    Deb et al. 2002: as many children as parents; both are sorted into fronts that nobody inside beats in all goals, and
    the next population takes front after front, of the last the members that stand farthest apart. A budget of
    iterations counts children.

    Args:
        judge: fitness and screening.
        space: what genotypes are drawn from.
        budget: population and iterations.
        rng: source of randomness.
        cost: of the statistics that a genotype reads.

    Yields:
        the state after the initial population and after every generation of children.

    Raises:
        InvalidParameterError: numbers that are none or out of range, no source of randomness, a cost that is not
            finite; or a space without enough valid formulas.
        DiskFullError, UnwritablePathError: the judge's journal cannot be written.
    """
    _check(judge, space, rng)
    _check_budget(budget)

    def goals(member: Individual) -> tuple[float, float, float]:
        return -member.fitness, cost(member.genotype), member.genotype.complexity

    def ranked(members: list[Individual]) -> tuple[list[Individual], int]:
        """Sort by front and crowding; return how many are in the first front."""
        values = np.array([goals(member) for member in members])
        if not np.isfinite(values).all():
            raise InvalidParameterError("the cost of a formula is NaN or infinite.")
        fronts = non_dominated_fronts(values)
        order = [index for front in fronts for index in front[np.argsort(-_crowding(values[front]), kind="stable")]]
        return [members[index] for index in order], len(fronts[0])

    population: list[Individual] = []
    while len(population) < budget.population:
        population.append(judge.newcomer(space, rng, {member.fingerprint for member in population}))
    population, first = ranked(population)
    yield _state(0, judge, [_sorted(population)], population[:first])
    for iteration in range(1, budget.iterations // budget.population + 1):
        children = []
        for _ in range(budget.population):
            one, two = (population[rng.integers(len(population), size=2).min()].genotype for _ in range(2))
            child = cross(one, two, rng=rng) if rng.random() < CROSSOVER else one
            children.append(space.mutate(child, rng=rng) if rng.random() < MUTATION else child)
        members, first = ranked(_unlike([*population, *filter(None, judge.judge_many(children))]))
        population = members[: budget.population]
        yield _state(iteration, judge, [_sorted(members)], population[:first])


def non_dominated_fronts(values: np.ndarray) -> list[np.ndarray]:
    """Return the rows (P, goals), to be made small, by fronts: nobody in the first is beaten in all goals.

    >>> [front.tolist() for front in non_dominated_fronts(np.array([[0, 1], [1, 0], [1, 1], [2, 2]]))]
    [[0, 1], [2], [3]]
    """
    no_worse = (values[:, None] <= values[None]).all(axis=2)
    beats = no_worse & (values[:, None] < values[None]).any(axis=2)
    left, fronts = np.ones(len(values), dtype=bool), []
    while left.any():
        front = left & ~beats[left].any(axis=0)
        fronts.append(np.flatnonzero(front))
        left &= ~front
    return fronts


def _crowding(values: np.ndarray) -> np.ndarray:
    """Return how far apart the neighbours of each row stand, summed over goals; infinite at the ends."""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = np.ptp(column) or 1.0
        distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
        distance[order[[0, -1]]] = np.inf
    return distance


def _state(
    iteration: int, judge: Judge, populations: Sequence[Sequence[Individual]], front: Sequence[Individual] = ()
) -> Generation:
    members = [member for population in populations for member in population]
    best = max(members, key=lambda member: member.fitness)
    return Generation(
        iteration=iteration,
        evaluations=judge.evaluations,
        rejected=judge.rejected,
        duplicates=judge.duplicates,
        best=str(best.genotype),
        fitness=best.fitness,
        mean=float(np.mean([member.fitness for member in members])),
        front=tuple(str(member.genotype) for member in front),
    )


def improvements(generations: Iterator[Generation]) -> list[Generation]:
    """Return the generations whose best is better than before, and the last one; none of none."""
    kept: list[Generation] = []
    last = None
    for last in generations:
        if not kept or last.fitness > kept[-1].fitness:
            kept.append(last)
    return kept if last is None or kept[-1] == last else [*kept, last]
