"""The files of a study's searches: the log of all of them, what each found is worth, and searches on other studies.

Explained in chapter 03. Which searches there are says :mod:`book.studies.methods`.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from book.studies.bench import load_bench
from book.studies.files import BENCH, ENUMERATION, EVOLUTION_LOG, MODEL, SEARCHES, STATISTICS, TRANSFER
from book.studies.methods import REFINED, Run, enumerate_small, pose, search, searches, transfers
from book.studies.origins import code_version
from book.studies.proxies import load_statistics
from book.studies.study import checked_path, new_file, sole_writer, study_folder
from book.studies.workers import share
from emq_lib.core.errors import (
    CorruptArtefactError,
    GenotypeSyntaxError,
    InvalidParameterError,
    MissingArtefactError,
)
from emq_lib.core.files import check_rows, read_table, sha256, to_json
from emq_lib.core.journal import Journal
from emq_lib.core.profiles import Profile
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.fitness import Judgements, Problem
from emq_lib.evolution.genotypes import Genotype, parse
from emq_lib.evolution.methods import BINS
from emq_lib.evolution.primitives import STRUCTURES
from emq_lib.proxies import ranking
from emq_lib.proxies.scores import is_table, score


def read_hashes(studies: Sequence[Profile]) -> dict[str, str]:
    """Return "study/file" -> SHA-256 of the files of studies that searches read."""
    return {
        f"{study.name}/{file}": sha256(checked_path(study, file))
        for study in studies
        for file in (MODEL, BENCH, STATISTICS)
    }


def load_problems(profile: Profile, goal: str = "ranks", *, device: str = "cpu") -> list[Problem]:
    """Return what candidates are judged on: the search half of the configurations, half A of the test images.

    Args:
        profile: the study.
        goal: see :class:`emq_lib.evolution.methods.Method`.
        device: where formulas are evaluated.

    Raises:
        MissingArtefactError, CorruptArtefactError, StaleArtefactError: see :func:`book.studies.study.checked_path`.
        InvalidParameterError: an unknown goal, or a bench with too few configurations.
    """
    evaluator = _evaluator(profile, device, tuple(read_hashes([profile]).items()))
    return pose(goal, evaluator, load_bench(profile), profile.rng)


@functools.lru_cache(maxsize=8)
def _evaluator(profile: Profile, device: str, _hashes: tuple[tuple[str, str], ...]) -> Evaluator:
    return Evaluator(load_statistics(profile), device=device)


def build_evolution(profile: Profile, *, workers: int | None = None, device: str = "cpu") -> None:
    """Run every search; write ``evolution.jsonl``, and ``searches.csv`` by :func:`build_searches`.

    One JSON line per generation that improved the best formula of its run, and one for the last. Fitness reads the
    search half of the configurations and half A of the test images. Same profile, same bytes, whatever the number of
    workers; a build that was stopped goes on where it was.

    Args:
        profile: the study.
        workers: processes that share the runs; None: one per processor.
        device: where formulas are evaluated; another one may round differently, so bytes are the same on one only.

    Raises:
        StudyBusyError: another run is writing the study.
        MissingArtefactError, CorruptArtefactError, StaleArtefactError: of what it reads; or the journal of a stopped
            build belongs to other files or other code.
        DiskFullError, UnwritablePathError: nothing can be written; what was judged is kept.
    """
    with sole_writer(profile):
        _build(profile, searches(profile.evolution.seeds), (), EVOLUTION_LOG, workers, device)
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
        InvalidParameterError: no others, or the study is among them.
        StudyBusyError, MissingArtefactError, CorruptArtefactError, StaleArtefactError, DiskFullError: as in
            :func:`build_evolution`.
    """
    if not others or profile.name in [other.name for other in others]:
        raise InvalidParameterError(f"{profile.name} is to be left out, so it cannot be among the others, or be alone.")
    with sole_writer(profile):
        _build(profile, transfers(profile.evolution.seeds), tuple(others), TRANSFER, workers, device)


def _build(
    profile: Profile,
    several: Sequence[Run],
    others: tuple[Profile, ...],
    filename: str,
    workers: int | None,
    device: str,
) -> None:
    started, lines, hashes = time.perf_counter(), [], read_hashes(others)
    finished = share(functools.partial(_lines, profile, others, filename, device), several, workers)
    progress = tqdm(zip(several, finished, strict=True), total=len(several), desc=profile.name, unit="search")
    for run, found in progress:
        lines += found
        best = max(map(json.loads, found), key=lambda line: line["fitness"])
        progress.set_postfix_str(f"{run.name}: {best['fitness']:.3f} {best['best']}")
    entry = {"seconds": time.perf_counter() - started, "rows": len(lines), "others": hashes}
    with new_file(profile, filename, **entry) as path:
        path.write_text("".join(line + "\n" for line in lines))
    shutil.rmtree(study_folder(profile) / _resume(filename))


