"""Allocation against brute force over all configurations, and its answers to impossible wishes."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emq_lib.allocation.exact import (
    Allocation,
    allocate,
    allocate_greedy,
    budget_for_average_bits,
    pareto_front,
    relaxation,
    shadow_prices,
)
from emq_lib.core.costs import CostTable, gather
from emq_lib.core.errors import InfeasibleBudgetError, InvalidParameterError, InvalidScoreError, UnsolvedAllocationError

CHOICES = (2, 3, 4)


def random_costs(slots: int, choices: tuple[int, ...], *, rng: np.random.Generator) -> dict[str, CostTable]:
    """Draw a size in whole bytes, and BOPs, whose sums exceed 2^31."""
    parameters, macs = rng.integers(16, 50_000, slots), rng.integers(10_000, 50_000_000, slots)
    bits = np.array(choices, dtype=np.float64)
    return {
        "size": CostTable("size", "bytes", 577.0, np.ceil(parameters[:, None] * bits / 8)),
        "BOPs": CostTable("BOPs", "bit operations", 64_000.0, macs[:, None] * bits * 8),
    }


def random_problem(
    seed: int, slots: int, choices: tuple[int, ...] = CHOICES, *, spread: float = 1.0, tightness: float = 0.4
) -> tuple[np.ndarray, dict[str, CostTable], dict[str, float]]:
    """Draw errors that shrink about fourfold per bit, over `spread` powers of ten, and two budgets."""
    rng = np.random.default_rng(seed)
    costs = random_costs(slots, choices, rng=rng)
    magnitude = 10 ** rng.uniform(-spread, spread, (slots, 1))
    scores = -magnitude * 4.0 ** -np.array(choices) * rng.uniform(0.7, 1.4, (slots, len(choices)))
    budgets = {}
    for name, cost in costs.items():
        largest = cost.fixed + cost.table.max(axis=1).sum()
        budgets[name] = cost.smallest + tightness * rng.uniform(0.5, 1.5) * (largest - cost.smallest)
    return scores, costs, budgets


def all_configs(slots: int, choices: tuple[int, ...] = CHOICES) -> np.ndarray:
    return np.array(list(itertools.product(choices, repeat=slots)), dtype=np.int8)


def best_by_brute_force(scores, costs, budgets, choices=CHOICES) -> float | None:
    configs = all_configs(len(scores), choices)
    fits = np.ones(len(configs), dtype=bool)
    for name, budget in budgets.items():
        fits &= costs[name].total(configs, choices) <= budget
    return gather(scores, configs[fits], choices).max() if fits.any() else None


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.5, 6.0])
@pytest.mark.parametrize("slots", [6, 7])
def test_no_configuration_within_two_budgets_scores_higher(slots, spread):
    for seed in range(25):
        scores, costs, budgets = random_problem(seed, slots, spread=spread)
        allocation = allocate(scores, costs, budgets, CHOICES)
        best = best_by_brute_force(scores, costs, budgets)
        assert allocation.score == pytest.approx(best, rel=1e-12)
        assert allocation.optimal
        assert allocation.gap <= 1e-9 * abs(best)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    table=st.lists(st.tuples(*[st.integers(-30, 30)] * 3), min_size=1, max_size=6),
    first=st.lists(st.tuples(*[st.integers(0, 40)] * 3), min_size=6, max_size=6),
    second=st.lists(st.tuples(*[st.integers(-20, 40)] * 3), min_size=6, max_size=6),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_small_problem_agrees_with_brute_force(table, first, second, shares):
    """Costs need not grow with the bits, scores neither; ties, zero slack and joint conflicts all occur."""
    scores = np.array(table, dtype=np.float64)
    costs, budgets = {}, {}
    for name, rows, share in zip(("first", "second"), (first, second), shares, strict=True):
        cost = CostTable(name, "units", 5.0, np.array(rows[: len(table)], dtype=np.float64))
        costs[name] = cost
        budgets[name] = cost.smallest + np.floor(share * (cost.table.max(axis=1) - cost.table.min(axis=1)).sum())
    best = best_by_brute_force(scores, costs, budgets)
    if best is None:
        with pytest.raises(InfeasibleBudgetError, match="not all together"):
            allocate(scores, costs, budgets, CHOICES)
        return
    allocation = allocate(scores, costs, budgets, CHOICES)
    assert allocation.score == best
    for name, budget in budgets.items():
        assert allocation.costs[name] == costs[name].total([allocation.bits], CHOICES)[0]
        assert allocation.costs[name] <= budget


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 3, 6])
def test_budget_is_kept_where_the_solver_tolerance_would_not_keep_it(slots):
    """Costs that differ by a billionth are the same to HiGHS; a total over the budget must not be returned even so."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        cost = CostTable("count", "units", 0.0, np.arange(3) * (10_000_000_000.0 + rng.integers(0, 3, (slots, 1))))
        scores, budgets = np.arange(3) * rng.uniform(1, 2, (slots, 1)), {"count": 10_000_000_000.0 * slots}
        allocation = allocate(scores, {"count": cost}, budgets, CHOICES)
        assert allocation.costs["count"] <= budgets["count"]
        best = best_by_brute_force(scores, {"count": cost}, budgets)
        assert allocation.score <= best <= allocation.score + allocation.gap + 1e-9
        if allocation.optimal:
            assert allocation.score == pytest.approx(best, rel=1e-9)


