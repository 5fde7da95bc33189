"""What searches, genotypes, spaces, problems and judges refuse: by a named error, at once, files as they were."""

import dataclasses
import json
import math
import resource
import time

import numpy as np
import pytest
from test_search_space import CHOICES, make_statistics

from emq_lib.core.errors import (
    ConfigLengthError,
    CorruptArtefactError,
    DiskFullError,
    EMQError,
    GenotypeSyntaxError,
    InvalidBitsError,
    InvalidParameterError,
    InvalidScoreError,
    UnwritablePathError,
)
from emq_lib.core.journal import Journal
from emq_lib.core.profiles import EvolutionBudget
from emq_lib.evolution import methods, search, spaces
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.fitness import Judge, Judgements, Problem
from emq_lib.evolution.genotypes import KNOWN, LONGEST, Genotype, canonical, parse, to_latex, without_each_term
from emq_lib.evolution.programs import element_programs
from emq_lib.evolution.spaces import Space

RNG = np.random.default_rng
FORMULA = parse("sequential(K: negate)")
MANY = ", ".join(["abs", "log"] * 50_000)
NO_GENOTYPES = [None, b"sequential(W: abs)", ["W"], "sequential(W: abs)", 3, {}, Genotype]


@pytest.fixture(scope="module")
def problem():
    evaluator = Evaluator(make_statistics())
    configs = RNG(0).choice(CHOICES, size=(60, 3)).astype(np.int8)
    return Problem(evaluator, configs, evaluator.score(FORMULA, configs))


@pytest.mark.parametrize(
    "text",
    [
        *(None, b"sequential(W: abs)", ["sequential(W: abs)"], 3, 2.5, {}, FORMULA),
        *(
            "",
            " ",
            "sequential",
            "sequential(",
            "sequential()",
            "sequential(W)",
            "sequential(W:)",
            "sequential(W: abs,)",
        ),
        *(
            "sequential(W: abs))",
            "sequential(W: abs)\0",
            "Sequential(W: abs)",
            "sequential(w: abs)",
            "séquentiel(W: abs)",
        ),
        *(
            "branched(sum; W: abs; E: abs)",
            "branched(sum; W: abs; E: abs; abs; abs)",
            "branched(; W: abs; E: abs; abs)",
        ),
        *(
            "dag(W, E)",
            "dag(W, E; abs, abs; abs, abs)",
            "weakest weakest sequential(W: abs)",
            "vote sequential(W: abs)",
        ),
        *("__import__('os').system('true')", "sequential(W: __class__)", "\ud800", "🙂", "nan", "null", "[]"),
        pytest.param(f"sequential(W: {MANY})", id="100,000 functions"),
        pytest.param(f"branched(sum; W: {MANY}; E: abs; abs)", id="100,000 functions in a branch"),
        pytest.param("dag(W, E; abs, abs" + "; abs" * 100_000 + ")", id="100,000 nodes"),
        pytest.param("sequential(W: " + ", ".join(["abs"] * (LONGEST + 1)) + ")", id="one function too many"),
        pytest.param("(" * 1_000_000, id="brackets"),
        pytest.param(" " * 1_000_000, id="blanks"),
    ],
)
def test_no_texts_of_genotypes(text):
    started = time.perf_counter()
    with pytest.raises(GenotypeSyntaxError) as caught:
        parse(text)
    assert time.perf_counter() - started < 1
    assert 10 < len(str(caught.value)) < 3_000


CHAIN = ("abs",)


@pytest.mark.parametrize(
    "genes",
    [
        *((None, ("W",), (CHAIN,)), (["dag"], ("W",), (CHAIN,)), ("forest", ("W",), (CHAIN,)), (3, ("W",), (CHAIN,))),
        *(("sequential", "W", (CHAIN,)), ("sequential", ["W"], (CHAIN,)), ("sequential", None, (CHAIN,))),
        *(("sequential", ("Q",), (CHAIN,)), ("sequential", (["W"],), (CHAIN,)), ("sequential", (), (CHAIN,))),
        *(("sequential", ("W", "E"), (CHAIN,)), ("branched", ("W",), (CHAIN,) * 3, "sum")),
        *(("sequential", ("W",), [CHAIN]), ("sequential", ("W",), (["abs"],)), ("sequential", ("W",), ("abs",))),
        *(("sequential", ("W",), None), ("sequential", ("W",), ((),)), ("sequential", ("W",), (("quartic",),))),
        *(("sequential", ("W",), (CHAIN, CHAIN)), ("sequential", ("W",), ()), ("sequential", ("W",), ((None,),))),
        ("sequential", ("W",), (CHAIN * (LONGEST + 1),)),
        pytest.param(("sequential", ("W",), (CHAIN * 100_000,)), id="100,000 functions"),
        *(("sequential", ("W",), (CHAIN,), "sum"), ("branched", ("W", "E"), (CHAIN,) * 3)),
        *(("branched", ("W", "E"), (CHAIN,) * 3, "power"), ("branched", ("W", "E"), (CHAIN,) * 2, "sum")),
        *(("dag", ("W", "E"), (CHAIN,)), ("dag", ("W", "E"), (CHAIN * 2, CHAIN * 2)), ("dag", ("W", "E"), ())),
        *(("sequential", ("W",), (CHAIN,), None, "vote"), ("sequential", ("W",), (CHAIN,), None, None)),
    ],
)
def test_genes_that_make_no_genotype(genes):
    with pytest.raises(GenotypeSyntaxError):
        Genotype(*genes)