def _lines(profile: Profile, others: tuple[Profile, ...], filename: str, device: str, run: Run) -> list[str]:
    """Search and return the log's lines; a run that was stopped goes on from its journal in the folder."""
    studies = others or (profile,)
    problems = [problem for study in studies for problem in load_problems(study, run.how.goal, device=device)]
    depends = {"run": run.name, "budget": asdict(profile.evolution)}
    depends |= read_hashes(studies) | {"code": code_version(filename)}
    journal = Judgements(Journal(study_folder(profile) / _resume(filename) / f"{run.name}.jsonl", depends))
    found = search(
        run,
        problems,
        budget=profile.evolution,
        streams=profile.rng,
        images=profile.calibration_images,
        journal=journal,
    )
    facts = {"structure": run.structure, "seed": run.seed}
    return [to_json({"method": method} | facts | asdict(generation)) for method, generation in found]


def _resume(filename: str) -> str:
    """Return the folder of the journals of searches that are under way."""
    return f".{filename}.resume"


def build_enumeration(profile: Profile) -> None:
    """Try every formula of a small space, then let evolution and random search look for the best one.

    Writes ``enumeration.jsonl``: a line for the best formula of all, and one for the end of each search.

    Raises:
        StudyBusyError, MissingArtefactError, CorruptArtefactError, StaleArtefactError, DiskFullError: as in
            :func:`build_evolution`.
    """
    with sole_writer(profile):
        started = time.perf_counter()
        lines = enumerate_small(load_problems(profile), profile.evolution, profile.rng)
        with new_file(profile, ENUMERATION, seconds=time.perf_counter() - started, rows=len(lines)) as path:
            path.write_text("".join(to_json(line) + "\n" for line in lines))


def build_searches(profile: Profile) -> None:
    """Write ``searches.csv``: one row per search of the log, what it did, and what its best formula is worth.

    Fitness on the search half, and on the held-out half fitness, rho at 20, 50 and 100 %, and rho inside five bins of
    similar size of the stratified sample.

    Raises:
        StudyBusyError, MissingArtefactError, CorruptArtefactError, StaleArtefactError, DiskFullError: as in
            :func:`build_evolution`.
    """
    with sole_writer(profile):
        started = time.perf_counter()
        bench, (problem,) = load_bench(profile), load_problems(profile)
        (_, heldout), (_, spread) = bench.split(), bench.split("stratified")
        fair = Problem(problem.evaluator, spread.configs, spread.top1)
        fair = fair.inside_sizes(spread.table["size_bytes"].to_numpy(), BINS)
        rows = []
        for (method, structure, seed), lines in itertools.groupby(
            load_evolution(profile), key=lambda line: (line["method"], line["structure"], line["seed"])
        ):
            last = list(lines)[-1]
            counts = {name: last[name] for name in ("evaluations", "rejected", "duplicates")}
            found = {"method": method, "structure": structure, "seed": seed, **counts, "goal": last["fitness"]}
            rows.append(found | _worth(parse(last["best"]), problem, (heldout.configs, heldout.top1), fair))
        with new_file(profile, SEARCHES, seconds=time.perf_counter() - started, rows=len(rows)) as path:
            pd.DataFrame(rows)[list(_SEARCH_COLUMNS)].to_csv(path, index=False)


def _worth(
    genotype: Genotype, problem: Problem, heldout: tuple[np.ndarray, np.ndarray], fair: Problem
) -> dict[str, object]:
    """Return what a formula is worth: on the search half, on held-out configurations, and inside sizes."""
    table, choices = problem.evaluator.scores(genotype), problem.evaluator.choices
    searched, scores, fair_scores = (
        score(table, configs, choices, aggregation=genotype.aggregation)
        for configs in (problem.configs, heldout[0], fair.configs)
    )
    rho = ranking.fitness_terms(scores[None], heldout[1], ranking.PERCENTS)[0]
    return {
        "separable": is_table(table, choices) and genotype.aggregation == "sum",
        "search_fitness": problem.fitness(searched),
        "heldout_fitness": float(rho.mean()),
        **{f"heldout_rho{percent}": value for percent, value in zip(ranking.PERCENTS, rho, strict=True)},
        "heldout_binned": fair.fitness(fair_scores),
        "complexity": genotype.complexity,
        "best": str(genotype),
    }


