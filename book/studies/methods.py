"""The searches that a study runs: which methods, from how many seeds, and what each is judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.fitness import Judgements, Problem
from emq_lib.evolution.methods import Method, problems_for, run_control, run_search
from emq_lib.evolution.primitives import ERROR, FACTOR, STRUCTURES
from emq_lib.evolution.search import Generation, evolve, random_search
from emq_lib.evolution.spaces import Space

if TYPE_CHECKING:
    from emq_lib.bench.table import Bench
    from emq_lib.core.profiles import EvolutionBudget

ISLANDS, GENTLE, LONG = 5, 0.15, 3
EVOLUTION, CONTROL, REFINED = "evolution", "random search", "refined"
FOR_RHO, WITH_PAIRS = "refined, for rho", "refined, pairs of layers"
INSIDE, RISING, RISING_INSIDE = ("refined, inside sizes", "refined, for rho, rising", "refined, inside sizes, rising")
SEARCHED = "search"  # variant of what a single search found
ALLOCATED = (REFINED, FOR_RHO, INSIDE, RISING, RISING_INSIDE)  # they differ in fitness alone; all allocate bits
EVOLVED = {  # proxy -> its method
    "evolved": REFINED,
    "evolved for rho": FOR_RHO,
    "evolved for allocation": RISING_INSIDE,
    "evolved with pairs": WITH_PAIRS,
}
METHODS: dict[str, Method] = {
    EVOLUTION: Method(),
    "bits as a factor": Method(inputs=FACTOR),
    "errors": Method(inputs=ERROR),
    "without diversity": Method(diversity=False),
    "without screening": Method(screening=False),
    "without prioritization": Method(prioritized=False),
    "50 configurations": Method(goal="few"),
    "random halves": Method(goal="halves"),
    "short formulas": Method(goal="short"),
    "inside sizes": Method(goal="sizes"),
    "three goals": Method(goal="three"),
    "islands": Method(islands=ISLANDS),
    "gentle mutation": Method(genes=GENTLE),
    "known proxies": Method(known=True),
    REFINED: Method(genes=GENTLE, known=True, times=LONG),
    FOR_RHO: Method(goal="rho", genes=GENTLE, known=True, times=LONG),
    WITH_PAIRS: Method(separable=False, genes=GENTLE, known=True, times=LONG),
    INSIDE: Method(goal="sizes", genes=GENTLE, known=True, times=LONG),
    RISING: Method(goal="rho", rising=True, genes=GENTLE, known=True, times=LONG),
    RISING_INSIDE: Method(goal="sizes", rising=True, genes=GENTLE, known=True, times=LONG),
}
TRANSFERRED: dict[str, Method] = {  # proxies of a study that evolve on the others together
    "transferred for rho": Method(goal="rho", genes=GENTLE, known=True),
    "transferred with pairs": Method(separable=False, genes=GENTLE, known=True),
}
SMALL = Space(
    "branched",
    ("T", "E", "O", "K", "L", "P"),
    unaries=("no_op", "log", "sqrt", "pow2", "sum", "negate"),
    binaries=("sum", "product", "ratio"),
    chains=(1, 1, 1),
)
ALL = "every formula"
Streams = Callable[[str], np.random.Generator]


@dataclass(frozen=True)
class Run:
    """One search: a method in one structure from one seed."""

    method: str
    structure: str
    seed: int

    @property
    def how(self) -> Method:
        """The method of that name."""
        return (METHODS | TRANSFERRED)[self.method]

    @property
    def name(self) -> str:
        """Name of its random stream and of its journal."""
        return f"{self.method}, {self.structure}, {self.seed}"


def searches(seeds: int) -> list[Run]:
    """Return the searches of a study: every method in the branched structure, and evolution in all three."""
    return [
        Run(method, structure, seed)
        for method in METHODS
        for structure in (STRUCTURES if method == EVOLUTION else ("branched",))
        for seed in range(seeds)
    ]


def transfers(seeds: int) -> list[Run]:
    """Return the searches on other studies."""
    return [Run(method, "branched", seed) for method in TRANSFERRED for seed in range(seeds)]


def pose(goal: str, evaluator: Evaluator, bench: Bench, streams: Streams) -> list[Problem]:
    """Return what candidates are judged on: the search half of the configurations, half A of the test images.

    Args:
        goal: see :class:`~emq_lib.evolution.methods.Method`.
        evaluator: of the study's statistics.
        bench: its configurations.
        streams: name -> source of randomness.
    """
    seen, _ = bench.split("stratified" if goal == "sizes" else "random")
    problem = Problem(evaluator, seen.configs, seen.half_a)
    sizes, rng = seen.table["size_bytes"].to_numpy(), streams("halves of the search configurations")
    return problems_for(goal, problem, sizes=sizes, rng=rng)


def search(
    run: Run,
    problems: Sequence[Problem],
    *,
    budget: EvolutionBudget,
    streams: Streams,
    images: int,
    journal: Judgements | None = None,
) -> list[tuple[str, Generation]]:
    """Return the generations that improved the best formula, and the last one, each with the name of what made it.

    A run of plain evolution brings its control: random search with as many fitness evaluations.

    Args:
        run: which search.
        problems: of its goal; of several studies, one after the other.
        budget: what an evolution may spend.
        streams: name -> source of randomness.
        images: calibration images of the statistics.
        journal: where judgements are kept.
    """
    method, structure, rng = run.how, run.structure, streams(run.name)
    kept = run_search(method, structure, problems, budget=budget, rng=rng, images=images, journal=journal)
    found = [(run.method, generation) for generation in kept]
    if run.method == EVOLUTION:
        rng = streams(f"{CONTROL}, {run.name}")
        drawn = run_control(method, structure, problems, evaluations=kept[-1].evaluations, rng=rng, journal=journal)
        found += [(CONTROL, generation) for generation in drawn]
    return found


def enumerate_small(problems: Sequence[Problem], budget: EvolutionBudget, streams: Streams) -> list[dict]:
    """Try every formula of :data:`SMALL`, then let evolution and random search look for the best one.

    Returns:
        a line for the best formula of all, and one for the end of each search: method, seed, genotypes of the space,
        evaluations, best formula and its fitness.
    """
    method = METHODS[EVOLUTION]
    judge = method.judge(problems)
    valid = [member for member in map(judge.judge, SMALL) if member is not None]
    best = max(valid, key=lambda member: member.fitness)
    ends = [(ALL, None, judge.evaluations, str(best.genotype), best.fitness)]
    for seed in range(budget.seeds):
        rng = streams(f"{EVOLUTION}, small space, {seed}")
        *_, evolved = evolve(method.judge(problems), SMALL, budget=budget, rng=rng)
        rng = streams(f"{CONTROL}, small space, {seed}")
        *_, drawn = random_search(method.judge(problems), SMALL, evaluations=evolved.evaluations, rng=rng)
        ends += [
            (name, seed, last.evaluations, last.best, last.fitness)
            for name, last in ((EVOLUTION, evolved), (CONTROL, drawn))
        ]
    return [
        dict(zip(("method", "seed", "evaluations", "best", "fitness"), end, strict=True)) | {"genotypes": SMALL.size}
        for end in ends
    ]
