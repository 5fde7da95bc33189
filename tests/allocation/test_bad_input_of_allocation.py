"""What is no allocation is refused by name, by every function that takes it, and nothing that was passed in changes."""

import copy

import numpy as np
import pytest
from test_allocation import CHOICES, random_problem

from emq_lib.allocation import approximate, exact
from emq_lib.core.costs import CostTable, gather
from emq_lib.core.errors import (
    ConfigLengthError,
    InfeasibleBudgetError,
    InvalidBitsError,
    InvalidParameterError,
    InvalidScoreError,
)

SCORES, COSTS, BUDGETS = random_problem(0, 5)
SIZE = COSTS["size"]
NO_NUMBERS = (None, "100", b"100", float("nan"), float("inf"), 10**400, 10**5_000, True, 3j, [5.0], {})


def _name(value):
    """Return what a case is called: some have no text of their own, as a number of thousands of digits."""
    try:
        return f"{value!r:.30}"
    except ValueError:
        return "huge"


def _score(configs):
    return gather(SCORES, configs, CHOICES)


def _given(**changed):
    given = {"scores": SCORES, "costs": COSTS, "budgets": BUDGETS, "choices": CHOICES} | changed
    return given["scores"], given["costs"], given["budgets"], given["choices"]


def _search(**changed):
    (_, *given), rng = _given(**changed), np.random.default_rng(0)
    return approximate.allocate_locally(_score, *given, rng=rng, pool=5)


def _mutate(**changed):
    (_, *given), rng = _given(**changed), np.random.default_rng(0)
    return approximate.allocate_by_mutation(_score, (2,) * 5, *given, rng=rng)


OF_TABLES = {
    "allocate": lambda **changed: exact.allocate(*_given(**changed)),
    "greedy": lambda **changed: exact.allocate_greedy(*_given(**changed)),
    "relaxation": lambda **changed: exact.relaxation(*_given(**changed)),
    "prices": lambda **changed: exact.shadow_prices(*_given(**changed)),
    "rounded": lambda **changed: approximate.allocate_rounded(*_given(**changed)),
}
ALL = OF_TABLES | {"locally": _search, "mutation": _mutate}


@pytest.fixture(autouse=True)
def _unchanged():
    before = copy.deepcopy((SCORES, COSTS, BUDGETS))
    yield
    assert np.array_equal(before[0], SCORES)
    assert all(np.array_equal(before[1][name].table, cost.table) for name, cost in COSTS.items())
    assert before[2] == BUDGETS


@pytest.mark.parametrize(
    "choices",
    [(4, 3, 2), (2.0, 3.0, 4.0), (2, 3.5, 4), (True, 2, 3), (2, 2, 3), (0, 2, 3), (-1, 2, 3), (2, 3, 99)]
    + [(), "234", None, 3, ("2", "3", "4"), (2, None, 4), (2, float("nan"), 4), (2, 3, 10**400), [[2], [3], [4]]],
    ids=_name,
)
@pytest.mark.parametrize("function", [*ALL, "front", "average", "random"])
def test_choices_that_are_no_increasing_widths(function, choices):
    rng = np.random.default_rng(0)
    others = {
        "front": lambda choices: exact.pareto_front(SCORES, SIZE, choices),
        "average": lambda choices: exact.budget_for_average_bits(3.0, SIZE, choices),
        "random": lambda choices: approximate.random_within(SIZE, BUDGETS["size"], choices, rng=rng),
    }
    with pytest.raises(InvalidBitsError, match="choices"):
        (ALL | others)[function](choices=choices)


@pytest.mark.parametrize(
    "widths", [np.array(CHOICES), [np.int64(2), np.int8(3), np.uint8(4)], list(CHOICES), range(2, 5)]
)
def test_widths_of_other_whole_number_types_are_taken(widths):
    expected = exact.allocate(*_given())
    assert exact.allocate(*_given(choices=widths)) == expected
    assert {type(bits) for bits in exact.allocate(*_given(choices=widths)).bits} == {int}


@pytest.mark.parametrize("budget", NO_NUMBERS, ids=_name)
@pytest.mark.parametrize("function", ALL)
def test_budgets_that_are_no_finite_numbers(function, budget):
    with pytest.raises(InvalidParameterError, match="budget of 'size' must be a finite number"):
        ALL[function](budgets={"size": budget})