def test_budget_equal_to_a_uniform_configuration_admits_it():
    """Shares of parameters do not sum to one in floating point; a budget of 3 bits still admits uniform 3."""
    parameters = np.array([743, 846, 116, 169, 463, 562, 764, 374, 45, 222])
    average = CostTable("average bits", "bits", 0.0, (parameters / parameters.sum())[:, None] * np.array(CHOICES))
    scores = np.tile([-100.0, -1.0, -0.5], (10, 1))
    assert average.total([[3] * 10], CHOICES)[0] > 3.0
    assert allocate(scores, {"average bits": average}, {"average bits": 3.0}, CHOICES).bits == (3,) * 10


def test_without_a_budget_every_layer_takes_its_best_choice():
    scores, costs, _ = random_problem(0, 9)
    allocation = allocate(scores, costs, {}, CHOICES)
    assert allocation.bits == tuple(np.array(CHOICES)[scores.argmax(axis=1)])
    assert set(allocation.costs) == {"size", "BOPs"}


def test_smallest_budget_gives_the_smallest_network():
    scores, costs, _ = random_problem(1, 9)
    allocation = allocate(scores, costs, {"size": costs["size"].smallest}, CHOICES)
    assert allocation.bits == (2,) * 9


@pytest.mark.parametrize("seed", range(4))
def test_shift_and_scale_of_scores_do_not_matter(seed):
    scores, costs, budgets = random_problem(seed, 12)
    bits = allocate(scores, costs, budgets, CHOICES).bits
    shifted = 1e-9 * scores + np.random.default_rng(seed).normal(size=(12, 1)) * 1e-8
    assert allocate(shifted, costs, budgets, CHOICES).bits == bits
    assert allocate(1e9 * scores, costs, budgets, CHOICES).bits == bits


def test_ties_are_broken_the_same_way_every_time():
    scores = np.tile([0.0, 1.0, 2.0], (12, 1))
    cost = CostTable("bits", "bits", 0.0, np.tile([2.0, 3.0, 4.0], (12, 1)))
    found = {allocate(scores, {"bits": cost}, {"bits": 31}, CHOICES).bits for _ in range(5)}
    assert len(found) == 1
    assert sum(found.pop()) == 31


def test_budget_below_the_smallest_network_says_what_can_be_reached():
    scores, costs, budgets = random_problem(2, 8)
    smallest = int(costs["size"].smallest)
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate(scores, costs, budgets | {"size": smallest - 1}, CHOICES)
    message = str(caught.value)
    assert f"No configuration fits size <= {smallest - 1}." in message
    assert f"size of at least {smallest} bytes" in message
    assert f"BOPs of at least {int(costs['BOPs'].smallest)} bit operations" in message
    assert "Raise the budget" in message


def test_conflicting_budgets_say_what_each_needs_given_the_other():
    """A latency that falls with the bits: either budget alone can be met, both cannot."""
    size = CostTable("size", "bytes", 0.0, np.tile([200.0, 300.0, 400.0], (5, 1)))
    latency = CostTable("latency", "ms", 1.0, np.tile([9.0, 6.0, 4.0], (5, 1)))
    configs = all_configs(5)
    sizes, latencies = size.total(configs, CHOICES), latency.total(configs, CHOICES)
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate(np.zeros((5, 3)), {"size": size, "latency": latency}, {"size": 1_200, "latency": 30}, CHOICES)
    message = str(caught.value)
    assert "not all together" in message
    assert f"size needs at least {sizes[latencies <= 30].min():.0f} bytes" in message
    assert f"latency needs at least {latencies[sizes <= 1_200].min():.0f} ms" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_name_their_slot(bad):
    scores, costs, budgets = random_problem(0, 4)
    scores[2, 1] = bad
    with pytest.raises(InvalidScoreError, match=r"slot 2 \(layer3\.0\.conv1\) at 3 bits"):
        allocate(scores, costs, budgets, CHOICES, layers=["a", "b", "layer3.0.conv1", "d"])
    with pytest.raises(InvalidScoreError, match="slot 2 at 3 bits"):
        allocate_greedy(scores, costs, budgets, CHOICES)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (4,), (4, 3, 1), (0, 3)])
