"""Allocation: the configuration with the best score within budgets, exactly, and the front of all such trade-offs.

This module knows tables only: scores (slot, choice) to maximise and costs (slot, choice) to bound. Explained in
chapter 04.

Choosing one width per layer so that a sum of scores is largest while sums of costs stay within limits is the
multiple-choice knapsack problem (Sinha and Zoltners 1979), an integer program with one binary variable per entry of
the table. HAWQ-V3 (Yao et al. 2021) put bit allocation in this form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emq_lib.allocation.knapsack import Knapsack, Problem, allowed_widths, ascend, checked_cost
from emq_lib.allocation.solver import core, relaxed, smallest_given_others, solve
from emq_lib.core.checks import real_number, whole_number
from emq_lib.core.costs import CostTable, gather
from emq_lib.core.errors import InfeasibleBudgetError, InvalidParameterError, UnsolvedAllocationError


@dataclass(frozen=True)
class Allocation:
    """A configuration, what it scores and what it costs.

    Attributes:
        bits: one width per searchable layer, in slot order.
        score: sum of the selected scores.
        costs: name -> total, fixed part included, for every cost that was given.
        gap: no configuration within the budgets scores more than `score + gap`.
        optimal: whether this is proven to be the best; False after a time limit, from an inexact method, or if costs
            differ by less than a billionth of a budget, which the solver cannot tell apart.
    """

    bits: tuple[int, ...]
    score: float
    costs: dict[str, float]
    gap: float
    optimal: bool


def allocate(
    scores: np.ndarray,
    costs: Mapping[str, CostTable],
    budgets: Mapping[str, float],
    choices: Sequence[int],
    *,
    layers: Sequence[str] | None = None,
    groups: Sequence[Sequence[int]] = (),
    time_limit: float | None = None,
    tolerance: float = 0.0,
) -> Allocation:
    """Allocate bits: maximise the sum of the selected scores subject to an upper bound on any number of costs.

    max sum_s T[s, b_s]  subject to  fixed_k + sum_s C_k[s, b_s] <= budget_k for every budget k, solved to proven
    optimality by HiGHS. Only differences within a slot matter, so each row of scores and costs is shifted to start at
    zero; entries that no solution within the budgets, or none as good as a known one, can hold are left out; then the
    objective is scaled by its largest entry and each row by its limit, which keeps the solver's absolute tolerances
    meaningful for scores and costs of any magnitude. A solution that only the solver's tolerance let pass is forbidden
    and the program solved again: what is returned keeps the budgets exactly (for costs in whole units below 2^53; for
    others up to the rounding of the float64 sum).

    Args:
        scores: shape (S, B); higher is better.
        costs: name -> cost table of shape (S, B); those without a budget are reported only.
        budgets: name -> upper bound, in the unit of the cost of that name.
        choices: the B allowed widths, increasing.
        layers: names of the S searchable layers, for messages.
        groups: slots that must share a width, e.g. the projections of one attention; each slot in one group at most.
        time_limit: seconds, above 0, after which the best configuration so far is returned; None waits for the proof.
        tolerance: share, 0 to 1, of the regret, the score lost against no budgets, that may be left unproven. Where
            scores are proportional to costs, a proof can take forever, and 1e-5 is a matter of seconds.

    Returns:
        The best allocation. The same tables give the same bits, also among ties.

    Raises:
        InvalidBitsError: choices that are no widths, or do not increase.
        InvalidScoreError: scores of the wrong shape or kind, NaN or infinite; the message names the slot.
        InvalidParameterError: a cost or a budget that is none, of the wrong shape or not finite, a budget without a
            cost, a time limit or a tolerance outside its range, a group with a slot of another one or that is none.
        InfeasibleBudgetError: no configuration fits; the message gives the smallest reachable value of each cost.
        UnsolvedAllocationError: the solver stopped without any configuration.

    >>> scores = np.array([[-9.0, -3.0, -1.0], [-5.0, -2.0, -1.0]])
    >>> bits = CostTable("bits", "bits", fixed=0.0, table=np.array([[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]))
    >>> allocate(scores, {"bits": bits}, {"bits": 6}, choices=(2, 3, 4))
    Allocation(bits=(3, 3), score=-5.0, costs={'bits': 6.0}, gap=0.0, optimal=True)
    """
    asked = Knapsack.checked(scores, costs, budgets, choices, layers=layers)
    if time_limit is not None:
        time_limit = real_number(time_limit, "time_limit", 0)
    tolerance = real_number(tolerance, "tolerance", 0, 1, ends=True)
    slots_of = _slots_of(groups, len(asked.scores))
    found = _allocate(_merged(asked, slots_of), time_limit, tolerance)
    bits = np.empty(len(asked.scores), dtype=int)
    for slots, width in zip(slots_of, found.bits, strict=True):
        bits[slots] = width
    return replace(found, bits=tuple(bits.tolist()))


def _allocate(asked: Knapsack, time_limit: float | None, tolerance: float) -> Allocation:
    """Allocate one width for every row."""
    problem = asked.normal_form()
    start = ascend(problem)
    if start is not None:
        problem, start = core(problem, start)
    selected, bound, optimal = solve(problem, start, time_limit, tolerance)
    if selected is None and not optimal:
        raise UnsolvedAllocationError(
            f"The solver stopped without a configuration (time limit: {time_limit} seconds). Raise time_limit, or "
            "loosen a budget."
        )
    if selected is None:
        raise InfeasibleBudgetError(_conflict(problem, asked))
    gap = max(0.0, problem.regret(selected) - bound)
    return _allocation(selected, asked, gap=gap, optimal=optimal and not tolerance)


def _slots_of(groups: Sequence[Sequence[int]], slots: int) -> list[list[int]]:
    """Return the slots of every row of the merged tables: first the groups, then the slots without one."""
    try:
        rows = [[whole_number(slot, "a slot of a group", 0) for slot in group] for group in groups]
    except TypeError as error:
        raise InvalidParameterError(f"groups must be lists of slots, as [(0, 1)]; got {groups!r:.60}.") from error
    named = [slot for row in rows for slot in row]
    if len(set(named)) < len(named) or not set(named) <= set(range(slots)) or [] in rows:
        raise InvalidParameterError(f"Groups must hold each of the slots 0 to {slots - 1} once at most; got {groups}.")
    return rows + [[slot] for slot in range(slots) if slot not in named]


def _merged(asked: Knapsack, slots_of: Sequence[Sequence[int]]) -> Knapsack:
    """Return the tables with one row for each group: a shared width adds up the scores and the costs of its slots."""
    if slots_of == [[slot] for slot in range(len(asked.scores))]:
        return asked

    def merged(table: np.ndarray) -> np.ndarray:
        return np.array([table[slots].sum(axis=0) for slots in slots_of])

    costs = {name: replace(cost, table=merged(cost.table)) for name, cost in asked.costs.items()}
    return replace(asked, scores=merged(asked.scores), costs=costs)


def shadow_prices(
    scores: np.ndarray, costs: Mapping[str, CostTable], budgets: Mapping[str, float], choices: Sequence[int]
) -> dict[str, float]:
    """Return how much score one more unit of each budget is worth, from the relaxed program.

    In the relaxation a slot may take a mixture of widths; the prices are the dual variables of its budgets (Dantzig
    1963), zero for a budget that does not bind.

    Args:
        scores: shape (S, B); higher is better.
        costs: name -> cost table of shape (S, B).
        budgets: name -> upper bound.
        choices: the B allowed widths, increasing.

    Returns:
        name -> score per unit of the cost, not negative.

    Raises:
        As :func:`allocate`.

    >>> scores = np.array([[-9.0, -3.0], [-5.0, -2.0]])
    >>> bits = CostTable("bits", "bits", fixed=0.0, table=np.array([[2.0, 3.0], [2.0, 3.0]]))
    >>> round(shadow_prices(scores, {"bits": bits}, {"bits": 5.5}, choices=(2, 3))["bits"], 6)
    3.0
    """
    _, _, prices = relaxation(scores, costs, budgets, choices)
    return dict(zip(budgets, prices.tolist(), strict=True))


def relaxation(
    scores: np.ndarray, costs: Mapping[str, CostTable], budgets: Mapping[str, float], choices: Sequence[int]
) -> tuple[np.ndarray, float, np.ndarray]:
    """Solve the program with mixtures of widths.

    Returns:
        shares of the widths of each slot, shape (S, B); the score, which no configuration exceeds; and the price of
        each budget, score per unit.

    Raises:
        As :func:`allocate`.
    """
    asked = Knapsack.checked(scores, costs, budgets, choices)
    problem = asked.normal_form()
    found = relaxed(replace(problem, allowed=np.ones_like(problem.allowed)))
    if found is None:
        raise InfeasibleBudgetError(_conflict(problem, asked))
    shares, prices = found
    return shares, float((asked.scores * shares).sum()), prices


def allocate_greedy(
    scores: np.ndarray,
    costs: Mapping[str, CostTable],
    budgets: Mapping[str, float],
    choices: Sequence[int],
    *,
    layers: Sequence[str] | None = None,
) -> Allocation:
    """Allocate bits one step at a time: from the cheapest configuration, take the step of best gain per cost that fits.

    The cost of a step is the largest share of a remaining budget that it uses. Not exact: for comparison with
    :func:`allocate`, which takes the same arguments and raises the same errors. `gap` is the trivial bound, the best
    score without budgets minus this one.
    """
    asked = Knapsack.checked(scores, costs, budgets, choices, layers=layers)
    problem = asked.normal_form()
    selected = ascend(problem)
    if selected is None:
        raise InfeasibleBudgetError(_conflict(problem, asked))
    return _allocation(selected, asked, gap=problem.regret(selected), optimal=False)


def pareto_front(
    scores: np.ndarray,
    cost: CostTable,
    choices: Sequence[int],
    *,
    points: int = 50,
    layers: Sequence[str] | None = None,
) -> list[Allocation]:
    """Return the best allocations over a grid of budgets, from the cheapest configuration to the dearest.

    Args:
        scores: shape (S, B); higher is better.
        cost: the cost to trade against the score.
        choices: the B allowed widths, increasing.
        points: number of budgets, equally spaced from the smallest to the largest reachable cost.
        layers: names of the S searchable layers, for messages.

    Returns:
        Distinct allocations in order of cost; both cost and score increase strictly. At most `points`.

    Raises:
        InvalidParameterError: fewer than two points, or no whole number; a cost that is none.
        InvalidBitsError, InvalidScoreError: see :func:`allocate`.
    """
    points = whole_number(points, "points", 2)
    asked = Knapsack.checked(scores, {"cost": cost}, {}, choices, layers=layers)
    cost = asked.costs["cost"]
    largest = cost.fixed + float(cost.table.max(axis=1).sum())
    front: list[Allocation] = []
    for budget in np.linspace(cost.smallest, largest, points)[::-1]:
        if front and front[-1].costs[cost.name] <= budget:
            continue  # the previous optimum fits this smaller budget, so it is this one's optimum too
        best = allocate(asked.scores, {cost.name: cost}, {cost.name: float(budget)}, choices)
        if front and best.score >= front[-1].score:
            front.pop()
        front.append(best)
    return front[::-1]


def budget_for_average_bits(average_bits: float, cost: CostTable, choices: Sequence[int]) -> float:
    """Return the budget of a cost that stands for a number of average bits.

    A cost that is linear in the bits (size, BOPs) is interpolated between the uniform configurations: 2.5 bits is
    halfway between the cost of uniform 2 and of uniform 3. For the size this is the bound on the average bits of the
    searchable weights itself, up to the rounding of each layer to whole bytes.

    Args:
        average_bits: bits per searchable weight.
        cost: table of shape (S, B).
        choices: the B allowed widths, increasing.

    Returns:
        The budget, in the cost's unit; above the largest choice, the cost of the largest network.

    Raises:
        InfeasibleBudgetError: fewer bits than the smallest choice.
        InvalidBitsError: choices that are no widths, or do not increase.
        InvalidParameterError: no finite number of bits, or a cost that is none.

    >>> size = CostTable("size", "bytes", fixed=10.0, table=np.array([[200.0, 300.0], [20.0, 30.0]]))
    >>> budget_for_average_bits(2.5, size, choices=(2, 3))
    285.0
    """
    choices = allowed_widths(choices)
    cost = checked_cost(cost, "cost", len(choices))
    if real_number(average_bits, "average_bits") < choices[0]:
        raise InfeasibleBudgetError(
            f"{average_bits} bits on average cannot be reached: the smallest choice is {choices[0]} bits. "
            f"Ask for {choices[0]} or more, or add a smaller choice to the profile."
        )
    uniform = cost.fixed + cost.table.sum(axis=0)
    return float(np.interp(average_bits, choices, uniform))


def _conflict(problem: Problem, asked: Knapsack) -> str:
    """Say which budget cannot be met, and the smallest reachable value of each cost."""
    costs, budgets = asked.costs, asked.budgets
    named = [f"{name} of at least {cost.smallest:.12g} {cost.unit}" for name, cost in costs.items()]
    reach = f"These choices reach {', '.join(named)}."
    over = [name for name, slack in zip(budgets, problem.slacks, strict=True) if slack < 0]
    if over:
        wishes = ", ".join(f"{name} <= {budgets[name]:.12g}" for name in over)
        return f"No configuration fits {wishes}. {reach} Raise the budget, or add smaller choices to the profile."
    wishes = ", ".join(f"{name} <= {budget:.12g}" for name, budget in budgets.items())
    least = [smallest_given_others(problem, index) for index in range(len(budgets))]
    pairs = [
        f"{name} needs at least {costs[name].smallest + excess:.12g} {costs[name].unit}"
        for name, excess in zip(budgets, least, strict=True)
        if excess is not None
    ]
    return (
        f"Each budget can be met, but not all together: {wishes}. {reach} "
        + (f"With the other budgets kept, {', or '.join(pairs)}. " if pairs else "")
        + "Raise one of the budgets, or drop one."
    )


def _allocation(selected: np.ndarray, asked: Knapsack, *, gap: float, optimal: bool) -> Allocation:
    """Describe one choice index per slot."""
    bits = [asked.choices[index] for index in selected]
    score = float(gather(asked.scores, [bits], asked.choices)[0])
    return described(bits, score, asked.costs, asked.choices, gap=gap, optimal=optimal)


def described(
    bits: Sequence[int],
    score: float,
    costs: Mapping[str, CostTable],
    choices: Sequence[int],
    *,
    gap: float = np.inf,
    optimal: bool = False,
) -> Allocation:
    """Return a configuration as an allocation, with the total of every cost.

    Args:
        bits: one width per slot, shape (S,).
        score: what it scores.
        costs: name -> cost table of shape (S, B).
        choices: the B allowed widths.
        gap: how much more another configuration may score; infinite where nothing is known.
        optimal: whether the gap is proven to be zero.

    Raises:
        ConfigLengthError, InvalidBitsError, InvalidParameterError: see :meth:`CostTable.total`.
    """
    totals = {name: float(cost.total([bits], choices)[0]) for name, cost in costs.items()}
    return Allocation(tuple(map(int, bits)), score, totals, gap, optimal)
