"""The searches of a study: same bytes from any number of workers and after a stop, held-out worth, transfer."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from killing import contents
from searching import DIGITS

from book.studies import evolution, methods
from book.studies.bench import load_bench
from book.studies.files import BENCH, ENUMERATION, EVOLUTION_LOG, SEARCHES, STATISTICS, TRANSFER
from book.studies.study import manifest_of, new_file, study_folder
from emq_lib.core.errors import (
    CorruptArtefactError,
    DiskFullError,
    InvalidParameterError,
    MissingArtefactError,
    StaleArtefactError,
    StudyBusyError,
)
from emq_lib.core.files import sha256, vouched_path
from emq_lib.core.profiles import EvolutionBudget, get_profile, profile_names
from emq_lib.evolution.genotypes import parse
from emq_lib.proxies import ranking

FILES = (EVOLUTION_LOG, SEARCHES)
ALL_METHODS = methods.METHODS


def _bytes(folder):
    return [(folder / name).read_bytes() for name in FILES]


def _stop_at(number, monkeypatch):
    """Search until a run begins, counted from 1, which is stopped."""
    search, seen = evolution.search, []

    def stopped(run, problems, **options):
        seen.append(run)
        if len(seen) == number:
            raise KeyboardInterrupt
        return search(run, problems, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evolution, "search", stopped)
        with pytest.raises(KeyboardInterrupt):
            evolution.build_evolution(DIGITS, workers=1)


@pytest.mark.slow
def test_stopped_and_resumed_ends_with_the_same_bytes(searchable, searched_root, monkeypatch):
    _stop_at(4, monkeypatch)
    assert not (searchable / EVOLUTION_LOG).exists()
    evolution.build_evolution(DIGITS, workers=1)
    assert _bytes(searchable) == _bytes(searched_root / DIGITS.name)
    assert not list(searchable.glob(".*resume"))


@pytest.mark.slow
def test_same_bytes_from_two_workers_in_another_process_with_other_hashes(searchable, searched_root):
    job = "import searching; searching.search_briefly(workers=2)"
    places = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONPATH": places, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", f"if __name__ == '__main__': {job}"], env=environment, check=True)
    assert _bytes(searchable) == _bytes(searched_root / DIGITS.name)
    assert not list(searchable.glob(".*resume"))


def test_every_run_is_logged_with_its_control_and_its_worth(searched):
    table = evolution.load_searches(DIGITS)
    structures = table.groupby("method")["structure"].nunique().to_dict()
    others = {"three goals": 1, methods.FOR_RHO: 1, methods.WITH_PAIRS: 1}
    assert structures == {"evolution": 3, "random search": 3} | others
    evolved = table.query("method == 'evolution'").set_index(["structure", "seed"])
    control = table.query("method == 'random search'").set_index(["structure", "seed"])
    assert (control["evaluations"] == evolved["evaluations"]).all()
    assert table.query("method != @methods.WITH_PAIRS")["separable"].all()
    row = table.iloc[0]
    _, heldout = load_bench(DIGITS).split()
    (problem,) = evolution.load_problems(DIGITS)
    scores = problem.evaluator.score(parse(row["best"]), heldout.configs)
    assert row["heldout_rho100"] == pytest.approx(ranking.spearman(scores, heldout.top1))
    assert row["heldout_fitness"] == pytest.approx(ranking.fitness(scores, heldout.top1))
    with pytest.raises(MissingArtefactError, match="has no run of 'islands'"):
        evolution.load_winner(DIGITS, "islands")
    winner = evolution.load_winner(DIGITS, methods.EVOLUTION)
    assert winner["fitness"] == table.query("method == 'evolution'")["goal"].max()
    assert set(FILES) <= set(manifest_of(DIGITS))


@pytest.mark.parametrize("goal", ["ranks", "rho", "few", "halves", "sizes"])
def test_goals_read_the_search_half_alone(goal, searchable):
    search, heldout = load_bench(DIGITS).split()
    spread, _ = load_bench(DIGITS).split("stratified")
    allowed = {tuple(row) for row in (spread if goal == "sizes" else search).configs}
    problems = evolution.load_problems(DIGITS, goal)
    assert len(problems) == (8 if goal == "halves" else 1)
    for problem in problems:
        assert {tuple(row) for row in problem.configs} <= allowed
    expected = {"few": 50, "halves": len(search) // 2, "sizes": len(spread)}.get(goal, len(search))
    assert len(problems[0].configs) == expected
    assert not allowed & {tuple(row) for row in heldout.configs}


def test_other_statistics_are_noticed_in_the_same_process(searchable):
    (before,), (same,) = evolution.load_problems(DIGITS), evolution.load_problems(DIGITS, "rho")
    assert same.evaluator is before.evaluator
    content = (searchable / STATISTICS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    with new_file(DIGITS, STATISTICS, seconds=0.0) as path:  # a header that is longer by a blank
        path.write_bytes(
            (length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :]
        )
    (after,) = evolution.load_problems(DIGITS)
    assert after.evaluator is not before.evaluator


def test_other_studies_are_evolved_on_together(searchable, tmp_path):
    twin = dataclasses.replace(DIGITS, name="twin")
    shutil.copytree(searchable, searchable.parent / "twin")
    evolution.build_transfer(DIGITS, [twin], workers=1)
    assert not list(searchable.glob(".*resume"))
    lines = [json.loads(line) for line in (searchable / TRANSFER).read_text().splitlines()]
    winner = max((line for line in lines if line["method"] == "transferred for rho"), key=lambda line: line["fitness"])
    (problem,) = evolution.load_problems(twin, "rho")
    scores = problem.evaluator.score(parse(winner["best"]), problem.configs)
    assert winner["fitness"] == pytest.approx(problem.fitness(scores))
    inputs = manifest_of(DIGITS)[TRANSFER]["inputs"]
    assert inputs[f"twin/{BENCH}"] == sha256(searchable / BENCH)
    for others in ([DIGITS], [twin, DIGITS], []):
        with pytest.raises(InvalidParameterError, match="cannot be among the others"):
            evolution.build_transfer(DIGITS, others)


def test_a_journal_of_other_data_is_refused(searchable, monkeypatch):
    _stop_at(2, monkeypatch)
    longer = dataclasses.replace(DIGITS, evolution=EvolutionBudget(population=8, iterations=9, seeds=1))
    before = contents(searchable)
    with pytest.raises(CorruptArtefactError, match="of another run, of other files, or of another version of the code"):
        evolution.build_evolution(longer, workers=1)
    assert contents(searchable) == before


def test_searches_of_another_bench_are_refused(searched):
    with new_file(DIGITS, BENCH, seconds=0.0) as path:
        path.write_bytes((searched / BENCH).read_bytes())
    assert evolution.load_winner(DIGITS, methods.EVOLUTION)  # the same bytes
    published = get_profile(DIGITS.name)  # which asks for more iterations
    with pytest.raises(StaleArtefactError, match="the profile has changed"):
        evolution.load_winner(published, methods.EVOLUTION)


def test_methods_search_what_their_names_say(searchable):
    problems = evolution.load_problems(DIGITS)
    factor = ALL_METHODS["bits as a factor"].space("branched")
    assert all(name.startswith("b") and len(name) == 2 for name in factor.random(np.random.default_rng(0)).inputs)
    assert "survival" in ALL_METHODS[methods.WITH_PAIRS].space("branched").aggregations
    assert ALL_METHODS["short formulas"].judge(problems).penalty == 0.002
    assert ALL_METHODS["random halves"].judge(problems).across == "stable"
    judges = {name: method.judge(problems) for name, method in (ALL_METHODS | methods.TRANSFERRED).items()}
    assert [name for name, judge in judges.items() if judge.rising] == [methods.RISING, methods.RISING_INSIDE]
    assert [name for name, judge in judges.items() if not judge.screening] == ["without screening"]
    assert set(methods.EVOLVED.values()) | set(methods.ALLOCATED) <= set(ALL_METHODS)


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def busy(searched):
    """Return the folder of a study that another process is writing."""
    command = [sys.executable, "-c", HOLD, str(searched / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield searched
        other.kill()


@pytest.mark.parametrize(
    "build",
    [
        evolution.build_evolution,
        evolution.build_enumeration,
        evolution.build_searches,
        lambda profile: evolution.build_transfer(profile, [dataclasses.replace(profile, name="twin")]),
    ],
    ids=["evolution", "enumeration", "searches", "transfer"],
)
def test_a_second_build_is_refused_at_once(build, busy):
    before, started = contents(busy), time.perf_counter()
    with pytest.raises(StudyBusyError, match="Another run is writing"):
        build(DIGITS)
    assert time.perf_counter() - started < 1
    assert contents(busy) == before


def test_a_worker_watches_its_parent_before_it_imports_what_takes_seconds():
    check = "import sys, book.studies.workers; assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("workers", [0, -1, 2.5, "two"])
def test_impossible_numbers_of_workers_change_nothing(workers, searched):
    before = contents(searched)
    with pytest.raises(InvalidParameterError, match="number of workers"):
        evolution.build_evolution(DIGITS, workers=workers)
    assert contents(searched) == before


def test_a_full_disk_is_named_and_what_was_judged_is_kept(searchable):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="What was finished is kept"):
            evolution.build_evolution(DIGITS, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (journal,) = searchable.glob(".evolution.jsonl.resume/*")
    assert len(journal.read_bytes().splitlines()) > 5
    assert journal.read_bytes().endswith(b"\n")
    assert not (searchable / EVOLUTION_LOG).exists()


def _sign(folder, name):
    """Make the manifest vouch for a file as it is."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name]["sha256"] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _line(**changes):
    return lambda line: json.dumps(json.loads(line) | changes)


