"""The multiple-choice knapsack problem: what is asked for, its normal form, and a greedy answer.

Explained in chapter 04.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emq_lib.core.checks import bit_choices, real_number, real_numbers
from emq_lib.core.costs import WIDEST_CHOICE, CostTable
from emq_lib.core.errors import InvalidParameterError, InvalidScoreError

_SMALLEST_SHARE = 1e-12  # of a remaining budget; a step that costs less counts as this


@dataclass(frozen=True)
class Knapsack:
    """An allocation as it is asked for: maximise the selected scores while each cost with a budget stays within it.

    Attributes:
        scores: float64, shape (S, B).
        costs: name -> cost table, float64, of that shape.
        budgets: name -> finite upper bound.
        choices: the B allowed widths, increasing.
    """

    scores: np.ndarray
    costs: Mapping[str, CostTable]
    budgets: Mapping[str, float]
    choices: tuple[int, ...]

    @classmethod
    def checked(
        cls,
        scores: np.ndarray,
        costs: Mapping[str, CostTable],
        budgets: Mapping[str, float],
        choices: Sequence[int],
        *,
        layers: Sequence[str] | None = None,
    ) -> Knapsack:
        """Check what a caller gives.

        Args:
            scores: shape (S, B).
            costs: name -> cost table of shape (S, B).
            budgets: name -> upper bound.
            choices: the B allowed widths, increasing.
            layers: names of the S searchable layers, for messages.

        Raises:
            InvalidBitsError: choices that are no widths, or do not increase.
            InvalidScoreError: scores of the wrong shape or kind, NaN or infinite; the message names the slot.
            InvalidParameterError: a cost or a budget that is none, not finite, or of the wrong shape, or a budget
                without a cost.
        """
        choices = allowed_widths(choices)
        scores = _checked_scores(scores, choices, layers)
        costs = _checked_costs(costs, scores.shape)
        return cls(scores, costs, _checked_budgets(budgets, costs), choices)

    def normal_form(self) -> Problem:
        """Shift every row of scores and costs to start at zero."""
        tables = np.array([self.costs[name].table for name in self.budgets]).reshape(-1, *self.scores.shape)
        excesses = tables - tables.min(axis=2, keepdims=True)
        smallest = np.array([self.costs[name].smallest for name in self.budgets])
        limits = np.array([budget + rounding(self.costs[name], budget) for name, budget in self.budgets.items()])
        slacks = limits - smallest
        regrets = self.scores.max(axis=1, keepdims=True) - self.scores
        return Problem(regrets, excesses, slacks, (excesses <= slacks[:, None, None]).all(axis=0))


@dataclass(frozen=True)
class Problem:
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


def allowed_widths(choices: Sequence[int]) -> tuple[int, ...]:
    """Return the choices of a table's columns: see :func:`emq_lib.core.checks.bit_choices`."""
    return bit_choices(choices, widest=WIDEST_CHOICE)


def checked_cost(cost: CostTable, name: str, columns: int, *, rows: int | None = None) -> CostTable:
    """Return a cost with a float64 table after checking it.

    Args:
        cost: the cost.
        name: of the cost, for messages.
        columns: B, the number of choices.
        rows: S, the number of searchable layers; None: any but none.

    Raises:
        InvalidParameterError: it is no cost table, of another shape, or holds what is no finite number.
    """
    if not isinstance(cost, CostTable):
        raise InvalidParameterError(f"The cost {name!r} must be a CostTable, got {type(cost).__name__}.")
    try:
        table = real_numbers(cost.table, "entries")
    except InvalidScoreError as error:
        raise InvalidParameterError(f"The cost {name!r} needs a finite table: {error}") from error
    if table.ndim != 2 or not len(table) or table.shape != (rows or len(table), columns):
        raise InvalidParameterError(
            f"The cost {name!r} needs a finite table with {rows or 'a number of'} rows, one per searchable layer, and "
            f"{columns} columns, one per choice; got shape {table.shape}."
        )
    return replace(cost, fixed=real_number(cost.fixed, f"The fixed part of the cost {name!r}"), table=table)


def _checked_scores(scores: np.ndarray, choices: tuple[int, ...], layers: Sequence[str] | None) -> np.ndarray:
    """Return the scores as float64 after checking shape and values."""
    scores = real_numbers(scores, "scores", finite=False)
    try:
        names = None if layers is None else list(layers)
    except TypeError as error:
        raise InvalidParameterError(f"layers must be the names of the searchable layers, got {layers!r}.") from error
    if scores.ndim != 2 or not scores.size or scores.shape != (len(scores if names is None else names), len(choices)):
        expected = "one row per searchable layer" if names is None else f"{len(names)} rows, one per searchable layer,"
        raise InvalidScoreError(
            f"A score table needs {expected} and {len(choices)} columns, one per choice of {choices}; "
            f"got shape {scores.shape}."
        )
    if not np.isfinite(scores).all():
        slot, choice = np.argwhere(~np.isfinite(scores))[0]
        named = f"slot {slot}" if names is None else f"slot {slot} ({names[slot]})"
        raise InvalidScoreError(
            f"The score of {named} at {choices[choice]} bits is {scores[slot, choice]}. "
            "Repair the proxy: every entry of its table must be finite."
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(np.abs(scores).max(axis=1).sum() * 2):
            raise InvalidScoreError("The scores are so large that their sum is infinite. Divide them by a constant.")
    return scores


def _checked_costs(costs: Mapping[str, CostTable], shape: tuple[int, ...]) -> dict[str, CostTable]:
    if not isinstance(costs, Mapping):
        raise InvalidParameterError(f"costs must be a dictionary of names and cost tables, got {costs!r:.60}.")
    return {name: checked_cost(cost, name, shape[1], rows=shape[0]) for name, cost in costs.items()}


def _checked_budgets(budgets: Mapping[str, float], costs: Mapping[str, CostTable]) -> dict[str, float]:
    if not isinstance(budgets, Mapping):
        raise InvalidParameterError(f"budgets must be a dictionary of names and upper bounds, got {budgets!r:.60}.")
    if unknown := [name for name in budgets if name not in costs]:
        raise InvalidParameterError(f"Budgets without a cost table: {unknown}; the costs given are {list(costs)}.")
    return {name: real_number(budget, f"The budget of {name!r}") for name, budget in budgets.items()}


def rounding(cost: CostTable, budget: float) -> float:
    """Return how far a float64 sum of S + 1 terms may lie above its true value: far below 1 for costs in whole units.

    Without it uniform 3 bits would miss a budget of 3 bits on average, because shares of parameters do not sum to one.
    """
    magnitude = max(abs(budget), abs(cost.fixed) + np.abs(cost.table).max(axis=1).sum())
    return float((len(cost.table) + 1) * np.finfo(np.float64).eps * magnitude)


def ascend(problem: Problem, selected: np.ndarray | None = None) -> np.ndarray | None:
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
