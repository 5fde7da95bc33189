"""Which configurations a bench measures: random, uniform, one-off, with few bits, and spread evenly in size.

Explained in chapter 01.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from emq_lib.core.checks import bit_choices, random_source, whole_number
from emq_lib.core.costs import CostTable
from emq_lib.core.errors import ConfigLengthError, InvalidBitsError, InvalidParameterError

ONE_BIT_LAYERS = 3  # at most, in a configuration of the sample "one-bit"
DRAWS = 2_000  # in each strip of the stratified sample


def sample_configs(slots: int, choices: Sequence[int], count: int, *, rng: np.random.Generator) -> np.ndarray:
    """Return the uniform configurations followed by `count` distinct random ones that are not uniform.

    A larger count extends a smaller one: the first rows stay the same.

    Args:
        slots: S, the number of searchable layers.
        choices: the B allowed widths.
        count: how many random configurations.
        rng: source of randomness.

    Returns:
        int8 array of shape (B + count, S).

    Raises:
        InvalidParameterError: there are not that many different configurations, or a number of slots or configurations
            that is none, or no generator.
        InvalidBitsError: choices that are none.
    """
    slots, choices, count, rng = _checked(slots, choices, count, rng)
    possible = len(choices) ** slots - len(choices)
    if count > possible:
        raise InvalidParameterError(f"asked for {count} configurations, but only {possible} are not uniform.")
    found = {(bits,) * slots: None for bits in choices}
    while len(found) < len(choices) + count:
        found.setdefault(tuple(int(bits) for bits in rng.choice(choices, size=slots)), None)
    return np.array(list(found), dtype=np.int8)


def one_off_configs(slots: int, choices: Sequence[int]) -> np.ndarray:
    """Return the configurations that change one layer of the uniform one at the middle choice.

    Args:
        slots: S, the number of searchable layers.
        choices: the B allowed widths.

    Returns:
        int8 array of shape (S (B - 1), S).

    Raises:
        InvalidParameterError: a number of slots that is none.
        InvalidBitsError: choices that are none.

    >>> one_off_configs(2, (2, 3)).tolist()
    [[2, 3], [3, 2]]
    """
    slots, choices = whole_number(slots, "slots", 1), bit_choices(choices)
    middle = choices[len(choices) // 2]
    configs = np.full((slots, len(choices) - 1, slots), middle, dtype=np.int8)
    for slot in range(slots):
        configs[slot, :, slot] = [bits for bits in choices if bits != middle]
    return configs.reshape(-1, slots)


def one_bit_configs(slots: int, choices: Sequence[int], count: int, *, rng: np.random.Generator) -> np.ndarray:
    """Return distinct random configurations in which one, two or three layers, as often each, have 1 bit instead.

    Few enough that the network still works: with every layer free to have 1 bit, most configurations guess. A larger
    count extends a smaller one.

    Args:
        slots: S, the number of searchable layers.
        choices: the B widths of the other layers, 1 not among them.
        count: how many.
        rng: source of randomness.

    Returns:
        int8 array of shape (count, S).

    Raises:
        InvalidParameterError: more than half of the different configurations, or a number of slots or configurations
            that is none, or no generator.
        InvalidBitsError: choices that are none, or 1 among them.
    """
    slots, choices, count, rng = _checked(slots, choices, count, rng)
    if 1 in choices:
        raise InvalidBitsError(f"the widths of the layers that keep more than 1 bit must not hold 1, got {choices}.")
    most = min(ONE_BIT_LAYERS, slots)
    possible = sum(math.comb(slots, few) * len(choices) ** (slots - few) for few in range(1, most + 1))
    if count > possible // 2:
        raise InvalidParameterError(f"asked for {count} of {possible} configurations with 1 to {most} layers at 1 bit.")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        config = rng.choice(choices, size=slots)
        config[rng.choice(slots, size=rng.integers(1, most + 1), replace=False)] = 1
        found.setdefault(tuple(map(int, config)), None)
    return np.array(list(found), dtype=np.int8).reshape(count, slots)


def _checked(
    slots: int, choices: Iterable[int], count: int, rng: np.random.Generator
) -> tuple[int, tuple[int, ...], int, np.random.Generator]:
    """Return what a sample is drawn by, after checking it."""
    whole = whole_number(slots, "slots", 1), bit_choices(choices), whole_number(count, "count", 0)
    return *whole, random_source(rng)


def stratified_configs(
    cost: CostTable, choices: Sequence[int], count: int, *, rng: np.random.Generator, exclude: Iterable = ()
) -> np.ndarray:
    """Return distinct configurations spread evenly over the cost, from the cheapest to the dearest.

    The range of the cost is cut into `count` strips. Each strip gives one configuration, drawn uniformly from those in
    it: entries are drawn independently with probabilities proportional to exp(t cost), where t makes the expected cost
    the middle of the strip, and the first new draw within the strip is taken. Given its cost, such a draw is uniform.
    If none of 2,000 draws lies in the strip, the new one that is closest to it is taken.

    Args:
        cost: its table has shape (S, B).
        choices: the B allowed widths.
        count: how many.
        rng: source of randomness.
        exclude: configurations that must not be among them.

    Returns:
        int8 array of shape (count, S), by increasing cost.

    Raises:
        InvalidParameterError: there are not that many different configurations, or a number of configurations that is
            none, or no generator.
        InvalidBitsError: choices that are none, or not as many as the table has columns.
        ConfigLengthError: an excluded configuration does not have S entries.
    """
    slots, choices, count, rng = _checked(len(cost.table), choices, count, rng)
    if cost.table.shape[1] != len(choices):
        raise InvalidBitsError(
            f"the {cost.name} is known for {cost.table.shape[1]} widths, not for those of {choices}."
        )
    table, taken = cost.table, {tuple(map(int, config)) for config in exclude}
    if any(len(config) != slots for config in taken):
        raise ConfigLengthError(f"an excluded configuration does not have {slots} bit widths.")
    if count + len(taken) > len(choices) ** slots:
        raise InvalidParameterError(f"asked for {count} more configurations than the {len(taken)} taken; too many.")
    edges = np.linspace(table.min(axis=1).sum(), table.max(axis=1).sum(), count + 1)
    found = []
    for left, right in itertools.pairwise(edges):
        cumulative = _tilted(table, (left + right) / 2).cumsum(axis=1)
        draws = (rng.random((DRAWS, slots, 1)) > cumulative[:, :-1]).sum(axis=2)
        totals = np.take_along_axis(table[None], draws[:, :, None], axis=2).sum(axis=(1, 2))
        outside = np.maximum(np.maximum(left - totals, totals - right), 0)
        candidates = np.asarray(choices)[draws[np.argsort(outside, kind="stable")]]
        anywhere = (rng.choice(choices, size=slots) for _ in itertools.count())  # once a strip is used up
        new = (tuple(map(int, config)) for config in itertools.chain(candidates, anywhere))
        config = next(config for config in new if config not in taken)
        taken.add(config)
        found.append(config)
    configs = np.array(found, dtype=np.int8).reshape(count, slots)
    return configs[np.argsort(cost.total(configs, choices), kind="stable")]


def _tilted(table: np.ndarray, mean: float) -> np.ndarray:
    """Return the probabilities proportional to exp(t table) in each row whose expected sum is `mean`, shape (S, B)."""
    scaled = table / table.max()

    def probabilities(t: float) -> np.ndarray:
        return softmax(t * scaled, axis=1)

    def excess(t: float) -> float:
        return (probabilities(t) * table).sum() - mean

    ends = (-1e6, 1e6)
    if excess(ends[0]) >= 0 or excess(ends[1]) <= 0:
        return probabilities(ends[0] if excess(ends[0]) >= 0 else ends[1])
    return probabilities(brentq(excess, *ends))
