"""Allocation: the configuration with the best score within budgets, exactly, and the front of all such trade-offs.

This module knows tables only: scores (slot, choice) to maximise and costs (slot, choice) to bound. Explained in
chapter 04.

Choosing one width per layer so that a sum of scores is largest while sums of costs stay within limits is the
multiple-choice knapsack problem (Sinha and Zoltners 1979), an integer program with one binary variable per entry of
the table. HAWQ-V3 (Yao et al. 2021) put bit allocation in this form.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, sparse

from emq_lib.core.costs import CostTable, gather
from emq_lib.core.errors import InfeasibleBudgetError, InvalidParameterError, InvalidScoreError, UnsolvedAllocationError

_INFEASIBLE = 2  # status of scipy.optimize.milp
_MAGNITUDE = 1_000.0  # of the largest objective entry and of every limit; the solver's tolerances are absolute, 1e-6
_MAX_CUTS = 20
_TIGHTENING = 1e-6  # of every limit: far beyond the solver's tolerance
_PRICE_FACTORS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0)  # dearer and dearer, until a solution fits
_SMALLEST_SHARE = 1e-12  # of a remaining budget; a step that costs less counts as this


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


@dataclass(frozen=True)
class _Problem:
    """A knapsack in normal form: minimise the regrets of the selected entries while the excesses stay within slacks.

    Attributes:
        regrets: shape (S, B), the slot's best score minus the entry's.
        excesses: shape (K, S, B), the entry's cost minus the slot's smallest, for every cost with a budget.
        slacks: shape (K,), the budget minus the smallest total.
        allowed: shape (S, B), whether an entry may be selected.
    """

    regrets: np.ndarray
    excesses: np.ndarray
    slacks: np.ndarray
    allowed: np.ndarray

    def regret(self, selected: np.ndarray) -> float:
        """Return the total regret of one choice index per slot."""
        return float(self.regrets[np.arange(len(selected)), selected].sum())

    def fits(self, selected: np.ndarray) -> bool:
        """Return whether one choice index per slot stays within every slack."""
        return bool((self.excesses[:, np.arange(len(selected)), selected].sum(axis=1) <= self.slacks).all())


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
        time_limit: seconds after which the best configuration so far is returned; None waits for the proof.
        tolerance: share of the regret, the score lost against no budgets, that may be left unproven. Where scores are
            proportional to costs, a proof can take forever, and 1e-5 is a matter of seconds.

    Returns:
        The best allocation. The same tables give the same bits, also among ties.

    Raises:
        InvalidScoreError: scores of the wrong shape, NaN or infinite; the message names the slot.
        InvalidParameterError: a cost table of the wrong shape or not finite, a budget without a cost, a NaN budget, a
            slot in two groups or none.
        InfeasibleBudgetError: no configuration fits; the message gives the smallest reachable value of each cost.
        UnsolvedAllocationError: the solver stopped without any configuration.

    >>> scores = np.array([[-9.0, -3.0, -1.0], [-5.0, -2.0, -1.0]])
    >>> bits = CostTable("bits", "bits", fixed=0.0, table=np.array([[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]))
    >>> allocate(scores, {"bits": bits}, {"bits": 6}, choices=(2, 3, 4))
    Allocation(bits=(3, 3), score=-5.0, costs={'bits': 6.0}, gap=0.0, optimal=True)
    """
    scores = _checked_scores(scores, choices, layers)
    if groups:
        limits = {"time_limit": time_limit, "tolerance": tolerance}
        return _allocate_groups(scores, costs, budgets, choices, groups=groups, **limits)
    problem = _normal_form(scores, costs, budgets, choices)
    start = _ascend(problem)
    if start is not None:
        problem, start = _core(problem, start)
    selected, bound, optimal = _solve(problem, start, time_limit, tolerance)
    if selected is None and not optimal:
        raise UnsolvedAllocationError(
            f"The solver stopped without a configuration (time limit: {time_limit} seconds). Raise time_limit, or "
            "loosen a budget."
        )
    if selected is None:
        raise InfeasibleBudgetError(_conflict(problem, costs, budgets))
    gap = max(0.0, problem.regret(selected) - bound)
    return _allocation(selected, scores, costs, choices, gap=gap, optimal=optimal and not tolerance)


