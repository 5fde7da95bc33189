"""The evolutionary search for proxies, its random control, and the log.

After EMQ (Dong et al. 2023): tournament among the better half, crossover, mutation, diversity-prompting selection,
early rejection and an equivalence check. Explained in chapter 03.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from emq_lib.artefacts import atomic_path, checked_path, record, study_folder, to_json
from emq_lib.bench import Bench
from emq_lib.costs import choice_indices
from emq_lib.errors import CorruptArtefactError, InvalidParameterError
from emq_lib.layer_statistics import load_statistics
from emq_lib.profiles import EvolutionBudget, Profile
from emq_lib.ranking import MINIMUM, fitness_many
from emq_lib.search_space import STRUCTURES, Evaluator, Genotype, canonical, cross, mutate, random_genotype

PARENTS = 0.5  # share of the population that may become parents
CROSSOVER = MUTATION = 0.5
ATTEMPTS = 200  # draws after which a valid random genotype is given up


@dataclass(frozen=True)
class Individual:
    """A genotype with its fitness and the fingerprint of the order in which it ranks the configurations."""

    genotype: Genotype
    fitness: float
    fingerprint: bytes


@dataclass(frozen=True)
class Generation:
    """State after one iteration.

    Attributes:
        iteration: counted from 0, the initial population.
        evaluations: fitness evaluations so far.
        rejected: candidates turned away before fitness, because their scores were not finite or all equal.
        duplicates: candidates recognized as equivalent to an earlier one.
        best: text form of the fittest genotype so far.
        fitness: its fitness on the search half.
        mean: mean fitness of the population.
    """

    iteration: int
    evaluations: int
    rejected: int
    duplicates: int
    best: str
    fitness: float
    mean: float


@dataclass
class Judge:
    """Screens candidates and evaluates their fitness: mean rho at 20, 50 and 100 % on the search configurations.

    Args:
        evaluator: computes score tables.
        configs: bits of the search half, shape (N, S), N at least 30.
        accuracy: their accuracy, shape (N,).
        choices: the B allowed widths.
        screening: whether equivalent candidates are recognized; rejection of broken ones is always on.

    Raises:
        InvalidParameterError: fewer than 30 configurations.
    """

    evaluator: Evaluator
    configs: np.ndarray
    accuracy: np.ndarray
    choices: tuple[int, ...]
    screening: bool = True
    evaluations: int = 0
    rejected: int = 0
    duplicates: int = 0
    _known: dict[Genotype, Individual | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Turn bits into positions once."""
        if len(self.configs) < MINIMUM:
            raise InvalidParameterError(f"fitness needs {MINIMUM} configurations or more, got {len(self.configs)}.")
        self._indices = choice_indices(self.configs, self.choices, self.configs.shape[1])
        self._slots = np.arange(self.configs.shape[1])

    def judge(self, genotype: Genotype) -> Individual | None:
        """Return the candidate with its fitness, or None if its scores are not finite or rank nothing."""
        key = canonical(genotype)
        if self.screening and key in self._known:
            self.duplicates += 1
            return self._known[key]
        table = self.evaluator.table(genotype)
        individual = None
        if np.isfinite(table).all() and not (table == table[:, :1]).all():
            scores = table[self._slots, self._indices].sum(axis=1)
            self.evaluations += 1
            fitness = float(fitness_many(scores[None], self.accuracy)[0])
            if np.isfinite(fitness):
                order = np.argsort(scores, kind="stable").astype(np.int32)
                individual = Individual(genotype, fitness, order.tobytes())
        if individual is None:
            self.rejected += 1
        self._known[key] = individual
        return individual

    def newcomer(self, draw: Callable[[], Genotype], taken: set[bytes]) -> Individual:
        """Return the first drawn candidate that is valid and ranks unlike those taken.

        Raises:
            InvalidParameterError: none of 200 draws is; the statistics are probably constant.
        """
        for _ in range(ATTEMPTS):
            candidate = self.judge(draw())
            if candidate is not None and candidate.fingerprint not in taken:
                return candidate
        raise InvalidParameterError(f"none of {ATTEMPTS} random genotypes is valid; look at the statistics.")