@pytest.mark.parametrize("genotype", NO_GENOTYPES)
@pytest.mark.parametrize(
    "function",
    [
        canonical,
        to_latex,
        without_each_term,
        element_programs,
        Space("branched").fit,
        lambda genotype: Space("sequential").mutate(genotype, rng=RNG(0)),
        lambda genotype: spaces.cross(FORMULA, genotype, rng=RNG(0)),
        lambda genotype: spaces.cross(genotype, FORMULA, rng=RNG(0)),
        lambda genotype: Evaluator(make_statistics()).scores(genotype),
        lambda genotype: Evaluator(make_statistics()).score(genotype, [[2, 3, 4]]),
        lambda genotype: Evaluator(make_statistics(), batched=True).prepare([genotype]),
    ],
)
def test_what_is_no_genotype_is_refused_wherever_one_is_asked_for(function, genotype):
    with pytest.raises(GenotypeSyntaxError, match="a Genotype is needed"):
        function(genotype)


@pytest.mark.parametrize("genotype", NO_GENOTYPES)
def test_a_judge_and_a_search_refuse_what_is_no_genotype(genotype, problem):
    with pytest.raises(GenotypeSyntaxError):
        Judge([problem]).judge(genotype)
    with pytest.raises(GenotypeSyntaxError):
        next(
            search.evolve(Judge([problem]), Space("branched"), budget=EvolutionBudget(8), rng=RNG(0), known=[genotype])
        )


def test_the_longest_genotype_is_quick():
    longest = Genotype("sequential", ("E",), (("tanh", "swish") * (LONGEST // 2),))
    started = time.perf_counter()
    assert parse(str(longest)) == longest
    assert np.isfinite(Evaluator(make_statistics()).scores(longest)).all()
    assert to_latex(longest).count("tanh") == LONGEST // 2
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("configs", "error"),
    [
        *(([[2, 3]], ConfigLengthError), ([2, 3], ConfigLengthError), ([[[2, 3, 4]]], ConfigLengthError)),
        *(([[2, 3, 9]], InvalidBitsError), ([[2, 3, math.nan]], InvalidBitsError), ([[2, 3, 2.5]], InvalidBitsError)),
        *(("234", EMQError), (None, EMQError), ([[2, 3, None]], EMQError), ([[2, 3], [2]], EMQError)),
    ],
)
def test_configurations_of_no_network(configs, error):
    with pytest.raises(error):
        Evaluator(make_statistics()).score(FORMULA, configs)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        *(({"mode": "fixed"}, GenotypeSyntaxError), ({"mode": None}, GenotypeSyntaxError)),
        *(({"device": "abacus"}, InvalidParameterError), ({"device": "cuda:99"}, InvalidParameterError)),
        *(({"device": 2.5}, InvalidParameterError), ({"statistics": None}, InvalidParameterError)),
        ({"statistics": {"names": ()}}, InvalidParameterError),
    ],
)
def test_evaluators_of_nothing(options, error):
    with pytest.raises(error):
        Evaluator(**{"statistics": make_statistics()} | options)


def test_scores_that_are_not_finite_are_refused_where_configurations_are_scored():
    overflow = parse("sequential(bW: exp, exp, pow2, pow2)")
    assert not np.isfinite(Evaluator(make_statistics()).scores(overflow)).all()
    with pytest.raises(InvalidScoreError):
        Evaluator(make_statistics()).score(overflow, [[2, 3, 4]])