def _allocate_groups(
    scores: np.ndarray,
    costs: Mapping[str, CostTable],
    budgets: Mapping[str, float],
    choices: Sequence[int],
    *,
    groups: Sequence[Sequence[int]],
    time_limit: float | None,
    tolerance: float,
) -> Allocation:
    """Allocate with one row for each group: a shared width adds up the scores and the costs of its slots."""
    slots = len(scores)
    named = [slot for group in groups for slot in group]
    if len(set(named)) < len(named) or not set(named) <= set(range(slots)):
        raise InvalidParameterError(f"Groups must hold each of the slots 0 to {slots - 1} once at most; got {groups}.")
    rows = [list(group) for group in groups] + [[slot] for slot in range(slots) if slot not in named]
    _normal_form(scores, costs, budgets, choices)  # checks the tables before they are added up
    merged = {
        name: replace(cost, table=np.array([np.asarray(cost.table)[row].sum(axis=0) for row in rows]))
        for name, cost in costs.items()
    }
    summed = np.array([scores[row].sum(axis=0) for row in rows])
    found = allocate(summed, merged, budgets, choices, time_limit=time_limit, tolerance=tolerance)
    bits = np.empty(slots, dtype=int)
    for row, width in zip(rows, found.bits, strict=True):
        bits[row] = width
    return replace(found, bits=tuple(bits.tolist()))


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
    scores = _checked_scores(scores, choices, None)
    problem = _normal_form(scores, costs, budgets, choices)
    found = _relaxed(replace(problem, allowed=np.ones_like(problem.allowed)))
    if found is None:
        raise InfeasibleBudgetError(_conflict(problem, costs, budgets))
    shares, prices = found
    return shares, float((scores * shares).sum()), prices


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
    scores = _checked_scores(scores, choices, layers)
    problem = _normal_form(scores, costs, budgets, choices)
    selected = _ascend(problem)
    if selected is None:
        raise InfeasibleBudgetError(_conflict(problem, costs, budgets))
    return _allocation(selected, scores, costs, choices, gap=problem.regret(selected), optimal=False)


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
        InvalidParameterError: fewer than two points.
    """
    if points < 2:
        raise InvalidParameterError(f"A front needs at least 2 points, got {points}.")
    largest = cost.fixed + float(cost.table.max(axis=1).sum())
    front: list[Allocation] = []
    for budget in np.linspace(cost.smallest, largest, points)[::-1]:
        if front and front[-1].costs[cost.name] <= budget:
            continue  # the previous optimum fits this smaller budget, so it is this one's optimum too
        best = allocate(scores, {cost.name: cost}, {cost.name: float(budget)}, choices, layers=layers)
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

    >>> size = CostTable("size", "bytes", fixed=10.0, table=np.array([[200.0, 300.0], [20.0, 30.0]]))
    >>> budget_for_average_bits(2.5, size, choices=(2, 3))
    285.0
    """
    if not average_bits >= choices[0]:
        raise InfeasibleBudgetError(
            f"{average_bits} bits on average cannot be reached: the smallest choice is {choices[0]} bits. "
            f"Ask for {choices[0]} or more, or add a smaller choice to the profile."
        )
    uniform = cost.fixed + cost.table.sum(axis=0)
    return float(np.interp(average_bits, choices, uniform))