@pytest.mark.parametrize("budgets", [None, 5.0, [("size", 5.0)], "size", {"latency": 3.0}, {3: 3.0}])
@pytest.mark.parametrize("function", ALL)
def test_budgets_that_are_no_table_of_budgets(function, budgets):
    with pytest.raises(InvalidParameterError, match="[Bb]udgets"):
        ALL[function](budgets=budgets)


def _cost(table, fixed=0.0):
    return CostTable("size", "bytes", fixed, table)


@pytest.mark.parametrize(
    "cost",
    [None, np.ones((5, 3)), _cost(None), _cost("table"), _cost(5.0), _cost(np.ones((5, 2))), _cost(np.ones(5))]
    + [_cost(np.ones((0, 3))), _cost([[1, 2], [3]]), _cost(np.full((5, 3), np.nan)), _cost(np.full((5, 3), np.inf))]
    + [_cost(np.ones((5, 3), complex)), _cost(np.full((5, 3), "1")), _cost(np.ones((5, 3), object))]
    + [_cost(np.ones((5, 3)), fixed) for fixed in NO_NUMBERS],
    ids=_name,
)
def test_costs_that_are_none(cost):
    for function in ALL.values():
        with pytest.raises(InvalidParameterError, match="cost"):
            function(costs={"size": cost}, budgets={"size": 100.0})
    with pytest.raises(InvalidParameterError, match="cost"):
        exact.pareto_front(SCORES, cost, CHOICES)
    with pytest.raises(InvalidParameterError, match="cost"):
        exact.budget_for_average_bits(3.0, cost, CHOICES)
    with pytest.raises(InvalidParameterError, match="cost"):
        approximate.random_within(cost, 1e9, CHOICES, rng=np.random.default_rng(0))


@pytest.mark.parametrize("costs", [None, 5.0, [SIZE], SIZE])
@pytest.mark.parametrize("function", ALL)
def test_costs_that_are_no_table_of_costs(function, costs):
    with pytest.raises(InvalidParameterError, match="costs must be a dictionary"):
        ALL[function](costs=costs)


@pytest.mark.parametrize(
    "scores",
    [None, "scores", 5.0, [[1.0, 2.0, 3.0], [1.0]], SCORES + 1j, SCORES.astype(str), SCORES.astype(object)]
    + [SCORES[:, :2], SCORES[0], SCORES[None], SCORES[:0], np.where(SCORES < -1, np.nan, np.nan), SCORES * np.inf]
    + [np.sign(SCORES) * 1e308, [[None] * 3] * 5],
    ids=_name,
)
@pytest.mark.parametrize("function", [*OF_TABLES, "front"])
def test_scores_that_are_no_finite_table(function, scores):
    others = {"front": lambda scores: exact.pareto_front(scores, SIZE, CHOICES)}
    with pytest.raises((InvalidScoreError, InvalidParameterError), match="[Ss]core"):
        (OF_TABLES | others)[function](scores=scores)


@pytest.mark.parametrize(
    "found",
    [None, "x", 3.0, [1.0], 1j, float("nan"), float("-inf"), [[1.0], [2.0]], Ellipsis],
    ids=_name,
)
def test_score_functions_that_do_not_give_one_number_per_configuration(found):
    rng = np.random.default_rng(0)
    spread = {complex: lambda c: np.full(len(c), found), float: lambda c: np.full(len(c), found) * np.nan}
    score = spread.get(type(found), lambda _configs: found)
    with pytest.raises(InvalidScoreError, match="score"):
        approximate.allocate_locally(score, COSTS, BUDGETS, CHOICES, rng=rng, pool=5)
    with pytest.raises(InvalidScoreError, match="score"):
        approximate.allocate_by_mutation(score, (2,) * 5, COSTS, BUDGETS, CHOICES, rng=rng)


@pytest.mark.parametrize("value", [-1, -1e-9, *(value for value in NO_NUMBERS if value is not None)], ids=_name)
@pytest.mark.parametrize("limit", ["time_limit", "tolerance"])
def test_limits_outside_their_range(limit, value):
    with pytest.raises(InvalidParameterError, match=f"{limit} must"):
        exact.allocate(*_given(), **{limit: value})
    with pytest.raises(InvalidParameterError, match="tolerance must"):
        exact.allocate(*_given(), tolerance=1.5)
    with pytest.raises(InvalidParameterError, match="time_limit must"):
        exact.allocate(*_given(), time_limit=0)


