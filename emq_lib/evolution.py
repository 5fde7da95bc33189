"""The evolutionary search for proxies: screening, fitness, the loop, its controls, and the log.

After EMQ (Dong et al. 2023): parents from the better half, crossover, mutation, diversity-prompting selection, early
rejection and an equivalence check. Explained in chapter 03.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from emq_lib import search_space
from emq_lib.core.errors import CorruptArtefactError, InvalidParameterError
from emq_lib.core.files import named_when_full, to_json
from emq_lib.core.profiles import EvolutionBudget
from emq_lib.core.sources import source_hash
from emq_lib.proxies import handmade, ranking
from emq_lib.proxies.ranking import MINIMUM, fitness_many
from emq_lib.proxies.scores import SEPARABLE, is_table, score
from emq_lib.search_space import Evaluator, Genotype, Space, canonical, cross, parse

PARENTS = 0.5  # share of the population that may become parents
CROSSOVER = MUTATION = GENES = 0.5  # of children that are crossed, of children and of their genes that are mutated
ATTEMPTS = 400  # draws after which a valid random genotype is given up
MIGRATION = 25  # rounds between exchanges of islands


@dataclass(frozen=True)
class Problem:
    """What candidates are judged on: configurations of one study and how accurate they are.

    Args:
        evaluator: computes scores.
        configs: bits, shape (N, S), N at least 30.
        accuracy: shape (N,).
        groups: rho is taken inside each of these groups of configurations and averaged; None: the paper's fitness, the
            mean of rho among the best 20, 50 and 100 % of all.

    Raises:
        InvalidParameterError: fewer than 30 configurations.
    """

    evaluator: Evaluator
    configs: np.ndarray
    accuracy: np.ndarray
    groups: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        """Check the number of configurations."""
        if len(self.configs) < MINIMUM:
            raise InvalidParameterError(f"fitness needs {MINIMUM} configurations or more, got {len(self.configs)}.")

    def inside_sizes(self, sizes: np.ndarray, bins: int) -> Problem:
        """Return the problem of ranking configurations of similar size: so many bins of equally many."""
        return replace(self, groups=tuple(np.array_split(np.argsort(sizes, kind="stable"), bins)))

    def resampled(self, times: int, *, rng: np.random.Generator) -> list[Problem]:
        """Return so many problems of half the configurations each, against fitting a formula to all of them."""
        halves = [rng.permutation(len(self.configs))[: len(self.configs) // 2] for _ in range(times)]
        return [replace(self, configs=self.configs[half], accuracy=self.accuracy[half]) for half in halves]

    def fitness(self, scores: np.ndarray) -> float:
        """Return the fitness of the scores (N,); NaN where they rank nothing."""
        if self.groups is None:
            return float(fitness_many(scores[None], self.accuracy)[0])
        inside = [fitness_many(scores[None, group], self.accuracy[group], (100,))[0] for group in self.groups]
        return float(np.mean(inside))


@dataclass(frozen=True)
class Individual:
    """A genotype with its fitness and the fingerprint of the order in which it ranks the configurations."""

    genotype: Genotype
    fitness: float
    fingerprint: str


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


class Journal:
    """Judgements of one run on disk, a line each: a run that starts again reads them instead of computing them.

    A search is the same for the same random numbers, so a run that was killed goes through its generations again
    without evaluating anything, and goes on where it was; what it had not written, at most the candidates of one
    generation, is lost.

    Args:
        path: the file, which may exist.
        run: what the judgements depend on.

    Raises:
        CorruptArtefactError: the file belongs to another run or another version of the code.
    """

    def __init__(self, path: pathlib.Path, run: Mapping[str, object]) -> None:
        code = source_hash(search_space, ranking, handmade, Problem, Judge)
        head = to_json(dict(run) | {"code": code})
        lines = path.read_text().split("\n") if path.exists() else []
        complete = lines[:-1]  # what follows the last line break was cut short
        if complete and complete[0] != head:
            raise CorruptArtefactError(
                f"{path} is of another run, study or version of the code; it says {complete[0]}. Delete it."
            )
        self._known = {line["genotype"]: line for line in map(json.loads, complete[1:])}
        with named_when_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(line + "\n" for line in complete or [head]))
        self._path = path

    def find(self, genotype: Genotype) -> tuple[bool, Individual | None]:
        """Return whether a genotype was judged, and how."""
        line = self._known.get(str(genotype))
        if line is None or line["fitness"] is None:
            return line is not None, None
        return True, Individual(parse(line["genotype"]), line["fitness"], line["fingerprint"])

    def append(self, genotype: Genotype, found: Individual | None) -> None:
        """Write a judgement."""
        fitness, fingerprint = (found.fitness, found.fingerprint) if found else (None, None)
        line = to_json({"genotype": str(genotype), "fitness": fitness, "fingerprint": fingerprint})
        with named_when_full(self._path), self._path.open("a") as file:
            file.write(line + "\n")


@dataclass
class Judge:
    """Screens candidates and evaluates their fitness.

    Args:
        problems: of one study or of several.
        across: how fitness on several problems is put together: "mean", "worst", or "stable", the mean less the
            standard deviation.
        penalty: fitness that each operation of a formula costs.
        separable: whether formulas must be sums over layers.
        rising: whether a layer must never score lower with more bits, as an optimizer that looks for the highest score
            needs it.
        screening: whether equivalent candidates are recognized; rejection of broken ones is always on.
        journal: where judgements are kept.
    """

    problems: Sequence[Problem]
    across: str = "mean"
    penalty: float = 0.0
    separable: bool = False
    rising: bool = False
    screening: bool = True
    journal: Journal | None = None
    evaluations: int = 0
    rejected: int = 0
    duplicates: int = 0
    _known: dict[Genotype, Individual | None] = field(default_factory=dict)

    def judge(self, genotype: Genotype) -> Individual | None:
        """Return the candidate with its fitness, or None if its scores are not finite or rank nothing."""
        key = canonical(genotype)
        if self.screening and key in self._known:
            self.duplicates += 1
            found = self._known[key]
            return found and replace(found, genotype=genotype)
        judged, found = self.journal.find(key) if self.journal else (False, None)
        if not judged:
            found = self._evaluate(key)
            if self.journal:
                self.journal.append(key, found)
        self._known[key] = found
        if found is None:
            self.rejected += 1
            return None
        self.evaluations += 1
        return replace(found, genotype=genotype)

    def judge_many(self, genotypes: Sequence[Genotype]) -> list[Individual | None]:
        """Return what :meth:`judge` does of each, evaluated together as far as the evaluators can."""
        for evaluator in dict.fromkeys(problem.evaluator for problem in self.problems):
            evaluator.prepare(genotypes)
        return list(map(self.judge, genotypes))

    def _evaluate(self, genotype: Genotype) -> Individual | None:
        order, found, tables = hashlib.blake2b(digest_size=8), [], {}
        for problem in self.problems:
            evaluator = problem.evaluator
            if evaluator not in tables:
                tables[evaluator] = evaluator.scores(genotype)
            table = tables[evaluator]
            separable = is_table(table, evaluator.choices)
            if not np.isfinite(table).all() or (separable and (table == table[:, :1]).all()):
                return None
            if self.separable and not (separable and genotype.aggregation in SEPARABLE):
                return None
            if self.rising and separable and (np.diff(table, axis=1) < 0).any():
                return None
            scores = score(table, problem.configs, evaluator.choices, aggregation=genotype.aggregation)
            order.update(np.argsort(scores, kind="stable").astype(np.int32).tobytes())
            found.append(problem.fitness(scores))
        fitness = {"mean": np.mean, "worst": np.min, "stable": lambda x: np.mean(x) - np.std(x)}[self.across](found)
        fitness = float(fitness - self.penalty * genotype.complexity)
        return Individual(genotype, fitness, order.hexdigest()) if np.isfinite(fitness) else None

    def newcomer(self, space: Space, rng: np.random.Generator, taken: Iterable[str] = ()) -> Individual:
        """Return the first drawn candidate that is valid and ranks unlike those taken.

        Raises:
            InvalidParameterError: none of 400 draws is; the statistics are probably constant.
        """
        for _ in range(ATTEMPTS):
            candidate = self.judge(space.random(rng))
            if candidate is not None and candidate.fingerprint not in taken:
                return candidate
        raise InvalidParameterError(f"none of {ATTEMPTS} random genotypes is valid; look at the statistics.")


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