def _without(key):
    return lambda line: json.dumps({name: value for name, value in json.loads(line).items() if name != key})


KEYS = ("method", "structure", "seed", "iteration", "evaluations", "rejected", "duplicates", "best", "fitness", "mean")
ODD_LINES = {
    **{f"without {key}": _without(key) for key in (*KEYS, "front")},
    **{f"{key} is {value}": _line(**{key: value}) for key in ("fitness", "mean") for value in (None, "high", True, 1)},
    "NaN fitness": lambda line: line.replace('"fitness": ', '"fitness": NaN, "was": '),
    "infinite fitness": lambda line: line.replace('"fitness": ', '"fitness": -Infinity, "was": '),
    **{f"best is {value!r:.20}": _line(best=value) for value in (None, 3, "", "cubic(W: abs)", ["W"], "x" * 100_000)},
    **{f"seed is {value!r}": _line(seed=value) for value in (None, "0", -1, 0.5, True, [0])},
    **{f"structure is {value!r}": _line(structure=value) for value in (None, "forest", ["dag"])},
    **{f"method is {value!r}": _line(method=value) for value in (None, "", 3, ["evolution"])},
    **{f"evaluations is {value!r}": _line(evaluations=value) for value in (None, "9", -9, 0.5)},
    **{f"front is {value!r}": _line(front=value) for value in (None, "W", [3], ["cubic(W: abs)"], {})},
    **{
        f"a line {text[:9]!r}": lambda _, text=text: text
        for text in ("", "null", "[]", "3", "{", "{}", "]" * 9, "[" * 100_000)
    },
}


