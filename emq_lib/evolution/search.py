"""The evolutionary search for proxies: screening, fitness, the loop, its controls, and the log.

After EMQ (Dong et al. 2023): parents from the better half, crossover, mutation, diversity-prompting selection, early
rejection and an equivalence check. Explained in chapter 03.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.profiles import EvolutionBudget
from emq_lib.evolution.fitness import Individual, Judge
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
        InvalidParameterError: islands of fewer than four.
    """
    size = budget.population // islands
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

    Yields:
        the state after every evaluated genotype; the population is the best one alone.
    """
    best: list[Individual] = []
    for iteration in itertools.count():
        if judge.evaluations >= evaluations:
            return
        best = _sorted([judge.newcomer(space, rng), *best])[:1]
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
        cost: seconds of the statistics that a genotype reads.

    Yields:
        the state after the initial population and after every generation of children.
    """

    def goals(member: Individual) -> tuple[float, float, float]:
        return -member.fitness, cost(member.genotype), member.genotype.complexity

    def ranked(members: list[Individual]) -> tuple[list[Individual], int]:
        """Sort by front and crowding; return how many are in the first front."""
        values = np.array([goals(member) for member in members])
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
    """Return the generations whose best is better than before, and the last one."""
    kept: list[Generation] = []
    last = None
    for last in generations:
        if not kept or last.fitness > kept[-1].fitness:
            kept.append(last)
    return kept if last is None or kept[-1] == last else [*kept, last]
