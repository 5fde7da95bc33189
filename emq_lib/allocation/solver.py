"""Solving the multiple-choice knapsack problem: bounds that leave entries out, and HiGHS for what is left.

Explained in chapter 04.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from emq_lib.allocation.knapsack import Problem, ascend

if TYPE_CHECKING:
    from scipy import optimize

_INFEASIBLE = 2  # status of scipy.optimize.milp
MAGNITUDE = 1_000.0  # of the largest objective entry and of every limit; the solver's tolerances are absolute, 1e-6
_MAX_CUTS = 20
_TIGHTENING = 1e-6  # of every limit: far beyond the solver's tolerance
_PRICE_FACTORS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0)  # dearer and dearer, until a solution fits


def core(problem: Problem, start: np.ndarray) -> tuple[Problem, np.ndarray]:
    """Leave out the entries that no solution as good as a known one can hold; return that one too.

    With prices p >= 0 on the budgets no solution has less regret than L = sum_s min_b (r + p e)[s, b] - p slack, and
    none that holds an entry less than L plus that entry's lead over its slot's minimum (Lagrangian bounds; Fisher
    1981). The prices are those of the relaxed program; the bounds hold for any.
    """
    if problem.regret(start) == 0 or not len(problem.slacks):
        return problem, start
    found = relaxed(problem)
    prices = np.zeros(len(problem.slacks)) if found is None else found[1]
    for factor in _PRICE_FACTORS:
        priced = problem.regrets + np.tensordot(factor * prices, problem.excesses, axes=1)
        other = ascend(problem, np.where(problem.allowed, priced, np.inf).argmin(axis=1))
        if other is not None and problem.regret(other) < problem.regret(start):
            start = other
    priced = np.where(problem.allowed, problem.regrets + np.tensordot(prices, problem.excesses, axes=1), np.inf)
    least = priced.min(axis=1, keepdims=True)
    bounds = least.sum() - prices @ problem.slacks + priced - least
    rounding = 1e-9 * np.abs(problem.regrets).max()
    return replace(problem, allowed=problem.allowed & (bounds <= problem.regret(start) + rounding)), start


def relaxed(problem: Problem) -> tuple[np.ndarray, np.ndarray] | None:
    """Solve the program with mixtures of the allowed entries; None if even these exceed a slack.

    Returns:
        shares of the entries, shape (S, B), and the regret that one more unit of each slack would save, at least 0.
    """
    from scipy import optimize, sparse  # takes half a second, which who only reads or quantizes need not wait for

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


def solve(
    problem: Problem, start: np.ndarray | None, time_limit: float | None, tolerance: float = 0.0
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
    from scipy import optimize, sparse

    slots, columns = np.nonzero(problem.allowed)
    regrets, excesses = problem.regrets[slots, columns], problem.excesses[:, slots, columns]
    scale = (regrets.max() or 1.0) / MAGNITUDE
    one_per_slot = optimize.LinearConstraint(
        sparse.csr_array((np.ones(len(slots)), (slots, np.arange(len(slots))))), 1, 1
    )
    divisors = np.where(problem.slacks > 0, problem.slacks, 1.0) / MAGNITUDE
    rows, limits = excesses / divisors[:, None], problem.slacks / divisors
    bound = 0.0
    for attempt in range(_MAX_CUTS + 1):
        if attempt == _MAX_CUTS:
            limits[: len(divisors)] *= 1 - _TIGHTENING
        constraints = [one_per_slot] + ([optimize.LinearConstraint(rows, -np.inf, limits)] if len(rows) else [])
        result = milp(regrets / scale, constraints, time_limit, tolerance)
        if result.x is None:
            return start, bound, start is None and result.status == _INFEASIBLE and attempt < _MAX_CUTS
        if attempt < _MAX_CUTS:
            bound = max(bound, result.mip_dual_bound * scale)
        chosen = result.x > 0.5
        selected = columns[chosen]
        if problem.fits(selected):
            break
        rows, limits = np.vstack([rows, _cover(problem, excesses, slots, chosen)]), np.append(limits, MAGNITUDE)
    if not problem.fits(selected) or (start is not None and problem.regret(start) < problem.regret(selected)):
        selected = start
    return selected, bound, result.status == 0 and attempt < _MAX_CUTS


def smallest_given_others(problem: Problem, index: int) -> float | None:
    """Return the smallest total excess of one cost within the slacks of the others; None if those conflict already."""
    excesses, slacks = np.delete(problem.excesses, index, axis=0), np.delete(problem.slacks, index)
    allowed = (excesses <= slacks[:, None, None]).all(axis=0)
    others = Problem(problem.excesses[index], excesses, slacks, allowed)
    selected, _, _ = solve(others, None, None)
    return None if selected is None else others.regret(selected)


def _cover(problem: Problem, excesses: np.ndarray, slots: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return a row, with the limit `MAGNITUDE`, that forbids the chosen entries, which are together over a slack.

    Wherever every slot of a cover (slots whose chosen entries exceed the slack) holds an entry at least as dear as the
    chosen one, the slack is exceeded too; so at most all slots but one may (an extended cover inequality).
    """
    totals = excesses[:, chosen].sum(axis=1)
    cost = int((totals - problem.slacks).argmax())
    threshold = excesses[cost, chosen][slots]
    members = (threshold > 0) & (excesses[cost] >= threshold)
    return members * (MAGNITUDE / max(len(set(slots[members])) - 1, 0.5))


def milp(
    objective: np.ndarray,
    constraints: list[optimize.LinearConstraint],
    time_limit: float | None,
    tolerance: float = 0.0,
    *,
    integrality: np.ndarray | None = None,
    presolve: bool = False,
) -> optimize.OptimizeResult:
    """Minimise over variables from 0 to 1, to a gap that is this share of the minimum.

    Args:
        objective: shape (N,).
        constraints: on the variables.
        time_limit: seconds, or None.
        tolerance: share of the minimum.
        integrality: which of the variables are whole numbers, shape (N,); None: all.
        presolve: the solver's own preprocessing. After :func:`core` there is little to do for it, and it would take
            half of the time.
    """
    from scipy import optimize

    options = {"presolve": presolve, "mip_rel_gap": tolerance}
    options |= {} if time_limit is None else {"time_limit": time_limit}
    whole = np.ones_like(objective) if integrality is None else integrality
    with _silenced():
        return optimize.milp(objective, integrality=whole, bounds=(0, 1), constraints=constraints, options=options)


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