@pytest.mark.parametrize("kind", ODD_LINES)
def test_logs_that_hold_what_no_search_wrote(kind, searched):
    path = searched / EVOLUTION_LOG
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, ODD_LINES[kind](second), *rest]) + "\n")
    _sign(searched, EVOLUTION_LOG)
    before = path.read_bytes()
    for load in (evolution.load_evolution, evolution.load_winner):
        with pytest.raises(CorruptArtefactError, match="line 2, (is no line of such a log|has an impossible)"):
            load(DIGITS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"PK\x03\x04", b"\x00" * 100, "ä".encode("latin-1")])
@pytest.mark.parametrize("name", [EVOLUTION_LOG, TRANSFER, ENUMERATION, SEARCHES])
def test_files_of_searches_that_are_empty_or_something_else(name, content, searched):
    if not (searched / name).exists():
        with new_file(DIGITS, name, seconds=0.0) as path:
            path.write_text("{}\n")
    (searched / name).write_bytes(content)
    _sign(searched, name)
    with pytest.raises(CorruptArtefactError, match="Restore"):
        evolution.load_searches(DIGITS) if name == SEARCHES else evolution.load_evolution(DIGITS, name)
    assert (searched / name).read_bytes() == content


COLUMNS = (
    "method",
    "structure",
    "seed",
    "separable",
    "evaluations",
    "goal",
    "search_fitness",
    "heldout_rho100",
    "best",
)
ODD_TABLES = {
    **{f"without {name}": lambda table, name=name: table.drop(columns=name) for name in COLUMNS},
    "no rows": lambda table: table[:0],
    **{
        f"{name} is {value!r}": lambda table, name=name, value=value: table.assign(**{name: value})
        for name, value in (
            *(("seed", "zero"), ("seed", 0.5), ("seed", None), ("goal", "high"), ("goal", None), ("goal", np.inf)),
            *(("search_fitness", "x"), ("evaluations", "many"), ("best", "cubic(W: abs)"), ("best", None)),
            *(("best", 3), ("structure", "forest"), ("method", None), ("heldout_rho100", "x"), ("evaluations", -1)),
        )
    },
}


