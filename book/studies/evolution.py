"""The searches of chapter 03: evolution, its controls and its ablations, run from many seeds; their log and results."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from book.studies.bench import load_bench
from book.studies.files import BENCH, ENUMERATION, EVOLUTION_LOG, MODEL, SEARCHES, STATISTICS, TRANSFER
from book.studies.proxies import load_statistics
from book.studies.study import checked_path, code_version, new_file, sole_writer, study_folder
from book.studies.workers import share
from emq_lib.bench.table import Bench
from emq_lib.core.errors import CorruptArtefactError, InvalidParameterError, MissingArtefactError
from emq_lib.core.files import read_table, sha256, to_json
from emq_lib.core.journal import Journal
from emq_lib.core.profiles import Profile
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.fitness import Judge, Judgements, Problem
from emq_lib.evolution.genotypes import KNOWN, Genotype, parse
from emq_lib.evolution.primitives import ERROR, FACTOR, INPUTS, STRUCTURES
from emq_lib.evolution.search import GENES, Generation, evolve, evolve_front, improvements, random_search
from emq_lib.evolution.spaces import Space
from emq_lib.proxies import ranking
from emq_lib.proxies.scores import AGGREGATIONS, is_table, score

BINS, HALVES, PENALTY, FEW, ISLANDS, GENTLE, LONG = 5, 8, 0.002, 50, 5, 0.15, 3
EVOLUTION, CONTROL, REFINED = "evolution", "random search", "refined"
FOR_RHO, WITH_PAIRS = "refined, for rho", "refined, pairs of layers"
INSIDE, RISING, RISING_INSIDE = ("refined, inside sizes", "refined, for rho, rising", "refined, inside sizes, rising")
ALLOCATED = (REFINED, FOR_RHO, INSIDE, RISING, RISING_INSIDE)  # they differ in fitness alone; all allocate bits
SEARCHED = "search"  # variant of what a single search found
EVOLVED = {  # proxy -> its method
    "evolved": REFINED,
    "evolved for rho": FOR_RHO,
    "evolved for allocation": RISING_INSIDE,
    "evolved with pairs": WITH_PAIRS,
}


@dataclass(frozen=True)
class Method:
    """One way to search.

    Attributes:
        inputs: what formulas may read.
        goal: what fitness is: "ranks", the paper's; "rho", that of all configurations alone; "few", the paper's on the
            first 50 configurations; "halves", the mean less the deviation over random halves; "short", less .002 for
            each operation; "sizes", rho inside five bins of size; "three", the paper's, beside cost and complexity.
        separable: whether formulas must be sums over layers.
        rising: whether a layer must never score lower with more bits.
        diversity: whether a newcomer contests every child.
        screening: whether equivalent candidates are recognized.
        prioritized: whether operations are drawn by their weights.
        genes: share of its genes that a mutation draws afresh.
        known: whether the population starts from hand-made proxies.
        islands: populations that share the budget.
        times: how many times the budget's iterations it runs.
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


def runs(profile: Profile) -> list[Run]:
    """Return the searches of a study: every method in the branched structure, and evolution in all three."""
    return [
        Run(method, structure, seed)
        for method in METHODS
        for structure in (STRUCTURES if method == EVOLUTION else ("branched",))
        for seed in range(profile.evolution.seeds)
    ]


@functools.lru_cache(maxsize=8)
def _loaded(profile: Profile, device: str, _root: str | None) -> tuple[Evaluator, Bench, Bench]:
    """Return a study's evaluator, and the search halves of its random and of its stratified configurations."""
    bench = load_bench(profile)
    return (Evaluator(load_statistics(profile), device=device), bench.split()[0], bench.split("stratified")[0])


