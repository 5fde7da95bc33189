"""The searches of a study: same bytes from any number of workers and after a stop, held-out worth, transfer."""

import dataclasses
import shutil

import numpy as np
import pytest

from book.studies import evolution
from book.studies.bench import load_bench
from book.studies.study import manifest_of
from emq_lib.core.errors import CorruptArtefactError, InvalidParameterError, MissingArtefactError
from emq_lib.core.profiles import EvolutionBudget
from emq_lib.evolution.genotypes import parse
from emq_lib.proxies import ranking


@pytest.fixture
def short(profile, own_study, monkeypatch):
    """The digits study with a few methods, iterations and seeds."""
    kept = (evolution.EVOLUTION, "three goals", evolution.FOR_RHO, evolution.WITH_PAIRS)
    monkeypatch.setattr(evolution, "METHODS", {name: evolution.METHODS[name] for name in kept})
    return dataclasses.replace(profile, evolution=EvolutionBudget(population=8, iterations=8, seeds=2))


def _bytes(study):
    return [(study / name).read_bytes() for name in ("evolution.jsonl", "searches.csv")]


def test_stopped_and_resumed_ends_with_the_same_bytes(short, own_study, monkeypatch):
    evolution.build_evolution(short, workers=1)
    whole = _bytes(own_study)
    (own_study / "evolution.jsonl").unlink()
    search, seen = evolution.search, []

    def stopped(profile, problems, run, journal):
        seen.append(run)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return search(profile, problems, run, journal)

    monkeypatch.setattr(evolution, "search", stopped)
    with pytest.raises(KeyboardInterrupt):
        evolution.build_evolution(short, workers=1)
    assert not (own_study / "evolution.jsonl").exists()
    monkeypatch.setattr(evolution, "search", search)
    evolution.build_evolution(short, workers=1)
    assert _bytes(own_study) == whole
    assert not list(own_study.glob(".*resume"))


def test_every_run_is_logged_with_its_control_and_its_worth(short, own_study):
    evolution.build_evolution(short, workers=1)
    table = evolution.load_searches(short)
    structures = table.groupby("method")["structure"].nunique().to_dict()
    others = {"three goals": 1, evolution.FOR_RHO: 1, evolution.WITH_PAIRS: 1}
    assert structures == {"evolution": 3, "random search": 3} | others
    evolved = table.query("method == 'evolution'").set_index(["structure", "seed"])
    control = table.query("method == 'random search'").set_index(["structure", "seed"])
    assert (control["evaluations"] == evolved["evaluations"]).all()
    assert table.query("method != @experiments.WITH_PAIRS")["separable"].all()
    row = table.iloc[0]
    _, heldout = load_bench(short).split()
    (problem,) = evolution.load_problems(short)
    scores = problem.evaluator.score(parse(row["best"]), heldout.configs)
    assert row["heldout_rho100"] == pytest.approx(ranking.spearman(scores, heldout.top1))
    assert row["heldout_fitness"] == pytest.approx(ranking.fitness(scores, heldout.top1))
    with pytest.raises(MissingArtefactError, match="has no run of 'islands'"):
        evolution.load_winner(short, "islands")
    winner = evolution.load_winner(short, evolution.EVOLUTION)
    assert winner["fitness"] == table.query("method == 'evolution'")["goal"].max()
    assert {"evolution.jsonl", "searches.csv"} <= set(manifest_of(short))


@pytest.mark.parametrize("goal", ["ranks", "rho", "few", "halves", "sizes"])
def test_goals_read_the_search_half_alone(goal, profile, study):
    search, heldout = load_bench(profile).split()
    spread, _ = load_bench(profile).split("stratified")
    allowed = {tuple(row) for row in (spread if goal == "sizes" else search).configs}
    problems = evolution.load_problems(profile, goal)
    assert len(problems) == (evolution.HALVES if goal == "halves" else 1)
    for problem in problems:
        assert {tuple(row) for row in problem.configs} <= allowed
    assert len(problems[0].configs) == {"few": 50, "halves": 60, "sizes": 60}.get(goal, len(search))
    assert not allowed & {tuple(row) for row in heldout.configs}


def test_other_studies_are_evolved_on_together(short, own_study, profile):
    twin = dataclasses.replace(short, name="twin")
    shutil.copytree(own_study, own_study.parent / "twin")
    evolution.build_transfer(short, [twin], workers=1)
    winner = evolution.load_winner(short, "transferred for rho", filename="transfer.jsonl")
    (problem,) = evolution.load_problems(twin, "rho")
    scores = problem.evaluator.score(parse(winner["best"]), problem.configs)
    assert winner["fitness"] == pytest.approx(problem.fitness(scores))
    with pytest.raises(InvalidParameterError, match="cannot be among the others"):
        evolution.build_transfer(short, [short])


def test_a_journal_of_other_data_is_refused(short, own_study, monkeypatch):
    monkeypatch.setattr(evolution.shutil, "rmtree", lambda _: None)
    evolution.build_evolution(short, workers=1)
    longer = dataclasses.replace(short, evolution=EvolutionBudget(population=8, iterations=9, seeds=2))
    with pytest.raises(CorruptArtefactError, match="another run, study or version"):
        evolution.build_evolution(longer, workers=1)


def test_methods_search_what_their_names_say():
    rng = np.random.default_rng(0)
    factor = evolution.make_space(evolution.METHODS["bits as a factor"], "branched")
    assert all(name.startswith("b") and len(name) == 2 for name in factor.random(rng).inputs)
    pairs = evolution.make_space(evolution.METHODS[evolution.WITH_PAIRS], "branched")
    assert "survival" in pairs.aggregations
    judge = evolution.make_judge([], evolution.METHODS["short formulas"])
    assert judge.penalty == evolution.PENALTY
    assert evolution.make_judge([], evolution.METHODS["random halves"]).across == "stable"