def _checked_scores(scores: np.ndarray, choices: Sequence[int], layers: Sequence[str] | None) -> np.ndarray:
    """Return the scores as float64 after checking shape and values."""
    scores = np.asarray(scores, dtype=np.float64)
    names = None if layers is None else list(layers)
    if scores.ndim != 2 or not scores.size or scores.shape != (len(names or scores), len(choices)):
        expected = "one row per searchable layer" if names is None else f"{len(names)} rows, one per searchable layer,"
        raise InvalidScoreError(
            f"A score table needs {expected} and {len(choices)} columns, one per choice of {tuple(choices)}; "
            f"got shape {scores.shape}."
        )
    if not np.isfinite(scores).all():
        slot, choice = np.argwhere(~np.isfinite(scores))[0]
        named = f"slot {slot}" if names is None else f"slot {slot} ({names[slot]})"
        raise InvalidScoreError(
            f"The score of {named} at {choices[choice]} bits is {scores[slot, choice]}. "
            "Repair the proxy: every entry of its table must be finite."
        )
    return scores


def _normal_form(
    scores: np.ndarray, costs: Mapping[str, CostTable], budgets: Mapping[str, float], choices: Sequence[int]
) -> _Problem:
    """Check costs and budgets, and shift every row of scores and costs to start at zero."""
    for name, cost in costs.items():
        if np.shape(cost.table) != scores.shape or not np.isfinite(cost.table).all() or not np.isfinite(cost.fixed):
            raise InvalidParameterError(
                f"The cost {name!r} needs a finite table of the shape of the scores, {scores.shape} (choices "
                f"{tuple(choices)}), and a finite fixed part; got shape {np.shape(cost.table)}, fixed {cost.fixed}."
            )
    if unknown := sorted(set(budgets) - set(costs)):
        raise InvalidParameterError(f"Budgets without a cost table: {unknown}; the costs given are {sorted(costs)}.")
    if odd := [name for name, budget in budgets.items() if not np.isfinite(budget)]:
        raise InvalidParameterError(f"Budgets must be finite, {odd} are not; leave out a budget to put no bound.")
    tables = np.array([costs[name].table for name in budgets], dtype=np.float64).reshape(-1, *scores.shape)
    excesses = tables - tables.min(axis=2, keepdims=True)
    smallest = np.array([costs[name].smallest for name in budgets])
    limits = np.array([budget + _rounding(costs[name], budget) for name, budget in budgets.items()])
    slacks = limits - smallest
    regrets = scores.max(axis=1, keepdims=True) - scores
    return _Problem(regrets, excesses, slacks, (excesses <= slacks[:, None, None]).all(axis=0))


def _rounding(cost: CostTable, budget: float) -> float:
    """Return how far a float64 sum of S + 1 terms may lie above its true value: far below 1 for costs in whole units.

    Without it uniform 3 bits would miss a budget of 3 bits on average, because shares of parameters do not sum to one.
    """
    magnitude = max(abs(budget), abs(cost.fixed) + np.abs(cost.table).max(axis=1).sum())
    return float((len(cost.table) + 1) * np.finfo(np.float64).eps * magnitude)


def _ascend(problem: _Problem, selected: np.ndarray | None = None) -> np.ndarray | None:
    """Return greedy choice indices from a start, by default the cheapest; None if that is over a budget already."""
    slots = np.arange(len(problem.regrets))
    if selected is None:
        shares = problem.excesses / np.where(problem.slacks > 0, problem.slacks, 1.0)[:, None, None]
        selected = shares.sum(axis=0).argmin(axis=1)
    if not problem.fits(selected):
        return None
    while True:
        higher = np.minimum(selected + 1, problem.regrets.shape[1] - 1)
        gain = problem.regrets[slots, selected] - problem.regrets[slots, higher]
        added = problem.excesses[:, slots, higher] - problem.excesses[:, slots, selected]
        left = problem.slacks - problem.excesses[:, slots, selected].sum(axis=1)
        possible = (gain > 0) & (added <= left[:, None]).all(axis=0)
        if not possible.any():
            return selected
        share = (added / np.where(left > 0, left, 1.0)[:, None]).max(axis=0, initial=0.0)
        rate = gain / np.maximum(share, _SMALLEST_SHARE)
        step = int(np.where(possible, rate, -np.inf).argmax())
        selected = np.where(slots == step, higher, selected)


