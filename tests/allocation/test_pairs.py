"""Allocation by pairs against every configuration there is, and what is said without a proof."""

import itertools

import numpy as np
import pytest

from emq_lib.allocation.exact import allocate
from emq_lib.allocation.pairs import allocate_pairs
from emq_lib.core.costs import CostTable
from emq_lib.core.errors import InfeasibleBudgetError, InvalidBitsError, InvalidParameterError, InvalidScoreError

CHOICES = (2, 3, 4)


def problem(seed, slots=5, choices=CHOICES):
    rng = np.random.default_rng(seed)
    shape = (slots, len(choices))
    matrix = rng.normal(size=(slots * len(choices),) * 2)
    costs = {
        "size": CostTable("size", "bytes", 7.0, np.sort(rng.integers(1, 50, shape), axis=1).astype(float)),
        "BOPs": CostTable("BOPs", "bit operations", 0.0, np.sort(rng.random(shape), axis=1)),
    }
    return matrix, costs


def every(matrix, costs, slots=5, choices=CHOICES):
    """Return all configurations, the sum of the matrix over their pairs by plain loops, and their costs."""
    configs = list(itertools.product(range(len(choices)), repeat=slots))
    scores = []
    for config in configs:
        options = [slot * len(choices) + index for slot, index in enumerate(config)]
        scores.append(sum(matrix[i, j] for i in options for j in options))
    totals = {
        name: np.array([cost.fixed + sum(cost.table[s, i] for s, i in enumerate(config)) for config in configs])
        for name, cost in costs.items()
    }
    return configs, np.array(scores), totals


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("names", [("size",), ("BOPs",), ("size", "BOPs")])
def test_no_configuration_within_the_budgets_scores_higher(seed, names):
    matrix, costs = problem(seed)
    configs, scores, totals = every(matrix, costs)
    budgets = {name: float(np.quantile(totals[name], 0.3)) for name in names}
    fits = np.all([totals[name] <= budget for name, budget in budgets.items()], axis=0)
    if not fits.any():
        with pytest.raises(InfeasibleBudgetError):
            allocate_pairs(matrix, costs, budgets, CHOICES)
        return
    found = allocate_pairs(matrix, costs, budgets, CHOICES)
    assert found.optimal
    assert found.gap == 0
    assert found.score == pytest.approx(scores[fits].max())
    index = configs.index(tuple(CHOICES.index(bits) for bits in found.bits))
    assert fits[index]
    assert found.score == pytest.approx(scores[index])
    assert found.costs == pytest.approx({name: totals[name][index] for name in costs})


def test_a_matrix_without_pairs_is_a_table():
    matrix, costs = problem(3)
    table = np.diag(matrix).reshape(5, 3)
    for budget in (60.0, 90.0, 1_000.0):
        one, two = (
            found(scores, costs, {"size": budget}, CHOICES)
            for found, scores in ((allocate_pairs, np.diag(np.diag(matrix))), (allocate, table))
        )
        assert one.bits == two.bits
        assert one.score == pytest.approx(two.score)


def test_only_what_two_options_are_worth_together_counts():
    matrix, costs = problem(4)
    lopsided = matrix + np.triu(np.full_like(matrix, 5.0), 1) - np.tril(np.full_like(matrix, 5.0), -1)
    one, two = (allocate_pairs(each, costs, {"size": 80.0}, CHOICES) for each in (matrix, lopsided))
    assert one.bits == two.bits
    assert one.score == pytest.approx(two.score)


def test_without_time_for_a_proof_the_gap_holds():
    """The local answer stays, and what it may lack is no less than what it lacks."""
    matrix, costs = problem(9, slots=14)
    best = allocate_pairs(matrix, costs, {"size": 250.0}, CHOICES, time_limit=None)
    hasty = allocate_pairs(matrix, costs, {"size": 250.0}, CHOICES, time_limit=1e-3)
    assert best.optimal
    assert hasty.costs["size"] <= 250.0
    assert hasty.score <= best.score + 1e-9
    assert hasty.optimal or hasty.score + hasty.gap >= best.score - 1e-9


def test_the_same_program_has_the_same_answer():
    matrix, costs = problem(5)
    one, two = (allocate_pairs(matrix * scale, costs, {"size": 90.0}, CHOICES) for scale in (1.0, 1e-9))
    assert one.bits == two.bits


MATRIX, COSTS = problem(0)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ((MATRIX[:, :3], COSTS, {"size": 90.0}, CHOICES), InvalidScoreError),
        ((MATRIX[:4, :4], COSTS, {"size": 90.0}, CHOICES), InvalidScoreError),
        ((MATRIX[:6, :6], COSTS, {"size": 90.0}, CHOICES), InvalidParameterError),
        ((MATRIX * np.nan, COSTS, {"size": 90.0}, CHOICES), InvalidScoreError),
        ((np.zeros((0, 0)), COSTS, {"size": 90.0}, CHOICES), InvalidScoreError),
        ((MATRIX.tolist()[0], COSTS, {"size": 90.0}, CHOICES), InvalidScoreError),
        (("matrix", COSTS, {"size": 90.0}, CHOICES), InvalidScoreError),
        ((MATRIX, COSTS, {"weight": 90.0}, CHOICES), InvalidParameterError),
        ((MATRIX, COSTS, {"size": np.nan}, CHOICES), InvalidParameterError),
        ((MATRIX, COSTS, {"size": 1.0}, CHOICES), InfeasibleBudgetError),
        ((MATRIX, COSTS, {"size": 90.0}, (4, 3, 2)), InvalidBitsError),
        ((MATRIX, None, {"size": 90.0}, CHOICES), InvalidParameterError),
    ],
)
def test_bad_input_is_named(call, error):
    with pytest.raises(error):
        allocate_pairs(*call)


@pytest.mark.parametrize("limit", [0, -1, np.nan, "long", np.inf])
def test_time_limits_that_are_none(limit):
    with pytest.raises(InvalidParameterError, match="time_limit"):
        allocate_pairs(MATRIX, COSTS, {"size": 90.0}, CHOICES, time_limit=limit)
