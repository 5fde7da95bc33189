"""Scores of configurations: tables, matrices of pairs, and how the parts of slots are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from emq_lib.core.costs import choice_indices, selected


def is_table(scores: np.ndarray, choices: tuple[int, ...]) -> bool:
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


def score(scores: np.ndarray, configs: np.ndarray, choices: tuple[int, ...], *, aggregation: str = "sum") -> np.ndarray:
    """Return the score of each configuration.

    Args:
        scores: table (S, B) or matrix of pairs (S B, S B).
        configs: bits, shape (N, S).
        choices: the B allowed widths.
        aggregation: how slots are combined: a key of :data:`AGGREGATIONS`. A slot contributes the entry that it
            selects, or the sum of its pairs' entries; "survival" measures them by the mean size of an entry.

    Returns:
        float64 array of shape (N,).

    >>> score(np.array([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]]), np.array([[2, 4]]), (2, 3, 4))
    array([41.])
    """
    table = is_table(scores, choices)
    slots = len(scores) // (1 if table else len(choices))
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
