"""Allocation without a proof, against brute force and against the exact answer."""

import numpy as np
import pytest
from test_allocation import CHOICES, all_configs, random_problem

from emq_lib.allocation import approximate
from emq_lib.allocation.exact import allocate
from emq_lib.core.costs import CostTable, gather
from emq_lib.core.errors import InfeasibleBudgetError, InvalidScoreError


def _fitting(configs, costs, budgets):
    return np.all([costs[name].total(configs, CHOICES) <= budget for name, budget in budgets.items()], axis=0)


def test_random_configurations_use_the_budget_up():
    rng = np.random.default_rng(0)
    size = random_problem(0, 9)[1]["size"]
    smallest_step = np.diff(size.table, axis=1).min()
    drawn = set()
    for _ in range(50):
        budget = rng.uniform(size.smallest, size.fixed + size.table[:, -1].sum())
        config = approximate.random_within(size, budget, CHOICES, rng=rng)
        cost = size.total([config], CHOICES)[0]
        assert cost <= budget
        left = budget - cost
        raisable = [s for s, b in enumerate(config) if b < 4 and size.table[s, b - 1] - size.table[s, b - 2] <= left]
        assert not raisable
        drawn.add(config)
    assert smallest_step > 0
    assert len(drawn) > 30


@pytest.mark.parametrize("seed", range(8))
def test_local_search_finds_the_best_of_a_score_with_pairs(seed):
    scores, costs, budgets = random_problem(seed, 7)
    pairs = np.random.default_rng(seed).normal(size=(7, 7)) * np.abs(scores).mean()

    def score(configs):
        low = (np.asarray(configs) == 2).astype(float)
        return gather(scores, configs, CHOICES) + np.einsum("ns,st,nt->n", low, pairs, low)

    configs = all_configs(7)
    best = score(configs[_fitting(configs, costs, budgets)]).max()
    found = approximate.allocate_locally(score, costs, budgets, CHOICES, rng=np.random.default_rng(seed), pool=50)
    assert _fitting(np.array([found.bits]), costs, budgets).all()
    assert found.score == pytest.approx(score(np.array([found.bits]))[0])
    assert found.score == pytest.approx(best, rel=1e-9)
    assert not found.optimal
    assert found.gap == np.inf


@pytest.mark.slow
def test_local_search_is_never_worse_than_where_it_starts():
    scores, costs, budgets = random_problem(3, 40)
    exact = allocate(scores, costs, budgets, CHOICES)

    def score(configs):
        return gather(scores, configs, CHOICES)

    rng = np.random.default_rng(0)
    found = approximate.allocate_locally(score, costs, budgets, CHOICES, rng=rng, starts=[exact.bits], pool=10)
    assert found.bits == exact.bits


@pytest.mark.parametrize("seed", range(6))
def test_rounding_the_relaxed_program_keeps_the_budgets_and_loses_little(seed):
    scores, costs, budgets = random_problem(seed, 18)
    scores = -np.sort(-scores, axis=1)[:, ::-1]  # rises with bits
    found = approximate.allocate_rounded(scores, costs, budgets, CHOICES)
    exact = allocate(scores, costs, budgets, CHOICES)
    assert _fitting(np.array([found.bits]), costs, budgets).all()
    assert found.score <= exact.score + 1e-12
    assert found.score == pytest.approx(gather(scores, [found.bits], CHOICES)[0])


@pytest.mark.slow
def test_mutants_stay_near_their_root_and_the_best_one_is_taken():
    scores, costs, budgets = random_problem(1, 12)
    root = (2,) * 12

    def score(configs):
        return gather(scores, configs, CHOICES)

    found = approximate.allocate_by_mutation(score, root, costs, budgets, CHOICES, rng=np.random.default_rng(0))
    assert 1 <= sum(bits != 2 for bits in found.bits) <= 3
    configs = all_configs(12)
    near = configs[(configs != 2).sum(axis=1) <= 3]
    assert found.score == pytest.approx(score(near[_fitting(near, costs, budgets)]).max())


def test_what_cannot_be_met_or_scored_is_named():
    scores, costs, budgets = random_problem(0, 6)
    rng = np.random.default_rng(0)

    def score(configs):
        return gather(scores, configs, CHOICES)

    tight = {"size": costs["size"].smallest - 1}
    with pytest.raises(InfeasibleBudgetError, match="the smallest has"):
        approximate.allocate_locally(score, costs, tight, CHOICES, rng=rng)
    with pytest.raises(InfeasibleBudgetError, match="smaller root"):
        approximate.allocate_by_mutation(score, (4,) * 6, costs, {"size": costs["size"].smallest}, CHOICES, rng=rng)
    with pytest.raises(InvalidScoreError, match="NaN or infinity"):
        approximate.allocate_locally(lambda c: np.full(len(c), np.nan), costs, budgets, CHOICES, rng=rng)
    cost = CostTable("price", "units", 0.0, np.array([[0.0, 5.0, 9.0]] * 2))
    with pytest.raises(InfeasibleBudgetError):
        approximate.allocate_rounded(np.zeros((2, 3)), {"price": cost}, {"price": -1.0}, CHOICES)