@pytest.mark.parametrize(
    "options",
    [
        *({"structure": name} for name in ("forest", None, "", ["dag"], b"dag", 3)),
        *(
            {"inputs": inputs}
            for inputs in (("W", "Q"), (), "W", "WE", ["W"], ("W", "W"), None, ("W", None), (["W"],), 3)
        ),
        *({"aggregations": names} for names in (("vote",), (), "sum", None)),
        *({"unaries": names} for names in (("quartic",), (), "abs", ("abs", "abs"), ["abs"], None)),
        *({"binaries": names} for names in (("power",), (), "sum", None)),
        *({"chains": chains} for chains in ((), (2, 2), (2, 2, 0), (2, 2, -1), (2, 2, 2.5), (2, 2, "2"), (2, 2, True))),
        *(
            {"chains": chains}
            for chains in ([2, 2, 2], 6, (10**9, 1, 1), (2, 2, LONGEST), (2, 2, None), (2, 2, math.nan))
        ),
        *({"structure": "dag", "chains": chains} for chains in ((3,), (2, 2), (2, 4), (1, 2, 3))),
    ],
)
def test_spaces_of_nothing(options):
    with pytest.raises((GenotypeSyntaxError, InvalidParameterError)):
        Space(**{"structure": "branched"} | options)


def test_walking_a_space_does_not_list_it_first():
    started = time.perf_counter()
    for structure in ("sequential", "branched", "dag"):
        assert isinstance(next(iter(Space(structure))), Genotype)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("rng", [None, 0, "seed", np.random, np.random.RandomState(0)])
def test_randomness_comes_from_a_generator(rng, problem):
    for function in (
        lambda: Space("branched").random(rng),
        lambda: spaces.cross(FORMULA, FORMULA, rng=rng),
        lambda: problem.resampled(2, rng=rng),
        lambda: next(search.evolve(Judge([problem]), Space("branched"), budget=EvolutionBudget(8), rng=rng)),
        lambda: next(search.random_search(Judge([problem]), Space("branched"), evaluations=3, rng=rng)),
    ):
        with pytest.raises(InvalidParameterError, match="Generator"):
            function()


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan, math.inf, "half", None, True, 0.5j])
def test_probabilities(probability, problem):
    with pytest.raises(InvalidParameterError):
        spaces.cross(FORMULA, FORMULA, rng=RNG(0), probability=probability)
    with pytest.raises(InvalidParameterError):
        Space("sequential", chains=(1,)).mutate(FORMULA, rng=RNG(0), probability=probability)
    with pytest.raises(InvalidParameterError):
        next(
            search.evolve(Judge([problem]), Space("branched"), budget=EvolutionBudget(8), rng=RNG(0), genes=probability)
        )


def test_parents_of_other_shapes_have_no_children():
    for other in (KNOWN["HAWQ-V2"], parse("sequential(K: negate, log)"), parse("dag(W, E; abs, abs)")):
        with pytest.raises(GenotypeSyntaxError, match="do not correspond"):
            spaces.cross(FORMULA, other, rng=RNG(0))


COUNTS = [-1, 2.5, math.nan, math.inf, "10", None, True, [8], 1j]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "use",
    [
        lambda judge, count: search.evolve(judge, Space("dag"), budget=EvolutionBudget(population=count), rng=RNG(0)),
        lambda judge, count: search.evolve(judge, Space("dag"), budget=EvolutionBudget(iterations=count), rng=RNG(0)),
        lambda judge, count: search.evolve(judge, Space("dag"), budget=EvolutionBudget(), rng=RNG(0), islands=count),
        lambda judge, count: search.random_search(judge, Space("dag"), evaluations=count, rng=RNG(0)),
        lambda judge, count: iter(judge.problems[0].resampled(count, rng=RNG(0))),
        lambda judge, count: iter([judge.problems[0].inside_sizes(np.arange(60), count)]),
    ],
    ids=["population", "iterations", "islands", "evaluations", "halves", "bins"],
)
def test_numbers_of_a_search(use, count, problem):
    judge = Judge([problem])
    with pytest.raises(InvalidParameterError):
        next(use(judge, count))
    assert judge.evaluations == judge.rejected == 0


@pytest.mark.parametrize("population", [0, 3])
def test_too_small_populations(population, problem):
    for function, more in ((search.evolve, {}), (search.evolve_front, {"cost": lambda _: 0.0})):
        with pytest.raises(InvalidParameterError):
            next(function(Judge([problem]), Space("branched"), budget=EvolutionBudget(population), rng=RNG(0), **more))
    with pytest.raises(InvalidParameterError):
        next(search.evolve(Judge([problem]), Space("branched"), budget=EvolutionBudget(8), rng=RNG(0), islands=0))