def test_scores_of_the_wrong_shape_are_refused(shape):
    _, costs, budgets = random_problem(0, 4)
    with pytest.raises(InvalidScoreError, match="got shape"):
        allocate(np.zeros(shape), costs, budgets, CHOICES, layers=["a", "b", "c", "d"])


def test_costs_and_budgets_are_checked():
    scores, costs, budgets = random_problem(0, 4)
    with pytest.raises(InvalidParameterError, match="latency"):
        allocate(scores, costs, {"latency": 3.0}, CHOICES)
    with pytest.raises(InvalidParameterError, match="must be a finite number"):
        allocate(scores, costs, budgets | {"size": float("nan")}, CHOICES)
    with pytest.raises(InvalidParameterError, match="shape"):
        allocate(scores[:3], costs, budgets, CHOICES)
    odd = CostTable("odd", "units", 0.0, np.full((4, 3), np.nan))
    with pytest.raises(InvalidParameterError, match="finite table"):
        allocate(scores, costs | {"odd": odd}, budgets, CHOICES)


def test_time_limit_never_claims_an_optimum():
    scores, costs, budgets = random_problem(5, 53, (2, 3, 4, 5, 6, 7, 8))
    try:
        hurried = allocate(scores, costs, budgets, (2, 3, 4, 5, 6, 7, 8), time_limit=1e-6)
    except UnsolvedAllocationError:
        return
    best = allocate(scores, costs, budgets, (2, 3, 4, 5, 6, 7, 8))
    assert hurried.score <= best.score <= hurried.score + hurried.gap
    assert not hurried.optimal
    assert all(hurried.costs[name] <= budgets[name] for name in budgets)


def test_greedy_keeps_the_budgets_and_never_beats_the_optimum():
    losses = []
    for seed in range(20):
        scores, costs, budgets = random_problem(seed, 12)
        greedy, best = allocate_greedy(scores, costs, budgets, CHOICES), allocate(scores, costs, budgets, CHOICES)
        assert all(greedy.costs[name] <= budgets[name] for name in budgets)
        assert best.score <= greedy.score + greedy.gap
        assert not greedy.optimal
        losses.append(best.score - greedy.score)
    assert min(losses) >= 0
    assert max(losses) > 0


def test_greedy_follows_the_best_gain_per_cost():
    """By hand: budget 5 above the start of 4. Rates 3/1, then 2/2, then 4/4 no longer fits, 1/1 does."""
    scores = np.array([[0.0, 3.0, 4.0], [0.0, 2.0, 3.0], [0.0, 4.0, 8.0]])
    table = np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 5.0], [2.0, 6.0, 10.0]])
    cost = {"cost": CostTable("cost", "units", 0.0, table)}
    greedy = allocate_greedy(scores, cost, {"cost": 9.0}, CHOICES)
    assert greedy.bits == (4, 3, 2)
    assert greedy.score == 6.0


@pytest.mark.slow
def test_front_is_the_front_of_all_configurations():
    scores, costs, _ = random_problem(3, 6)
    size, configs = costs["size"], all_configs(6)
    totals, values = size.total(configs, CHOICES), gather(scores, configs, CHOICES)
    front = pareto_front(scores, size, CHOICES, points=50)
    assert front[0].bits == (2,) * 6
    assert front[-1].score == pytest.approx(values.max(), rel=1e-12)
    for one in front:
        better = values > one.score + 1e-12
        assert totals[better].min(initial=np.inf) > one.costs["size"]
    assert all(np.diff([one.costs["size"] for one in front]) > 0)
    assert all(np.diff([one.score for one in front]) > 0)
    for budget in np.linspace(totals.min(), totals.max(), 50):
        reached = max(one.score for one in front if one.costs["size"] <= budget)
        assert reached == pytest.approx(values[totals <= budget].max(), rel=1e-12)


def test_front_of_two_points_is_its_ends():
    scores, costs, _ = random_problem(4, 6)
    front = pareto_front(scores, costs["size"], CHOICES, points=2)
    assert [one.bits for one in front] == [(2,) * 6, tuple(np.array(CHOICES)[scores.argmax(axis=1)])]
    with pytest.raises(InvalidParameterError, match="2 or more"):
        pareto_front(scores, costs["size"], CHOICES, points=1)