def _core(problem: _Problem, start: np.ndarray) -> tuple[_Problem, np.ndarray]:
    """Leave out the entries that no solution as good as a known one can hold; return that one too.

    With prices p >= 0 on the budgets no solution has less regret than L = sum_s min_b (r + p e)[s, b] - p slack, and
    none that holds an entry less than L plus that entry's lead over its slot's minimum (Lagrangian bounds; Fisher
    1981). The prices are those of the relaxed program; the bounds hold for any.
    """
    if problem.regret(start) == 0 or not len(problem.slacks):
        return problem, start
    relaxed = _relaxed(problem)
    prices = np.zeros(len(problem.slacks)) if relaxed is None else relaxed[1]
    for factor in _PRICE_FACTORS:
        priced = problem.regrets + np.tensordot(factor * prices, problem.excesses, axes=1)
        other = _ascend(problem, np.where(problem.allowed, priced, np.inf).argmin(axis=1))
        if other is not None and problem.regret(other) < problem.regret(start):
            start = other
    priced = np.where(problem.allowed, problem.regrets + np.tensordot(prices, problem.excesses, axes=1), np.inf)
    least = priced.min(axis=1, keepdims=True)
    bounds = least.sum() - prices @ problem.slacks + priced - least
    rounding = 1e-9 * np.abs(problem.regrets).max()
    return replace(problem, allowed=problem.allowed & (bounds <= problem.regret(start) + rounding)), start


def _relaxed(problem: _Problem) -> tuple[np.ndarray, np.ndarray] | None:
    """Solve the program with mixtures of the allowed entries; None if even these exceed a slack.

    Returns:
        shares of the entries, shape (S, B), and the regret that one more unit of each slack would save, at least 0.
    """
    slots, columns = np.nonzero(problem.allowed)
    height = problem.regrets[slots, columns].max() or 1.0
    unit = np.where(problem.slacks > 0, problem.slacks, 1.0)
    bounded = {"A_ub": problem.excesses[:, slots, columns] / unit[:, None], "b_ub": problem.slacks / unit}
    with _silenced():
        found = optimize.linprog(
            problem.regrets[slots, columns] / height,
            A_eq=sparse.csr_array((np.ones(len(slots)), (slots, np.arange(len(slots))))),
            b_eq=np.ones(len(problem.regrets)),
            bounds=(0, None),
            method="highs",
            **(bounded if len(unit) else {}),
        )
    if found.x is None:
        return None
    shares = np.zeros(problem.allowed.shape)
    shares[slots, columns] = found.x
    return shares, np.maximum(-found.ineqlin.marginals, 0.0) * height / unit


def _solve(
    problem: _Problem, start: np.ndarray | None, time_limit: float | None, tolerance: float = 0.0
) -> tuple[np.ndarray | None, float, bool]:
    """Solve the integer program.

    Args:
        problem: regrets to minimise within slacks.
        start: a solution that fits, or None.
        time_limit: seconds per solve, or None.
        tolerance: share of the regret that may be left unproven.

    Returns:
        The choice index per slot (None: nothing found), a lower bound of its regret, and whether the answer is proven.
    """
    if start is not None and problem.regret(start) == 0:
        return start, 0.0, True
    if not problem.allowed.any(axis=1).all():
        return None, np.inf, True
    slots, columns = np.nonzero(problem.allowed)
    regrets, excesses = problem.regrets[slots, columns], problem.excesses[:, slots, columns]
    scale = (regrets.max() or 1.0) / _MAGNITUDE
    one_per_slot = optimize.LinearConstraint(
        sparse.csr_array((np.ones(len(slots)), (slots, np.arange(len(slots))))), 1, 1
    )
    divisors = np.where(problem.slacks > 0, problem.slacks, 1.0) / _MAGNITUDE
    rows, limits = excesses / divisors[:, None], problem.slacks / divisors
    bound = 0.0
    for attempt in range(_MAX_CUTS + 1):
        if attempt == _MAX_CUTS:
            limits[: len(divisors)] *= 1 - _TIGHTENING
        constraints = [one_per_slot] + ([optimize.LinearConstraint(rows, -np.inf, limits)] if len(rows) else [])
        result = _milp(regrets / scale, constraints, time_limit, tolerance)
        if result.x is None:
            return start, bound, start is None and result.status == _INFEASIBLE and attempt < _MAX_CUTS
        if attempt < _MAX_CUTS:
            bound = max(bound, result.mip_dual_bound * scale)
        chosen = result.x > 0.5
        selected = columns[chosen]
        if problem.fits(selected):
            break
        rows, limits = np.vstack([rows, _cover(problem, excesses, slots, chosen)]), np.append(limits, _MAGNITUDE)
    if not problem.fits(selected) or (start is not None and problem.regret(start) < problem.regret(selected)):
        selected = start
    return selected, bound, result.status == 0 and attempt < _MAX_CUTS