@pytest.mark.parametrize("what", ["judge", "space", "budget"])
def test_searches_of_nothing(what, problem):
    given = {"judge": Judge([problem]), "space": Space("branched"), "budget": EvolutionBudget(8)} | {what: None}
    judge, space = given.pop("judge"), given.pop("space")
    with pytest.raises(InvalidParameterError, match="a search needs"):
        next(search.evolve(judge, space, rng=RNG(0), **given))


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_costs_that_are_not_finite(cost, problem):
    run = search.evolve_front(
        Judge([problem]), Space("branched"), budget=EvolutionBudget(8), rng=RNG(0), cost=lambda _: cost
    )
    with pytest.raises(InvalidParameterError, match="cost"):
        next(run)


def test_a_control_ends_when_it_has_seen_the_space(problem):
    space = Space("sequential", ("b", "K"), unaries=("no_op", "negate"), chains=(1,))
    *_, last = search.random_search(Judge([problem]), space, evaluations=1_000, rng=RNG(0))
    assert last.evaluations == space.size == 4
    with pytest.raises(InvalidParameterError, match="search a larger space"):
        list(search.evolve(Judge([problem]), space, budget=EvolutionBudget(8, 4), rng=RNG(0)))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda p: {"evaluator": None}, InvalidParameterError),
        (lambda p: {"configs": p.configs[:29], "accuracy": p.accuracy[:29]}, InvalidParameterError),
        (lambda p: {"configs": p.configs[:40]}, InvalidParameterError),
        (lambda p: {"configs": p.configs[:, :2]}, ConfigLengthError),
        (lambda p: {"configs": p.configs[0]}, InvalidParameterError),
        (lambda p: {"configs": p.configs + 5}, InvalidBitsError),
        (lambda p: {"configs": p.configs.tolist()}, InvalidParameterError),
        (lambda p: {"configs": None}, EMQError),
        (lambda p: {"accuracy": p.accuracy[:40]}, InvalidParameterError),
        (lambda p: {"accuracy": p.accuracy[:, None]}, InvalidScoreError),
        (lambda p: {"accuracy": np.where(p.accuracy == p.accuracy[0], np.nan, p.accuracy)}, InvalidScoreError),
        (lambda p: {"accuracy": np.where(p.accuracy == p.accuracy[0], np.inf, p.accuracy)}, InvalidScoreError),
        (lambda p: {"accuracy": p.accuracy.astype(str)}, InvalidScoreError),
        (lambda p: {"accuracy": p.accuracy + 1j}, InvalidScoreError),
        (lambda p: {"accuracy": None}, InvalidScoreError),
        (lambda p: {"accuracy": 90.0}, InvalidScoreError),
        (lambda p: {"accuracy": p.accuracy.tolist()}, InvalidParameterError),
        (lambda p: {"accuracy": np.full(len(p.accuracy), 90.0)}, InvalidParameterError),
        (lambda p: {"groups": ()}, InvalidParameterError),
        (lambda p: {"groups": (np.arange(2),)}, InvalidParameterError),
        (lambda p: {"groups": (np.array([0, 1, 60]),)}, InvalidParameterError),
        (lambda p: {"groups": (np.array([-1, 0, 1]),)}, InvalidParameterError),
        (lambda p: {"groups": (np.array([0.5, 1, 2]),)}, InvalidParameterError),
        (lambda p: {"groups": (None,)}, InvalidParameterError),
    ],
)
def test_problems_that_rank_nothing(change, error, problem):
    with pytest.raises(error):
        dataclasses.replace(problem, **change(problem))


@pytest.mark.parametrize("sizes", [None, 3, "12", np.full(60, np.nan), np.arange(59), np.arange(120).reshape(60, 2)])
def test_sizes_of_other_configurations(sizes, problem):
    with pytest.raises((InvalidScoreError, InvalidParameterError)):
        problem.inside_sizes(sizes, 4)


@pytest.mark.parametrize("bins", [0, 21, 10**30])
def test_bins_of_too_few_configurations(bins, problem):
    with pytest.raises(InvalidParameterError):
        problem.inside_sizes(problem.configs.sum(axis=1), bins)


@pytest.mark.parametrize("scores", [np.arange(59.0), np.arange(120.0).reshape(60, 2), np.array([])])
def test_fitness_of_other_scores(scores, problem):
    with pytest.raises(InvalidScoreError):
        problem.fitness(scores)


@pytest.mark.parametrize(
    "options",
    [
        *({"problems": problems} for problems in ([], None, 3, "problems", [None], {})),
        *({"across": across} for across in ("x", "", None, 3, ["mean"])),
        *({"penalty": penalty} for penalty in (-0.1, math.nan, math.inf, "low", None, True)),
    ],
)
def test_judges_of_nothing(options, problem):
    with pytest.raises(InvalidParameterError):
        Judge(**{"problems": [problem]} | options)


