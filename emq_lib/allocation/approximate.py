"""Allocation without a proof: for scores that are no sums over layers, and as published code does it, for comparison.

Explained in chapter 04.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from emq_lib.allocation.exact import Allocation, relaxation
from emq_lib.core.costs import CostTable, choice_indices, gather
from emq_lib.core.errors import InfeasibleBudgetError, InvalidScoreError

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
        choices: the B allowed widths.
        rng: source of randomness.
    """
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
        InvalidScoreError: a score is not finite.
    """
    names = list(budgets)
    for name in names:
        if costs[name].smallest > budgets[name]:
            raise InfeasibleBudgetError(
                f"No configuration fits {name} <= {budgets[name]:.12g}: the smallest has {costs[name].smallest:.12g} "
                f"{costs[name].unit}. Raise the budget."
            )
    bounding = itertools.cycle(names)
    drawn = {random_within(costs[name], budgets[name], choices, rng=rng) for name in itertools.islice(bounding, pool)}
    configs = np.array(sorted(drawn | {tuple(map(int, start)) for start in starts}))
    configs = configs[_fits(configs, costs, budgets, choices)]
    if not len(configs):
        raise InfeasibleBudgetError(f"None of {pool} random configurations is within {dict(budgets)}. Raise a budget.")
    order = np.argsort(-_scored(score, configs), kind="stable")[:STARTS]
    ends = [_climb(score, configs[index], costs, budgets, choices) for index in order]
    best = max(ends, key=lambda end: end[1])
    return _described(best[0], best[1], costs, choices)


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
    return _described(configs[found.argmax()], float(found.max()), costs, choices)


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
    """
    root = np.asarray(root)
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
    return _described(configs[found.argmax()], float(found.max()), costs, choices)


def _fits(
    configs: np.ndarray, costs: Mapping[str, CostTable], budgets: Mapping[str, float], choices: Sequence[int]
) -> np.ndarray:
    fits = np.ones(len(configs), dtype=bool)
    for name, budget in budgets.items():
        fits &= costs[name].total(configs, choices) <= budget
    return fits


def _scored(score: Score, configs: np.ndarray) -> np.ndarray:
    found = np.asarray(score(configs), dtype=np.float64)
    if not np.isfinite(found).all():
        raise InvalidScoreError("the score of a configuration is NaN or infinite: nothing can be allocated by it.")
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


def _described(config: np.ndarray, value: float, costs: Mapping[str, CostTable], choices: Sequence[int]) -> Allocation:
    totals = {name: float(cost.total([config], choices)[0]) for name, cost in costs.items()}
    return Allocation(tuple(map(int, config)), value, totals, gap=np.inf, optimal=False)