_HELDOUT = ("heldout_fitness", *(f"heldout_rho{percent}" for percent in ranking.PERCENTS), "heldout_binned")
_SEARCH_COLUMNS = {
    "method": str,
    "structure": str,
    "seed": int,
    "separable": bool,
    "evaluations": int,
    "rejected": int,
    "duplicates": int,
    "goal": float,
    "search_fitness": float | None,  # empty where a formula scores the best of them all alike
    **dict.fromkeys(_HELDOUT),  # likewise
    "complexity": int,
    "best": str,
}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 0


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and bool(np.isfinite(value))


def _is_formula(value: object) -> bool:
    try:
        parse(value)
    except GenotypeSyntaxError:
        return False
    return True


_END = {"method": _is_text, "evaluations": _is_count, "best": _is_formula, "fitness": _is_finite}
_GENERATION = _END | {
    "structure": lambda value: value in STRUCTURES,
    "seed": _is_count,
    "iteration": _is_count,
    "rejected": _is_count,
    "duplicates": _is_count,
    "mean": _is_finite,
    "front": lambda value: isinstance(value, list) and all(map(_is_formula, value)),
}
_FIELDS: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    EVOLUTION_LOG: _GENERATION,
    TRANSFER: _GENERATION,
    ENUMERATION: _END | {"genotypes": _is_count, "seed": lambda value: value is None or _is_count(value)},
}


def load_evolution(profile: Profile, filename: str = EVOLUTION_LOG) -> list[dict]:
    """Return the lines of a log.

    Args:
        profile: the study.
        filename: "evolution.jsonl", "transfer.jsonl" or "enumeration.jsonl".

    Raises:
        InvalidParameterError: another file.
        MissingArtefactError, StaleArtefactError: see :func:`book.studies.study.checked_path`.
        CorruptArtefactError: it is altered, empty, or holds a line that is not JSON or no line of such a log: a key is
            absent, a number is NaN, a formula is none.
    """
    if not (isinstance(filename, str) and filename in _FIELDS):
        raise InvalidParameterError(f"{filename!r:.80} is no log of searches; there are {', '.join(_FIELDS)}.")
    path, found = checked_path(profile, filename), []
    try:
        content = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CorruptArtefactError(f"{path} is no text ({error}). Restore or rebuild it.") from error
    for number, text in enumerate(content, start=1):
        try:
            line = json.loads(text)
            odd = [name for name, holds in _FIELDS[filename].items() if not holds(line[name])]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptArtefactError(
                f"{path}, line {number}, is no line of such a log ({error!r:.200}). Restore or rebuild it."
            ) from error
        if odd:
            raise CorruptArtefactError(f"{path}, line {number}, has an impossible {odd[0]}. Restore or rebuild it.")
        found.append(line)
    if not found:
        raise CorruptArtefactError(f"{path} is empty. Restore or rebuild it.")
    check_rows(path, len(found))
    return found


def load_searches(profile: Profile) -> pd.DataFrame:
    """Return one row per search with its best formula, see :func:`build_searches`.

    Raises:
        MissingArtefactError, StaleArtefactError: see :func:`book.studies.study.checked_path`.
        CorruptArtefactError: it is altered or empty, a column is absent, a number or a formula is none.
    """
    path = checked_path(profile, SEARCHES)
    table = read_table(path, _SEARCH_COLUMNS)
    formulas = table["best"].map(_is_formula).all() and table["structure"].isin(STRUCTURES).all()
    counts = (table.select_dtypes("integer") >= 0).all(axis=None)
    if not (formulas and counts and all(pd.api.types.is_float_dtype(table[name]) for name in _HELDOUT)):
        raise CorruptArtefactError(f"{path} holds a formula or a number that is none. Restore or rebuild it.")
    return table


def load_winner(profile: Profile, method: str = REFINED, filename: str = EVOLUTION_LOG) -> dict:
    """Return the log line of a method's fittest formula over all seeds and structures: a choice by the search half.

    Raises:
        MissingArtefactError: the log has no run of this method.
        InvalidParameterError, CorruptArtefactError, StaleArtefactError: see :func:`load_evolution`.
    """
    lines = [line for line in load_evolution(profile, filename) if line["method"] == method]
    if not lines:
        raise MissingArtefactError(
            f"{study_folder(profile) / filename} has no run of {method!r}; it may be older than this code. Rebuild it."
        )
    return max(lines, key=lambda line: line["fitness"])