@pytest.mark.parametrize("goal", ["x", "", None, 3, ["ranks"], "Ranks"])
def test_goals(goal, problem):
    with pytest.raises(InvalidParameterError, match="unknown goal"):
        methods.Method(goal=goal)
    with pytest.raises(InvalidParameterError, match="unknown goal"):
        methods.problems_for(goal, problem, sizes=problem.configs.sum(axis=1), rng=RNG(0))


GOOD = {"genotype": str(FORMULA), "fitness": 0.5, "fingerprint": "00"}


@pytest.mark.parametrize(
    "line",
    [
        *(GOOD | {"fitness": fitness} for fitness in (math.nan, math.inf, "0.5", 1, True, [0.5], None)),
        *(GOOD | {"genotype": text} for text in ("cubic(W: abs)", "", None, 3, ["W"], f"sequential(W: {MANY})")),
        *(GOOD | {"fingerprint": value} for value in (None, 3, [])),
        *({key: value for key, value in GOOD.items() if key != gone} for gone in GOOD),
        {},
        {"rows": {}, "seconds": 1.0},
    ],
)
def test_journals_that_hold_other_lines(line, tmp_path):
    path = tmp_path / "run.jsonl"
    for one in (GOOD, line):
        Journal(path, {"run": "one"}).append(one)
    before = path.read_bytes()
    with pytest.raises(CorruptArtefactError, match="line 3, is no judgement"):
        Judgements(Journal(path, {"run": "one"}))
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "NaN", "{", '"text"', "\x00", "\xff", "{}}", "[" * 100_000])
def test_journals_that_hold_no_lines(text, tmp_path):
    path = tmp_path / "run.jsonl"
    Journal(path, {"run": "one"}).append(GOOD)
    path.write_bytes(path.read_bytes() + text.encode("latin-1") + b"\n")
    before = path.read_bytes()
    with pytest.raises(CorruptArtefactError, match="line 3"):
        Judgements(Journal(path, {"run": "one"}))
    assert path.read_bytes() == before


def test_a_journal_that_judges_twice_and_differently(tmp_path):
    path = tmp_path / "run.jsonl"
    journal = Journal(path, {"run": "one"})
    for line in (GOOD, GOOD, GOOD | {"fitness": 0.6}):
        journal.append(line)
    with pytest.raises(CorruptArtefactError, match="line 4.*differs from an earlier one"):
        Judgements(Journal(path, {"run": "one"}))


def test_a_journal_of_another_run_is_refused_and_stays(tmp_path):
    path = tmp_path / "run.jsonl"
    Journal(path, {"run": "one", "digits/bench.parquet": "1f"}).append(GOOD)
    before = path.read_bytes()
    for other in ({"run": "two"}, {"run": "one", "digits/bench.parquet": "2e"}, {}):
        with pytest.raises(CorruptArtefactError, match="Delete it to start afresh"):
            Judgements(Journal(path, other))
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [b"{", b'{"fitness": 0.5, "fing', b"\xc3", b"x" * 5_000])
def test_what_was_cut_off_is_dropped_and_the_rest_never_rewritten(cut, tmp_path, problem):
    path = tmp_path / "run.jsonl"
    judge = Judge([problem], journal=Judgements(Journal(path, {"run": "one"})))
    judge.judge(FORMULA)
    whole, inode = path.read_bytes(), path.stat().st_ino
    path.write_bytes(whole + cut)
    again = Judgements(Journal(path, {"run": "one"}))
    assert again.find(FORMULA) == (True, judge.judge(FORMULA))
    assert path.read_bytes() == whole + cut  # opened, and killed before anything was written
    Judge([problem], journal=again).judge(KNOWN["bit sum"])
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line) for line in path.read_bytes().splitlines()][2]["genotype"] == str(KNOWN["bit sum"])
    assert path.stat().st_ino == inode


def test_a_full_disk_is_named_and_keeps_whole_lines(tmp_path, problem):
    path = tmp_path / "run.jsonl"
    judge = Judge([problem], journal=Judgements(Journal(path, {"run": "one"})))
    judge.judge(FORMULA)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="No room to write"):
            judge.judge(KNOWN["bit sum"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert judge.judge(KNOWN["bit sum"]) is not None  # and there is room again
    assert len(Journal(path, {"run": "one"}).lines) == 2


def test_a_journal_that_cannot_be_written(tmp_path, problem):
    (tmp_path / "file").write_text("")
    judge = Judge([problem], journal=Judgements(Journal(tmp_path / "file" / "run.jsonl", {"run": "one"})))
    with pytest.raises(UnwritablePathError):
        judge.judge(FORMULA)