def load_problems(profile: Profile, goal: str = "ranks", *, device: str = "cpu") -> list[Problem]:
    """Return what candidates are judged on: the search half of the configurations, half A of the test images.

    Args:
        profile: the study.
        goal: see :class:`Method`.
        device: where formulas are evaluated.
    """
    evaluator, search, spread = _loaded(profile, device, os.environ.get("EMQ_STUDY_ROOT"))
    if goal == "sizes":
        problem = Problem(evaluator, spread.configs, spread.half_a)
        return [problem.inside_sizes(spread.table["size_bytes"].to_numpy(), BINS)]
    problem = Problem(evaluator, search.configs, search.half_a)
    if goal == "rho":
        return [replace(problem, groups=(np.arange(len(problem.configs)),))]
    if goal == "few":
        return [replace(problem, configs=problem.configs[:FEW], accuracy=problem.accuracy[:FEW])]
    if goal == "halves":
        return problem.resampled(HALVES, rng=profile.rng("halves of the search configurations"))
    return [problem]


def make_judge(problems: Sequence[Problem], method: Method, journal: Judgements | None = None) -> Judge:
    """Return the judge of a method."""
    across = "stable" if method.goal == "halves" else "mean"
    penalty = PENALTY if method.goal == "short" else 0.0
    return Judge(problems, across, penalty, method.separable, method.rising, method.screening, journal)


def make_space(method: Method, structure: str) -> Space:
    """Return what a method draws from."""
    aggregations = ("sum",) if method.separable else tuple(AGGREGATIONS)
    return Space(structure, method.inputs, aggregations, prioritized=method.prioritized)


def search(
    profile: Profile, problems: Sequence[Problem], run: Run, journal: Judgements | None = None
) -> list[tuple[str, Generation]]:
    """Return the generations that improved the best formula, and the last one, each with the name of what made it.

    A run of plain evolution brings its control: random search with as many fitness evaluations.
    """
    method = run.how
    space, rng = make_space(method, run.structure), profile.rng(run.name)
    judge = make_judge(problems, method, journal)
    budget = replace(profile.evolution, iterations=method.times * profile.evolution.iterations)
    if method.goal == "three":
        seconds = load_statistics(profile).seconds

        def cost(genotype: Genotype) -> float:
            return sum(seconds[key] for key in genotype.reads)

        generations: Iterator[Generation] = evolve_front(judge, space, budget=budget, rng=rng, cost=cost)
    else:
        generations = evolve(
            judge,
            space,
            budget=budget,
            rng=rng,
            diversity=method.diversity,
            genes=method.genes,
            known=tuple(KNOWN.values()) if method.known else (),
            islands=method.islands,
        )
    kept = improvements(generations)
    found = [(run.method, generation) for generation in kept]
    if run.method == EVOLUTION:
        control = random_search(
            make_judge(problems, method, journal),
            space,
            evaluations=kept[-1].evaluations,
            rng=profile.rng(f"{CONTROL}, {run.name}"),
        )
        found += [(CONTROL, generation) for generation in improvements(control)]
    return found


def _lines(profile: Profile, others: tuple[Profile, ...], filename: str, device: str, run: Run) -> list[str]:
    """Search and return the log's lines; a run that was stopped goes on from its journal in the folder."""
    studies = others or (profile,)
    problems = [problem for study in studies for problem in load_problems(study, run.how.goal, device=device)]
    depends = {"run": run.name, "budget": asdict(profile.evolution)}
    depends |= read_hashes(studies) | {"code": code_version(filename)}
    path = study_folder(profile) / _resume(filename) / f"{run.name}.jsonl"
    found = search(profile, problems, run, Judgements(Journal(path, depends)))
    facts = {"structure": run.structure, "seed": run.seed}
    return [to_json({"method": method} | facts | asdict(generation)) for method, generation in found]


def _resume(filename: str) -> str:
    """Return the folder of the journals of searches that are under way."""
    return f".{filename}.resume"