def evolve(
    judge: Judge, *, structure: str, budget: EvolutionBudget, rng: np.random.Generator, diversity: bool = True
) -> Iterator[Generation]:
    """Evolve proxies, one generation at a time.

    Each iteration draws two parents from the better half of the population, crosses them with probability one half
    (else copies the first), mutates the child with probability one half, and pits it against a random newcomer; the
    better of the two enters (diversity-prompting selection) and the worst of the population leaves. A candidate that
    ranks exactly like a member does not enter.

    Args:
        judge: fitness and screening.
        structure: "linear" or "branched".
        budget: population and iterations.
        rng: source of randomness; the same stream gives the same generations.
        diversity: False leaves the newcomer out.

    Yields:
        the state after the initial population and after every iteration.
    """

    def draw() -> Genotype:
        return random_genotype(structure, rng=rng)

    population: list[Individual] = []
    while len(population) < budget.population:
        population.append(judge.newcomer(draw, {member.fingerprint for member in population}))
    population.sort(key=lambda member: -member.fitness)
    yield _state(0, judge, population)
    parents = max(2, int(PARENTS * budget.population))
    for iteration in range(1, budget.iterations + 1):
        one, two = (population[index].genotype for index in rng.choice(parents, size=2, replace=False))
        child = cross(one, two, rng=rng) if rng.random() < CROSSOVER else one
        if rng.random() < MUTATION:
            child = mutate(child, rng=rng)
        contestants = [judge.judge(child), judge.judge(draw()) if diversity else None]
        taken = {member.fingerprint for member in population}
        fresh = [c for c in contestants if c is not None and c.fingerprint not in taken]
        if fresh:
            population.append(max(fresh, key=lambda member: member.fitness))
            population.sort(key=lambda member: -member.fitness)
            population.pop()
        yield _state(iteration, judge, population)


def random_search(judge: Judge, *, structure: str, evaluations: int, rng: np.random.Generator) -> Iterator[Generation]:
    """Draw random genotypes until as many were evaluated as an evolution did: the control for it.

    Yields:
        the state after every evaluated genotype; the population is the best one alone.
    """
    best: list[Individual] = []
    iteration = 0
    while judge.evaluations < evaluations:
        candidate = judge.judge(random_genotype(structure, rng=rng))
        if candidate is None:
            continue
        best = [max([*best, candidate], key=lambda member: member.fitness)]
        yield _state(iteration, judge, best)
        iteration += 1


def _state(iteration: int, judge: Judge, population: list[Individual]) -> Generation:
    best = population[0]
    mean = float(np.mean([member.fitness for member in population]))
    return Generation(
        iteration, judge.evaluations, judge.rejected, judge.duplicates, str(best.genotype), best.fitness, mean
    )


def improvements(generations: Iterator[Generation]) -> list[Generation]:
    """Return the generations whose best is better than before, and the last one."""
    kept: list[Generation] = []
    last = None
    for last in generations:
        if not kept or last.fitness > kept[-1].fitness:
            kept.append(last)
    return kept if last is None or kept[-1] == last else [*kept, last]


def build_evolution(profile: Profile) -> None:
    """Run the search for every structure and seed, with its random control; write ``evolution.jsonl``.

    One JSON line per generation that improved the best formula, and one for the last. Fitness reads the search half of
    the configurations and half A of the test images. Same profile, same bytes.
    """
    started = time.perf_counter()
    search, _ = Bench.load(profile).split()
    evaluator = Evaluator(load_statistics(profile))

    def judge() -> Judge:
        return Judge(evaluator, search.configs, search.half_a, profile.choices)

    lines = []
    for structure in STRUCTURES:
        for seed in range(profile.evolution.seeds):
            name = f"{structure} {seed}"
            evolved = improvements(
                evolve(judge(), structure=structure, budget=profile.evolution, rng=profile.rng(f"evolution {name}"))
            )
            control = random_search(
                judge(),
                structure=structure,
                evaluations=evolved[-1].evaluations,
                rng=profile.rng(f"random search {name}"),
            )
            for method, generations in (("evolution", evolved), ("random search", improvements(control))):
                facts = {"method": method, "structure": structure, "seed": seed}
                lines += [to_json(facts | asdict(generation)) for generation in generations]
    with atomic_path(study_folder(profile) / "evolution.jsonl") as path:
        path.write_text("\n".join(lines) + "\n")
    command = f"emq_lib.evolution.build_evolution on {profile.name}"
    record(profile, "evolution.jsonl", command=command, seconds=time.perf_counter() - started, rows=len(lines))


def load_evolution(profile: Profile) -> list[dict]:
    """Return the lines of a study's evolution log.

    Raises:
        CorruptArtefactError: a line is not JSON.
    """
    path = checked_path(profile, "evolution.jsonl")
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise CorruptArtefactError(f"{path} holds a line that is not JSON ({error}). Restore or rebuild it.") from error


def load_winner(profile: Profile) -> dict:
    """Return the log line of the fittest evolved proxy over all seeds and structures: a choice by the search half."""
    return max(
        (line for line in load_evolution(profile) if line["method"] == "evolution"), key=lambda line: line["fitness"]
    )