def _cover(problem: _Problem, excesses: np.ndarray, slots: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return a row, with the limit `_MAGNITUDE`, that forbids the chosen entries, which are together over a slack.

    Wherever every slot of a cover (slots whose chosen entries exceed the slack) holds an entry at least as dear as the
    chosen one, the slack is exceeded too; so at most all slots but one may (an extended cover inequality).
    """
    totals = excesses[:, chosen].sum(axis=1)
    cost = int((totals - problem.slacks).argmax())
    threshold = excesses[cost, chosen][slots]
    members = (threshold > 0) & (excesses[cost] >= threshold)
    return members * (_MAGNITUDE / max(len(set(slots[members])) - 1, 0.5))


def _milp(
    objective: np.ndarray, constraints: list[optimize.LinearConstraint], time_limit: float | None, tolerance: float
) -> optimize.OptimizeResult:
    """Minimise over binary variables, to a gap that is this share of the minimum.

    Without the solver's own preprocessing: :func:`_core` has left little to do for it, and it takes half of the time.
    """
    options = {"presolve": False, "mip_rel_gap": tolerance} | ({} if time_limit is None else {"time_limit": time_limit})
    ones = np.ones_like(objective)
    with _silenced():
        return optimize.milp(objective, integrality=ones, bounds=(0, 1), constraints=constraints, options=options)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Drop what native code writes to standard output: some HiGHS versions print a line of debugging (HiGHS#2783)."""
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _conflict(problem: _Problem, costs: Mapping[str, CostTable], budgets: Mapping[str, float]) -> str:
    """Say which budget cannot be met, and the smallest reachable value of each cost."""
    named = {name: f"{name} of at least {costs[name].smallest:.12g} {costs[name].unit}" for name in costs}
    reach = f"These choices reach {', '.join(named.values())}."
    over = [name for name, slack in zip(budgets, problem.slacks, strict=True) if slack < 0]
    if over:
        wishes = ", ".join(f"{name} <= {budgets[name]:.12g}" for name in over)
        return f"No configuration fits {wishes}. {reach} Raise the budget, or add smaller choices to the profile."
    wishes = ", ".join(f"{name} <= {budget:.12g}" for name, budget in budgets.items())
    least = [_smallest_given_others(problem, index) for index in range(len(budgets))]
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


def _smallest_given_others(problem: _Problem, index: int) -> float | None:
    """Return the smallest total excess of one cost within the slacks of the others; None if those conflict already."""
    excesses, slacks = np.delete(problem.excesses, index, axis=0), np.delete(problem.slacks, index)
    allowed = (excesses <= slacks[:, None, None]).all(axis=0)
    others = _Problem(problem.excesses[index], excesses, slacks, allowed)
    selected, _, _ = _solve(others, None, None)
    return None if selected is None else others.regret(selected)


def _allocation(
    selected: np.ndarray,
    scores: np.ndarray,
    costs: Mapping[str, CostTable],
    choices: Sequence[int],
    *,
    gap: float,
    optimal: bool,
) -> Allocation:
    """Describe one choice index per slot."""
    bits = tuple(int(choices[index]) for index in selected)
    totals = {name: float(cost.total([bits], choices)[0]) for name, cost in costs.items()}
    return Allocation(bits, float(gather(scores, [bits], choices)[0]), totals, gap, optimal)