@pytest.mark.parametrize("points", [2.5, 1, 0, -3, True, None, "50", float("nan"), 10.0])
def test_numbers_of_points_that_are_none(points):
    with pytest.raises(InvalidParameterError, match="points must be a whole number"):
        exact.pareto_front(SCORES, SIZE, CHOICES, points=points)


@pytest.mark.parametrize(
    "groups", [5, [5], [None], [("a", "b")], [(0.5, 1)], [(True, 2)], [()], [(0, 0)], [(-1, 2)], "01"]
)
def test_groups_that_name_no_slots(groups):
    with pytest.raises(InvalidParameterError, match="group|Group"):
        exact.allocate(*_given(), groups=groups)


@pytest.mark.parametrize("layers", [5, Ellipsis])
def test_layers_that_are_no_names(layers):
    with pytest.raises(InvalidParameterError, match="layers must be the names"):
        exact.allocate(*_given(), layers=layers)


def test_a_group_of_one_slot_changes_nothing():
    assert exact.allocate(*_given(), groups=[(3,)]).bits == exact.allocate(*_given()).bits


@pytest.mark.parametrize("average", NO_NUMBERS, ids=_name)
def test_average_bits_that_are_no_finite_number(average):
    with pytest.raises(InvalidParameterError, match="average_bits must be a finite number"):
        exact.budget_for_average_bits(average, SIZE, CHOICES)


@pytest.mark.parametrize("average", [1.999, 0, -5, -(10**300)])
def test_averages_below_the_smallest_choice(average):
    with pytest.raises(InfeasibleBudgetError, match="smallest choice is 2"):
        exact.budget_for_average_bits(average, SIZE, CHOICES)


@pytest.mark.parametrize("budget", [SIZE.smallest - 1, 0, -1e9])
def test_random_configurations_below_the_smallest_size(budget):
    with pytest.raises(InfeasibleBudgetError, match="the smallest has"):
        approximate.random_within(SIZE, budget, CHOICES, rng=np.random.default_rng(0))


@pytest.mark.parametrize("budget", NO_NUMBERS, ids=_name)
def test_random_configurations_of_no_size(budget):
    with pytest.raises(InvalidParameterError, match="budget must be a finite number"):
        approximate.random_within(SIZE, budget, CHOICES, rng=np.random.default_rng(0))


@pytest.mark.parametrize("rng", [None, 0, np.random.RandomState(0), np.random])
def test_what_is_no_generator(rng):
    for draw in (
        lambda: approximate.random_within(SIZE, BUDGETS["size"], CHOICES, rng=rng),
        lambda: approximate.allocate_locally(_score, COSTS, BUDGETS, CHOICES, rng=rng),
        lambda: approximate.allocate_by_mutation(_score, (2,) * 5, COSTS, BUDGETS, CHOICES, rng=rng),
    ):
        with pytest.raises(InvalidParameterError, match=r"numpy\.random\.Generator"):
            draw()


def test_a_cost_that_falls_with_the_width_cannot_be_used_up():
    latency, rng = CostTable("latency", "ms", 0.0, -SIZE.table), np.random.default_rng(0)
    with pytest.raises(InvalidParameterError, match="falls with the width"):
        approximate.random_within(latency, 1e9, CHOICES, rng=rng)
    with pytest.raises(InvalidParameterError, match="'latency' falls"):
        approximate.allocate_locally(_score, {"latency": latency}, {"latency": 1e9}, CHOICES, rng=rng)


@pytest.mark.parametrize("pool", [0, -1, 2.5, None, "9", True])
def test_pools_that_are_no_number(pool):
    with pytest.raises(InvalidParameterError, match="pool must be a whole number"):
        approximate.allocate_locally(_score, COSTS, BUDGETS, CHOICES, rng=np.random.default_rng(0), pool=pool)


@pytest.mark.parametrize(
    ("start", "error"), [((2,) * 4, ConfigLengthError), ((2.5,) * 5, InvalidBitsError), ((5,) * 5, InvalidBitsError)]
)
def test_starts_and_roots_that_are_no_configurations(start, error):
    rng = np.random.default_rng(0)
    with pytest.raises(error):
        approximate.allocate_locally(_score, COSTS, BUDGETS, CHOICES, rng=rng, starts=[start])
    with pytest.raises(error):
        approximate.allocate_by_mutation(_score, start, COSTS, BUDGETS, CHOICES, rng=rng)


def test_a_search_needs_a_budget():
    for search in (_search, _mutate):
        with pytest.raises(InvalidParameterError, match="Give a budget"):
            search(budgets={})