@pytest.mark.parametrize("kind", ODD_TABLES)
def test_tables_that_hold_what_no_search_wrote(kind, searched):
    path = searched / SEARCHES
    ODD_TABLES[kind](evolution.load_searches(DIGITS)).to_csv(path, index=False)
    _sign(searched, SEARCHES)
    with pytest.raises(CorruptArtefactError, match="Restore"):
        evolution.load_searches(DIGITS)


@pytest.mark.parametrize("name", ["searches.csv", "model.safetensors", "../secrets", "", None, 3, ["evolution.jsonl"]])
def test_files_that_are_no_logs(name, searched):
    for load in (lambda: evolution.load_evolution(DIGITS, name), lambda: evolution.load_winner(DIGITS, filename=name)):
        with pytest.raises(InvalidParameterError, match="no log of searches"):
            load()


@pytest.mark.parametrize("method", ["x", "", None, 3, ["refined"]])
def test_methods_that_no_one_ran(method, searched):
    with pytest.raises(MissingArtefactError, match="has no run of"):
        evolution.load_winner(DIGITS, method)


@pytest.mark.parametrize("goal", ["x", None, ["ranks"]])
def test_goals_that_there_are_not(goal, searched):
    with pytest.raises(InvalidParameterError, match="unknown goal"):
        evolution.load_problems(DIGITS, goal)


PUBLISHED = [name for name in profile_names() if (study_folder(get_profile(name)) / EVOLUTION_LOG).is_file()]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("filename", [EVOLUTION_LOG, TRANSFER, ENUMERATION, SEARCHES])
def test_published_files_pass_the_checks_up_to_date_or_not(name, filename, monkeypatch):
    monkeypatch.delenv("EMQ_STUDY_ROOT", raising=False)
    monkeypatch.setattr(evolution, "checked_path", lambda profile, file: vouched_path(study_folder(profile), file))
    profile = get_profile(name)
    load = evolution.load_searches if filename == SEARCHES else lambda one: evolution.load_evolution(one, filename)
    assert len(load(profile)) == manifest_of(profile)[filename]["rows"]