def test_average_bits_are_a_budget_on_the_searchable_weights():
    """At 2.5 bits: an eighth of 2.5 bits per parameter, plus what is fixed."""
    parameters = np.array([144, 2304, 4608, 36864])
    size = CostTable("size", "bytes", 1_000.0, parameters[:, None] * np.array(CHOICES) / 8)
    average = CostTable("average bits", "bits", 0.0, (parameters / parameters.sum())[:, None] * np.array(CHOICES))
    budget = budget_for_average_bits(2.5, size, CHOICES)
    assert budget == 1_000 + 2.5 * parameters.sum() / 8
    assert budget_for_average_bits(4, size, CHOICES) == size.total([[4] * 4], CHOICES)[0]
    scores = random_problem(0, 4)[0]
    costs = {"size": size, "average bits": average}
    by_size = allocate(scores, costs, {"size": budget}, CHOICES)
    assert by_size.bits == allocate(scores, costs, {"average bits": 2.5}, CHOICES).bits
    assert by_size.costs["average bits"] == pytest.approx(np.average(by_size.bits, weights=parameters), rel=1e-12)
    with pytest.raises(InfeasibleBudgetError, match="smallest choice is 2"):
        budget_for_average_bits(1.9, size, CHOICES)


def test_solver_writes_nothing_to_standard_output(capfd):
    for seed in range(30):
        scores, costs, budgets = random_problem(seed, 18)
        allocate(scores, costs, {"size": budgets["size"]}, CHOICES)
    print("still here")
    assert capfd.readouterr().out == "still here\n"


@pytest.mark.parametrize(("slots", "choices"), [(18, (2, 3, 4)), (53, (2, 3, 4, 5, 6, 7, 8))])
def test_networks_of_real_size_are_solved_to_proven_optimality(slots, choices, record_property):
    """Seconds are recorded in the report, not asserted: they belong to the machine."""
    seconds = []
    for seed in range(5):
        scores, costs, budgets = random_problem(seed, slots, choices)
        started = time.perf_counter()
        allocation = allocate(scores, costs, budgets, choices)
        seconds.append(time.perf_counter() - started)
        assert isinstance(allocation, Allocation)
        assert allocation.optimal
        assert allocation.gap <= 1e-9 * abs(allocation.score)
        assert all(allocation.costs[name] <= budgets[name] for name in budgets)
    record_property("median_seconds", float(np.median(seconds)))


@pytest.mark.parametrize("seed", range(6))
def test_slots_of_a_group_share_their_width_and_nothing_better_does(seed):
    scores, costs, budgets = random_problem(seed, 7)
    groups = [(0, 3), (2, 5, 6)]
    found = allocate(scores, costs, budgets, CHOICES, groups=groups)
    configs = all_configs(7)
    fits = np.ones(len(configs), dtype=bool)
    for group in groups:
        fits &= (configs[:, list(group)] == configs[:, [group[0]]]).all(axis=1)
    for name, budget in budgets.items():
        fits &= costs[name].total(configs, CHOICES) <= budget
    assert tuple(found.bits) in set(map(tuple, configs[fits].tolist()))
    assert found.score == pytest.approx(gather(scores, configs[fits], CHOICES).max(), rel=1e-12)
    assert found.costs == {name: pytest.approx(cost.total([found.bits], CHOICES)[0]) for name, cost in costs.items()}


@pytest.mark.parametrize("groups", [[(0, 1), (1, 2)], [(0, 9)]])
def test_groups_that_overlap_or_name_no_slot_are_refused(groups):
    scores, costs, budgets = random_problem(0, 5)
    with pytest.raises(InvalidParameterError, match="once at most"):
        allocate(scores, costs, budgets, CHOICES, groups=groups)


@pytest.mark.parametrize("seed", range(5))
def test_a_shadow_price_is_what_a_little_more_budget_brings(seed):
    scores, costs, budgets = random_problem(seed, 12)
    prices = shadow_prices(scores, costs, budgets, CHOICES)
    _, before, _ = relaxation(scores, costs, budgets, CHOICES)
    for name, price in prices.items():
        more = budgets | {name: budgets[name] * (1 + 1e-7)}
        gained = relaxation(scores, costs, more, CHOICES)[1] - before
        assert gained == pytest.approx(price * budgets[name] * 1e-7, rel=1e-3, abs=1e-12)
    assert any(price > 0 for price in prices.values())
    assert before >= allocate(scores, costs, budgets, CHOICES).score - 1e-12


def test_a_tolerance_ends_what_has_no_proof_in_time():
    """Scores that are the costs themselves make a subset-sum problem, whose proof may take forever."""
    rng = np.random.default_rng(0)
    table = np.round(10 ** rng.uniform(2, 5, (51, 1))) * np.array(CHOICES)
    cost = CostTable("size", "bytes", 0.0, np.ceil(table / 8))
    budget = {"size": float(np.interp(2.75, CHOICES, cost.table.sum(axis=0)))}
    found = allocate(table, {"size": cost}, budget, CHOICES, tolerance=1e-5)
    assert not found.optimal
    assert found.costs["size"] <= budget["size"]
    assert found.gap <= 2e-5 * (table[:, -1].sum() - found.score)
