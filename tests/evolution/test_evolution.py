"""Evolution: determinism, invariants of the population, screening, a planted optimum, controls, the journal."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from test_search_space import CHOICES, make_statistics

from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.journal import Journal
from emq_lib.core.profiles import EvolutionBudget
from emq_lib.evolution import genotypes, primitives, search, spaces
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.fitness import Judge, Judgements, Problem
from emq_lib.proxies import ranking

BUDGET = EvolutionBudget(population=12, iterations=40)
SHAPES = tuple((3 + i % 3, 6) for i in range(6))
PLANTED = genotypes.KNOWN["HAWQ-V2"]


@pytest.fixture(scope="module")
def problem():
    """A problem whose accuracies are exactly the scores of a known genotype."""
    evaluator = Evaluator(make_statistics(3, SHAPES))
    configs = np.random.default_rng(0).choice(CHOICES, size=(80, 6)).astype(np.int8)
    return Problem(evaluator, configs, evaluator.score(PLANTED, configs))


def _run(problem, seed, *, structure="branched", budget=BUDGET, judge=None, **options):
    judge, space = judge or Judge([problem]), spaces.Space(structure)
    return list(search.evolve(judge, space, budget=budget, rng=np.random.default_rng(seed), **options))


@pytest.mark.slow
@pytest.mark.parametrize("structure", primitives.STRUCTURES)
def test_same_seed_same_generations(problem, structure):
    first, again, other = (_run(problem, seed, structure=structure) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert [g.iteration for g in first] == list(range(BUDGET.iterations + 1))


def test_the_best_never_gets_worse_and_counts_add_up(problem):
    judge = Judge([problem])
    generations = _run(problem, 4, judge=judge)
    fitness = [g.fitness for g in generations]
    assert fitness == sorted(fitness)
    assert all(g.mean <= g.fitness for g in generations)
    evaluations = [g.evaluations for g in generations]
    assert evaluations == sorted(evaluations)
    assert evaluations[0] >= BUDGET.population
    judged = judge.evaluations + judge.rejected + judge.duplicates
    assert judged >= BUDGET.population + 2 * BUDGET.iterations  # a child and a newcomer in every iteration


def test_the_reported_fitness_is_that_of_the_reported_genotype(problem):
    last = _run(problem, 5)[-1]
    genotype = genotypes.parse(last.best)
    assert Judge([problem]).judge(genotype).fitness == last.fitness
    scores = problem.evaluator.score(genotype, problem.configs)
    assert last.fitness == pytest.approx(ranking.fitness(scores, problem.accuracy))


def _search_for(planted, problem, space, *, seed, enough):
    """Search for a planted genotype by few configurations until the fitness is enough; return what was reached."""
    accuracy = problem.evaluator.score(genotypes.parse(planted), problem.configs)
    judge = Judge([dataclasses.replace(problem, accuracy=accuracy)])
    budget = EvolutionBudget(population=30, iterations=600)
    for state in search.evolve(judge, space, budget=budget, rng=np.random.default_rng(seed), genes=0.2):
        if state.fitness >= enough:
            break
    return state.fitness


def test_a_planted_optimum_is_found(problem):
    space = spaces.Space("sequential", ("W", "E", "O", "K"))
    planted = "sequential(E: frobenius, negate)"
    assert any(_search_for(planted, problem, space, seed=seed, enough=1 - 1e-9) > 1 - 1e-9 for seed in (6, 3))


def test_a_planted_optimum_of_two_branches_is_nearly_found(problem):
    space = spaces.Space("branched", ("K", "O", "T"))
    planted = "branched(product; O: sqrt; K: no_op; negate)"
    assert any(_search_for(planted, problem, space, seed=seed, enough=0.96) >= 0.96 for seed in (4, 5))


def test_a_planted_optimum_is_never_lost_by_a_population_that_starts_from_it(problem):
    for options in ({}, {"islands": 3}, {"diversity": False}):
        run = _run(problem, 0, known=[PLANTED], **options)
        assert run[0].fitness == run[-1].fitness == pytest.approx(1)


def test_constants_and_infinities_are_rejected_before_fitness(problem):
    judge = Judge([problem])
    assert judge.judge(genotypes.parse("sequential(W: abs, mean)")) is None  # no bits in it
    assert judge.judge(genotypes.parse("sequential(bW: exp, exp, pow2, pow2)")) is None  # overflows
    assert (judge.rejected, judge.evaluations) == (2, 0)


def test_equivalent_genotypes_are_evaluated_once(problem):
    judge = Judge([problem])
    texts = ("branched(sum; E: pow2, no_op; bW: abs, abs; no_op)", "branched(sum; bW: no_op, abs; E: pow2; mean)")
    one, two = (judge.judge(genotypes.parse(text)) for text in texts)
    assert (one.fitness, one.fingerprint) == (two.fitness, two.fingerprint)
    assert [str(one.genotype), str(two.genotype)] == list(texts)  # each keeps its genes
    assert (judge.evaluations, judge.duplicates) == (1, 1)
    unscreened = Judge([problem], screening=False)
    for text in ("sequential(E: abs)", "sequential(E: abs, abs)"):
        unscreened.judge(genotypes.parse(text))
    assert unscreened.evaluations == 2


def test_candidates_that_rank_alike_share_a_fingerprint(problem):
    judge = Judge([problem])
    texts = ("sequential(E: pow2, mean)", "sequential(E: var)", "branched(sum; E: pow2; E: pow2; no_op)")
    one, two, same = (judge.judge(genotypes.parse(text)) for text in texts)
    assert one.fingerprint == same.fingerprint != two.fingerprint


def test_formulas_that_are_no_sum_over_layers_may_be_refused(problem):
    judge = Judge([problem], separable=True)
    texts = ("sequential(P: negate)", "weakest sequential(K: negate)", "sequential(P: sum, negate)")
    assert [judge.judge(genotypes.parse(text)) is None for text in texts] == [True, True, False]
    assert Judge([problem]).judge(genotypes.parse(texts[0])) is not None


def test_formulas_that_fall_with_more_bits_may_be_refused(problem):
    texts = ("sequential(b: no_op)", "sequential(b: negate)", "branched(product; b: no_op; G: mean; no_op)")
    rising, falling, mixed = map(genotypes.parse, texts)  # the last by the sign of a layer's mean gradient
    steps = np.diff(problem.evaluator.scores(mixed), axis=1)
    assert (steps > 0).any()
    assert (steps < 0).any()
    judge = Judge([problem], separable=True, rising=True)
    assert judge.judge(rising) is not None
    assert judge.judge(falling) is None
    assert judge.judge(mixed) is None
    assert judge.rejected == 2
    assert Judge([problem], separable=True).judge(mixed) is not None


def test_no_member_of_a_population_ranks_like_another(problem):
    population = [Judge([problem]).judge(PLANTED)]
    twin = dataclasses.replace(population[0], genotype=genotypes.KNOWN["EMQ"])
    other = Judge([problem]).judge(genotypes.KNOWN["bit sum"])
    population.append(other)
    search._enter(population, [twin, None])
    assert population[0].genotype == PLANTED
    assert population[1] == other


def test_the_control_spends_the_same_evaluations(problem):
    judge = Judge([problem])
    space = spaces.Space("branched")
    control = list(search.random_search(judge, space, evaluations=50, rng=np.random.default_rng(0)))
    assert control[-1].evaluations == judge.evaluations == 50
    fitness = [g.fitness for g in control]
    assert fitness == sorted(fitness)


def test_fitness_over_several_problems_and_with_a_price_for_operations(problem):
    other = dataclasses.replace(problem, accuracy=problem.evaluator.score(genotypes.KNOWN["SQNR"], problem.configs))
    genotype = genotypes.parse("sequential(E: pow2, negate)")
    alone = [Judge([one]).judge(genotype).fitness for one in (problem, other)]
    for across, expected in (
        ("mean", np.mean(alone)),
        ("worst", min(alone)),
        ("stable", np.mean(alone) - np.std(alone)),
    ):
        judge = Judge([problem, other], across)
        assert judge.judge(genotype).fitness == pytest.approx(expected)
    charged = Judge([problem], penalty=0.01).judge(genotype).fitness
    assert charged == pytest.approx(alone[0] - 0.01 * 3)  # an input and two unaries


def test_fitness_inside_bins_of_size(problem):
    sizes = problem.configs.sum(axis=1)
    genotype = genotypes.KNOWN["SQNR"]
    scores = problem.evaluator.score(genotype, problem.configs)
    binned = problem.inside_sizes(sizes, 4)
    groups = np.array_split(np.argsort(sizes, kind="stable"), 4)
    expected = np.mean([ranking.spearman(scores[group], problem.accuracy[group]) for group in groups])
    assert Judge([binned]).judge(genotype).fitness == pytest.approx(expected)


def test_resampled_problems_hold_half_the_configurations(problem):
    halves = problem.resampled(3, rng=np.random.default_rng(0))
    rows = [{tuple(row) for row in half.configs} for half in halves]
    assert [len(half.configs) for half in halves] == [40, 40, 40]
    assert rows[0] != rows[1]
    for half in halves:
        np.testing.assert_allclose(half.evaluator.score(PLANTED, half.configs), half.accuracy)


def test_fronts_and_crowding_by_hand():
    values = np.array([[1, 5], [2, 2], [5, 1], [3, 3], [6, 6]])
    fronts = search.non_dominated_fronts(values)
    assert [front.tolist() for front in fronts] == [[0, 1, 2], [3], [4]]
    np.testing.assert_array_equal(search._crowding(values[:3]), [np.inf, 2, np.inf])


@pytest.mark.slow
def test_three_goals_keep_what_nobody_beats(problem):
    def cost(genotype):
        return float("T" in genotype.inputs)

    run = list(
        search.evolve_front(
            Judge([problem]),
            spaces.Space("branched"),
            budget=EvolutionBudget(population=20, iterations=400),
            rng=np.random.default_rng(0),
            cost=cost,
        )
    )
    assert len(run) == 21
    judge = Judge([problem])
    members = [judge.judge(genotypes.parse(text)) for text in run[-1].front]
    goals = [(-m.fitness, cost(m.genotype), m.genotype.complexity) for m in members]
    for one, two in itertools.permutations(goals, 2):
        assert not (all(a <= b for a, b in zip(one, two, strict=True)) and one != two)
    assert run[-1].fitness == max(member.fitness for member in members)


def test_the_log_keeps_improvements_and_the_end(problem):
    generations = _run(problem, 6)
    kept = search.improvements(iter(generations))
    assert kept[0] == generations[0]
    assert kept[-1] == generations[-1]
    gains = [g.fitness for g in kept[:-1]]
    assert gains == sorted(set(gains))


def test_a_stopped_run_goes_on_from_its_journal(problem, tmp_path, monkeypatch):
    path, run = tmp_path / "run.jsonl", {"run": "evolution 7"}
    whole = _run(problem, 7)

    def resumed():
        return Judge([problem], journal=Judgements(Journal(path, run)))

    space = spaces.Space("branched")
    stopped = search.evolve(resumed(), space, budget=BUDGET, rng=np.random.default_rng(7))
    for _ in range(15):
        next(stopped)
    written = path.read_text()
    path.write_text(written + '{"genotype": "seq')  # killed in the middle of a line
    computed = []
    evaluate = Judge._evaluate
    monkeypatch.setattr(Judge, "_evaluate", lambda self, g: computed.append(str(g)) or evaluate(self, g))
    assert _run(problem, 7, judge=resumed()) == whole
    known = [json.loads(line)["genotype"] for line in written.splitlines()[1:]]
    assert known
    assert not set(known) & set(computed)
    computed.clear()
    assert _run(problem, 7, judge=resumed()) == whole
    assert not computed  # now it is all in the journal


def test_too_few_configurations_and_members_are_refused(problem):
    with pytest.raises(InvalidParameterError, match="30 configurations or more, got 20"):
        Problem(problem.evaluator, problem.configs[:20], problem.accuracy[:20])
    with pytest.raises(InvalidParameterError, match="5 islands of 12 have 2 members"):
        _run(problem, 0, islands=5)
    blank = dataclasses.replace(problem.evaluator._statistics, trace=np.full(6, np.nan))
    empty = dataclasses.replace(problem, evaluator=Evaluator(blank))
    with pytest.raises(InvalidParameterError, match="none of 400 random genotypes is valid"):
        Judge([empty]).newcomer(spaces.Space("branched", ("T",)), np.random.default_rng(0))
