"""Scores of configurations: tables, matrices of pairs, and how the parts of slots are combined.

Explained in chapter 02.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from emq_lib.core.checks import bit_choices, real_numbers
from emq_lib.core.costs import choice_indices, selected
from emq_lib.core.errors import InvalidParameterError, InvalidScoreError


def is_table(scores: np.ndarray, choices: Sequence[int]) -> bool:
    """Return whether these are the scores of a separable proxy (S, B), and not a matrix of pairs (S B, S B)."""
    return scores.shape[1] == len(choices)


def _survival(parts: np.ndarray) -> np.ndarray:
    """Add up, layer after layer, what is left of a signal that each layer damages by its share of the damage."""
    return np.exp(np.cumsum(parts, axis=1).clip(max=50)).sum(axis=1)


# How the parts (N, S) that the slots of N configurations contribute make a score. All but the sum and the sum weighted
# by depth depend on which layers meet.
AGGREGATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda parts: parts.sum(axis=1),
    "depth": lambda parts: (parts * np.arange(1, parts.shape[1] + 1)).sum(axis=1),
    "weakest": lambda parts: parts.min(axis=1),
    "survival": _survival,
}
SEPARABLE = ("sum", "depth")


def score(scores: np.ndarray, configs: np.ndarray, choices: Sequence[int], *, aggregation: str = "sum") -> np.ndarray:
    """Return the score of each configuration.

    Args:
        scores: table (S, B) or matrix of pairs (S B, S B).
        configs: bits, shape (N, S).
        choices: the B allowed widths.
        aggregation: how slots are combined: a key of :data:`AGGREGATIONS`. A slot contributes the entry that it
            selects, or the sum of its pairs' entries; "survival" measures them by the mean size of an entry.

    Returns:
        float64 array of shape (N,).

    Raises:
        InvalidScoreError: the scores are no finite real numbers, or have another shape.
        InvalidParameterError: no such aggregation.
        ConfigLengthError, InvalidBitsError: see :func:`emq_lib.core.checks.bit_choices` and
            :func:`emq_lib.core.costs.choice_indices`.

    >>> score(np.array([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]]), np.array([[2, 4]]), (2, 3, 4))
    array([41.])
    """
    if not isinstance(aggregation, str) or aggregation not in AGGREGATIONS:
        raise InvalidParameterError(f"unknown aggregation {aggregation!r}; known: {', '.join(AGGREGATIONS)}.")
    scores, choices = real_numbers(scores, "scores", ndim=2), bit_choices(choices)
    table = is_table(scores, choices)
    slots, rest = (len(scores), 0) if table else divmod(len(scores), len(choices))
    if not scores.size or (not table and (rest or scores.shape[1] != len(scores))):
        raise InvalidScoreError(f"{scores.shape} is neither a table (S, {len(choices)}) nor a matrix of pairs.")
    if table:
        parts = selected(scores, configs, choices)
    else:
        chosen = choice_indices(configs, choices, slots) + len(choices) * np.arange(slots)
        taken = np.zeros((len(chosen), len(scores)))
        np.put_along_axis(taken, chosen, 1.0, axis=1)
        parts = np.take_along_axis(taken @ scores.T, chosen, axis=1)  # of each row the entries in the chosen columns
    if aggregation == "survival":
        parts = parts / (np.abs(scores).mean() or 1.0) / (1 if table else slots)
    return AGGREGATIONS[aggregation](parts)