def read_hashes(studies: Sequence[Profile]) -> dict[str, str]:
    """Return "study/file" -> SHA-256 of the files of studies that searches read."""
    return {
        f"{study.name}/{file}": sha256(checked_path(study, file))
        for study in studies
        for file in (MODEL, BENCH, STATISTICS)
    }


def build_evolution(profile: Profile, *, workers: int | None = None, device: str = "cpu") -> None:
    """Run every search; write ``evolution.jsonl``, and ``searches.csv`` by :func:`build_searches`.

    One JSON line per generation that improved the best formula of its run, and one for the last. Fitness reads the
    search half of the configurations and half A of the test images. Same profile, same bytes, whatever the number of
    workers; a build that was stopped goes on where it was.

    Args:
        profile: the study.
        workers: processes that share the runs; None: one per processor.
        device: where formulas are evaluated; another one may round differently, so bytes are the same on one only.
    """
    _build(profile, runs(profile), (), EVOLUTION_LOG, workers, device)
    build_searches(profile)


def build_transfer(
    profile: Profile, others: Sequence[Profile], *, workers: int | None = None, device: str = "cpu"
) -> None:
    """Evolve on other studies together, for the mean of their fitness; write ``transfer.jsonl`` of the one left out.

    Args:
        profile: the study that is left out; gives budget, seeds and the folder of the log.
        others: the studies whose fitness is averaged.
        workers: as in :func:`build_evolution`.
        device: as in :func:`build_evolution`.

    Raises:
        InvalidParameterError: the study is among the others.
    """
    if profile.name in [other.name for other in others]:
        raise InvalidParameterError(f"{profile.name} is to be left out, so it cannot be among the others.")
    seeds = range(profile.evolution.seeds)
    several = [Run(method, "branched", seed) for method in TRANSFERRED for seed in seeds]
    _build(profile, several, tuple(others), TRANSFER, workers, device)


def _build(
    profile: Profile,
    several: Sequence[Run],
    others: tuple[Profile, ...],
    filename: str,
    workers: int | None,
    device: str,
) -> None:
    with sole_writer(profile) as folder:
        started, lines = time.perf_counter(), []
        finished = share(functools.partial(_lines, profile, others, filename, device), several, workers)
        progress = tqdm(zip(several, finished, strict=True), total=len(several), desc=profile.name, unit="search")
        for run, found in progress:
            lines += found
            best = max(map(json.loads, found), key=lambda line: line["fitness"])
            progress.set_postfix_str(f"{run.name}: {best['fitness']:.3f} {best['best']}")
        entry = {"seconds": time.perf_counter() - started, "rows": len(lines), "others": read_hashes(others)}
        with new_file(profile, filename, **entry) as path:
            path.write_text("".join(line + "\n" for line in lines))
        shutil.rmtree(folder / _resume(filename))


SMALL = Space(
    "branched",
    ("T", "E", "O", "K", "L", "P"),
    unaries=("no_op", "log", "sqrt", "pow2", "sum", "negate"),
    binaries=("sum", "product", "ratio"),
    chains=(1, 1, 1),
)
ALL = "every formula"


def build_enumeration(profile: Profile) -> None:
    """Try every formula of a small space, then let evolution and random search look for the best one.

    Writes ``enumeration.jsonl``: a line for the best formula of all, and one for the end of each search.
    """
    started = time.perf_counter()
    problems, method = load_problems(profile), METHODS[EVOLUTION]
    judge = make_judge(problems, method)
    valid = [member for member in map(judge.judge, SMALL) if member is not None]
    best = max(valid, key=lambda member: member.fitness)
    lines = [
        {
            "method": ALL,
            "seed": None,
            "genotypes": SMALL.size,
            "evaluations": judge.evaluations,
            "best": str(best.genotype),
            "fitness": best.fitness,
        }
    ]
    for seed in range(profile.evolution.seeds):
        streams = (profile.rng(f"{name}, small space, {seed}") for name in (EVOLUTION, CONTROL))
        *_, evolved = evolve(make_judge(problems, method), SMALL, budget=profile.evolution, rng=next(streams))
        *_, drawn = random_search(
            make_judge(problems, method), SMALL, evaluations=evolved.evaluations, rng=next(streams)
        )
        for name, last in ((EVOLUTION, evolved), (CONTROL, drawn)):
            facts = {"method": name, "seed": seed, "genotypes": SMALL.size, "evaluations": last.evaluations}
            lines.append(facts | {"best": last.best, "fitness": last.fitness})
    with new_file(profile, ENUMERATION, seconds=time.perf_counter() - started, rows=len(lines)) as path:
        path.write_text("".join(to_json(line) + "\n" for line in lines))


