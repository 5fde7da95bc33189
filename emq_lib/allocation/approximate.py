"""Allocation without a proof: for scores that are no sums over layers, and as published code does it, for comparison.

Explained in chapter 04.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from emq_lib.allocation.exact import Allocation, described, relaxation
from emq_lib.allocation.knapsack import Knapsack, allowed_widths, checked_cost, rounding
from emq_lib.core.checks import random_source, real_number, real_numbers, whole_number
from emq_lib.core.costs import CostTable, choice_indices, gather
from emq_lib.core.errors import InfeasibleBudgetError, InvalidParameterError, InvalidScoreError

POOL, STARTS = 2_000, 10
MUTANTS, MUTATED, RELEASED = 50_000, (1, 2, 3), (0.1, 0.3, 0.6)  # of the released code; the last for three choices
ROUNDED = 12  # fractional widths that are rounded in every combination
Score = Callable[[np.ndarray], np.ndarray]


def random_within(
    cost: CostTable, budget: float, choices: Sequence[int], *, rng: np.random.Generator
) -> tuple[int, ...]:
    """Draw a random configuration that uses a budget up: from the smallest one, raise random layers while they fit.

    Args:
        cost: table of shape (S, B), increasing in the width.
        budget: its upper bound, at least the smallest reachable cost.
        choices: the B allowed widths, increasing.
        rng: source of randomness.

    Raises:
        InfeasibleBudgetError: a budget below the smallest cost.
        InvalidBitsError: choices that are no widths, or do not increase.
        InvalidParameterError: a cost that is none or falls with the width, no finite budget, or no generator.
    """
    choices = allowed_widths(choices)
    cost = _rising(checked_cost(cost, "cost", len(choices)), "cost")
    _check_reach(cost, "cost", real_number(budget, "budget"))
    return _raised_at_random(cost, budget, choices, rng=random_source(rng))


def _raised_at_random(
    cost: CostTable, budget: float, choices: tuple[int, ...], *, rng: np.random.Generator
) -> tuple[int, ...]:
    """Do what :func:`random_within` does, unchecked."""
    selected = np.zeros(len(cost.table), dtype=int)
    left = budget - cost.smallest
    for slot in rng.permutation(np.repeat(np.arange(len(selected)), len(choices) - 1)):
        step = cost.table[slot, selected[slot] + 1] - cost.table[slot, selected[slot]]
        if step <= left:
            selected[slot] += 1
            left -= step
    return tuple(int(choices[index]) for index in selected)


def allocate_locally(
    score: Score,
    costs: Mapping[str, CostTable],
    budgets: Mapping[str, float],
    choices: Sequence[int],
    *,
    rng: np.random.Generator,
    starts: Sequence[Sequence[int]] = (),
    pool: int = POOL,
) -> Allocation:
    """Allocate by a score of any form: the best of a random pool, each of the best ten improved step by step.

    A step changes the width of one slot, or of two, and goes to the best neighbour within the budgets until none is
    better. Inexact: `optimal` is False and `gap` infinite, for nothing is known of what was not looked at.

    Args:
        score: configurations (N, S) -> scores (N,); higher is better.
        costs: name -> cost table of shape (S, B), increasing in the width.
        budgets: name -> upper bound of one or more costs.
        choices: the B allowed widths, increasing.
        rng: source of randomness.
        starts: configurations that join the pool, e.g. the exact answer for a score that is a sum.
        pool: random configurations that are scored first; each uses one of the budgets up.

    Raises:
        InfeasibleBudgetError: no configuration of the pool is within the budgets.
        InvalidBitsError: choices that are no widths, or do not increase; a start with other widths.
        ConfigLengthError: a start of another length.
        InvalidScoreError: the score does not give one finite number per configuration.
        InvalidParameterError: a cost or a budget that is none, no budget, a cost that falls with the width, no
            generator, an empty pool.
    """
    costs, budgets, choices = _checked(costs, budgets, choices)
    rng, pool = random_source(rng), whole_number(pool, "pool", 1)
    for name, budget in budgets.items():
        _check_reach(_rising(costs[name], name), name, budget)
    slots = len(next(iter(costs.values())).table)
    drawn = {
        _raised_at_random(costs[name], budgets[name], choices, rng=rng)
        for name in itertools.islice(itertools.cycle(budgets), pool)
    }
    drawn |= {tuple(np.array(choices)[choice_indices(start, choices, slots)[0]].tolist()) for start in starts}
    configs = np.array(sorted(drawn))
    configs = configs[_fits(configs, costs, budgets, choices)]
    if not len(configs):
        raise InfeasibleBudgetError(f"None of {pool} random configurations is within {dict(budgets)}. Raise a budget.")
    order = np.argsort(-_scored(score, configs), kind="stable")[:STARTS]
    ends = [_climb(score, configs[index], costs, budgets, choices) for index in order]
    best = max(ends, key=lambda end: end[1])
    return described(best[0], best[1], costs, choices)


def allocate_rounded(
    scores: np.ndarray, costs: Mapping[str, CostTable], budgets: Mapping[str, float], choices: Sequence[int]
) -> Allocation:
    """Allocate as OMPQ (Ma et al. 2023): solve the relaxed program, then round what is fractional up or down.

    Their program is linear in the width; here each slot mixes its widths, which is the same for a score that is linear
    in them. Of up to twelve fractional slots every combination is tried and the best one within the budgets stays.

    Args:
        scores: shape (S, B); higher is better.
        costs: name -> cost table of shape (S, B).
        budgets: name -> upper bound.
        choices: the B allowed widths, increasing.

    Raises:
        InfeasibleBudgetError: no configuration fits, or no rounding does.
        InvalidBitsError, InvalidScoreError, InvalidParameterError: as :func:`emq_lib.allocation.exact.allocate`.
    """
    shares, _, _ = relaxation(scores, costs, budgets, choices)
    average = shares @ np.arange(len(choices))
    lower = np.floor(average + 1e-9).astype(int)
    fractional = np.flatnonzero(average - lower > 1e-6)[:ROUNDED]
    candidates = np.repeat(lower[None], 2 ** len(fractional), axis=0)
    candidates[:, fractional] += np.array(list(itertools.product((0, 1), repeat=len(fractional))), dtype=int)
    configs = np.asarray(choices)[candidates]
    configs = configs[_fits(configs, costs, budgets, choices)]
    if not len(configs):
        raise InfeasibleBudgetError(f"No rounding of the relaxed solution is within {dict(budgets)}. Raise a budget.")
    found = gather(scores, configs, choices)
    return described(configs[found.argmax()], float(found.max()), costs, choices)


def allocate_by_mutation(
    score: Score,
    root: Sequence[int],
    costs: Mapping[str, CostTable],
    budgets: Mapping[str, float],
    choices: Sequence[int],
    *,
    rng: np.random.Generator,
) -> Allocation:
    """Allocate as the released code of EMQ: 50,000 mutants of a root, of those within the budgets the best score.

    A mutant draws one to three slots afresh, the widths 2, 3 and 4 with probabilities .1, .3 and .6 (uniformly for
    other choices). Mutants are of the root, never of each other.

    Args:
        score: configurations (N, S) -> scores (N,); higher is better.
        root: a configuration; the release takes OMPQ's answer.
        costs: name -> cost table of shape (S, B).
        budgets: name -> upper bound.
        choices: the B allowed widths, increasing.
        rng: source of randomness.

    Raises:
        InfeasibleBudgetError: no mutant is within the budgets.
        ConfigLengthError, InvalidBitsError: a root of another length, or with other widths than the choices.
        InvalidScoreError, InvalidParameterError: as :func:`allocate_locally`.
    """
    costs, budgets, choices = _checked(costs, budgets, choices)
    rng = random_source(rng)
    root = np.array(choices)[choice_indices(root, choices, len(next(iter(costs.values())).table))[0]]
    chances = RELEASED if len(choices) == len(RELEASED) else None
    configs = np.repeat(root[None], MUTANTS, axis=0)
    counts = rng.choice(MUTATED, size=MUTANTS)
    places = rng.random((MUTANTS, len(root))).argsort(axis=1)[:, : max(MUTATED)]
    drawn = rng.choice(choices, size=places.shape, p=chances)
    for turn in range(places.shape[1]):
        rows = np.flatnonzero(counts > turn)
        configs[rows, places[rows, turn]] = drawn[rows, turn]
    configs = np.unique(np.concatenate([root[None], configs]), axis=0)
    configs = configs[_fits(configs, costs, budgets, choices)]
    if not len(configs):
        raise InfeasibleBudgetError(f"No mutant of the root is within {dict(budgets)}. Take a smaller root.")
    found = _scored(score, configs)
    return described(configs[found.argmax()], float(found.max()), costs, choices)


def _checked(
    costs: Mapping[str, CostTable], budgets: Mapping[str, float], choices: Sequence[int]
) -> tuple[Mapping[str, CostTable], Mapping[str, float], tuple[int, ...]]:
    """Return costs, budgets and choices after checking them; there must be a budget to search within."""
    widths, slots = allowed_widths(choices), 1
    for name, cost in costs.items() if isinstance(costs, Mapping) else ():
        slots = len(checked_cost(cost, name, len(widths)).table)
    asked = Knapsack.checked(np.zeros((slots, len(widths))), costs, budgets, widths)
    if not asked.budgets:
        raise InvalidParameterError("Give a budget: without one every layer takes its best width.")
    return asked.costs, asked.budgets, asked.choices


def _rising(cost: CostTable, name: str) -> CostTable:
    """Return a cost after checking that no width costs less than a narrower one."""
    if (np.diff(cost.table, axis=1) < 0).any():
        raise InvalidParameterError(
            f"The cost {name!r} falls with the width; configurations are raised while they fit."
        )
    return cost


def _check_reach(cost: CostTable, name: str, budget: float) -> None:
    if cost.smallest > budget + rounding(cost, budget):
        raise InfeasibleBudgetError(
            f"No configuration fits {name} <= {budget:.12g}: the smallest has {cost.smallest:.12g} {cost.unit}. "
            "Raise the budget."
        )


def _fits(
    configs: np.ndarray, costs: Mapping[str, CostTable], budgets: Mapping[str, float], choices: Sequence[int]
) -> np.ndarray:
    fits = np.ones(len(configs), dtype=bool)
    for name, budget in budgets.items():
        fits &= costs[name].total(configs, choices) <= budget
    return fits


def _scored(score: Score, configs: np.ndarray) -> np.ndarray:
    found = real_numbers(score(configs), "scores of configurations")
    if found.shape != (len(configs),):
        raise InvalidScoreError(f"a score must give one number per configuration; {len(configs)} gave {found.shape}.")
    return found


def _neighbours(config: np.ndarray, choices: Sequence[int]) -> np.ndarray:
    """Return every configuration with another width in one slot or in two."""
    indices = choice_indices(config, choices, len(config))[0]
    found = []
    for count in (1, 2):
        for slots in itertools.combinations(range(len(config)), count):
            others = [[b for at, b in enumerate(choices) if at != indices[slot]] for slot in slots]
            for widths in itertools.product(*others):
                changed = config.copy()
                changed[list(slots)] = widths
                found.append(changed)
    return np.array(found)


def _climb(
    score: Score,
    config: np.ndarray,
    costs: Mapping[str, CostTable],
    budgets: Mapping[str, float],
    choices: Sequence[int],
) -> tuple[np.ndarray, float]:
    """Go to the best neighbour within the budgets until none is better."""
    value = float(_scored(score, config[None])[0])
    while True:
        around = _neighbours(config, choices)
        around = around[_fits(around, costs, budgets, choices)]
        if not len(around):
            return config, value
        found = _scored(score, around)
        if found.max() <= value:
            return config, value
        config, value = around[found.argmax()], float(found.max())
