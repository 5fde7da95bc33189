"""Evolution: determinism, invariants of the population, screening, a planted optimum, the control."""

import numpy as np
import pytest
from test_search_space import CHOICES, make_statistics

from emq_lib import evolution, search_space
from emq_lib.costs import gather
from emq_lib.errors import InvalidParameterError
from emq_lib.profiles import EvolutionBudget

BUDGET = EvolutionBudget(population=12, iterations=40)
SHAPES = tuple((3 + i % 3, 6) for i in range(6))


@pytest.fixture(scope="module")
def problem():
    """An evaluator, configurations, and accuracies that are exactly the scores of a known genotype."""
    evaluator = search_space.Evaluator(make_statistics(3, SHAPES))
    configs = np.random.default_rng(0).choice(CHOICES, size=(80, 6)).astype(np.int8)
    planted = search_space.parse("branched(product; H: negate, mean; E: pow2, mean)")
    return evaluator, configs, gather(evaluator.table(planted), configs, CHOICES)


def _judge(problem, **options):
    evaluator, configs, accuracy = problem
    return evolution.Judge(evaluator, configs, accuracy, CHOICES, **options)


def _run(problem, seed, *, structure="branched", budget=BUDGET, **options):
    rng = np.random.default_rng(seed)
    return list(evolution.evolve(_judge(problem), structure=structure, budget=budget, rng=rng, **options))


@pytest.mark.parametrize("structure", search_space.STRUCTURES)
def test_same_seed_same_generations(problem, structure):
    first, again, other = (_run(problem, seed, structure=structure) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert [g.iteration for g in first] == list(range(BUDGET.iterations + 1))


def test_the_best_never_gets_worse_and_counts_add_up(problem):
    generations = _run(problem, 4)
    fitness = [g.fitness for g in generations]
    assert fitness == sorted(fitness)
    assert all(g.mean <= g.fitness for g in generations)
    evaluations = [g.evaluations for g in generations]
    assert evaluations == sorted(evaluations)
    assert evaluations[0] >= BUDGET.population


def test_the_reported_fitness_is_that_of_the_reported_genotype(problem):
    last = _run(problem, 5)[-1]
    assert _judge(problem).judge(search_space.parse(last.best)).fitness == last.fitness


def test_a_planted_optimum_is_found(problem):
    budget = EvolutionBudget(population=30, iterations=400)
    assert max(_run(problem, seed, budget=budget)[-1].fitness for seed in range(3)) > 0.98


def test_constants_and_infinities_are_rejected_before_fitness(problem):
    judge = _judge(problem)
    assert judge.judge(search_space.parse("linear(W: abs, mean)")) is None  # no bits in it
    assert judge.judge(search_space.parse("linear(bW: exp, exp, pow2, pow2)")) is None  # overflows
    assert (judge.rejected, judge.evaluations) == (2, 0)


def test_equivalent_genotypes_are_evaluated_once(problem):
    judge = _judge(problem)
    one = judge.judge(search_space.parse("branched(sum; E: pow2, no_op; bW: abs, abs)"))
    two = judge.judge(search_space.parse("branched(sum; bW: no_op, abs; E: pow2, mean)"))
    assert one is two
    assert (judge.evaluations, judge.duplicates) == (1, 1)
    unscreened = _judge(problem, screening=False)
    for text in ("linear(E: abs)", "linear(E: abs, abs)"):
        unscreened.judge(search_space.parse(text))
    assert unscreened.evaluations == 2


def test_candidates_that_rank_alike_share_a_fingerprint(problem):
    judge = _judge(problem)
    one, two = (judge.judge(search_space.parse(f"linear(E: {unaries})")) for unaries in ("pow2, mean", "var, mean"))
    same = judge.judge(search_space.parse("branched(sum; E: pow2, mean; E: pow2, mean)"))
    assert one.fingerprint == same.fingerprint != two.fingerprint


def test_the_control_spends_the_same_evaluations(problem):
    judge = _judge(problem)
    control = list(evolution.random_search(judge, structure="branched", evaluations=50, rng=np.random.default_rng(0)))
    assert control[-1].evaluations == judge.evaluations == 50
    fitness = [g.fitness for g in control]
    assert fitness == sorted(fitness)


def test_the_log_keeps_improvements_and_the_end(problem):
    generations = _run(problem, 6)
    kept = evolution.improvements(iter(generations))
    assert kept[0] == generations[0]
    assert kept[-1] == generations[-1]
    gains = [g.fitness for g in kept[:-1]]
    assert gains == sorted(set(gains))


def test_too_few_configurations_are_refused(problem):
    evaluator, configs, accuracy = problem
    with pytest.raises(InvalidParameterError, match="30 configurations or more, got 20"):
        evolution.Judge(evaluator, configs[:20], accuracy[:20], CHOICES)