def build_searches(profile: Profile) -> None:
    """Write ``searches.csv``: one row per search of the log, what it did, and what its best formula is worth.

    Fitness on the search half, and on the held-out half fitness, rho at 20, 50 and 100 %, and rho inside five bins of
    similar size of the stratified sample.
    """
    started = time.perf_counter()
    bench, (problem,) = load_bench(profile), load_problems(profile)
    _, heldout = bench.split()
    _, spread = bench.split("stratified")
    fair = Problem(problem.evaluator, spread.configs, spread.top1)
    fair = fair.inside_sizes(spread.table["size_bytes"].to_numpy(), BINS)
    rows = []
    for (method, structure, seed), lines in itertools.groupby(
        load_evolution(profile), key=lambda line: (line["method"], line["structure"], line["seed"])
    ):
        last = list(lines)[-1]
        genotype = parse(last["best"])
        table = problem.evaluator.scores(genotype)
        searched, scores, spread_scores = (
            score(table, part.configs, profile.choices, aggregation=genotype.aggregation)
            for part in (problem, heldout, spread)
        )
        rho = ranking.fitness_terms(scores[None], heldout.top1, ranking.PERCENTS)[0]
        rows.append(
            {
                "method": method,
                "structure": structure,
                "seed": seed,
                "separable": is_table(table, profile.choices) and genotype.aggregation == "sum",
                "evaluations": last["evaluations"],
                "rejected": last["rejected"],
                "duplicates": last["duplicates"],
                "goal": last["fitness"],
                "search_fitness": problem.fitness(searched),
                "heldout_fitness": float(rho.mean()),
                **{f"heldout_rho{percent}": value for percent, value in zip(ranking.PERCENTS, rho, strict=True)},
                "heldout_binned": fair.fitness(spread_scores),
                "complexity": genotype.complexity,
                "best": last["best"],
            }
        )
    with new_file(profile, SEARCHES, seconds=time.perf_counter() - started, rows=len(rows)) as path:
        pd.DataFrame(rows).to_csv(path, index=False)


def load_evolution(profile: Profile, filename: str = EVOLUTION_LOG) -> list[dict]:
    """Return the lines of a log.

    Raises:
        CorruptArtefactError: a line is not JSON.
    """
    path = checked_path(profile, filename)
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise CorruptArtefactError(f"{path} holds a line that is not JSON ({error}). Restore or rebuild it.") from error


def load_searches(profile: Profile) -> pd.DataFrame:
    """Return one row per search with its best formula, see :func:`build_searches`."""
    return read_table(checked_path(profile, SEARCHES), {"method": str, "structure": str, "seed": int, "best": str})


def load_winner(profile: Profile, method: str = REFINED, filename: str = EVOLUTION_LOG) -> dict:
    """Return the log line of a method's fittest formula over all seeds and structures: a choice by the search half.

    Raises:
        MissingArtefactError: the log has no run of this method.
    """
    lines = [line for line in load_evolution(profile, filename) if line["method"] == method]
    if not lines:
        raise MissingArtefactError(
            f"{study_folder(profile) / filename} has no run of {method!r}; it may be older than this code. Rebuild it."
        )
    return max(lines, key=lambda line: line["fitness"])
