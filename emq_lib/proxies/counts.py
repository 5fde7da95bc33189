"""Rank correlations of many resamples at once, each given by how often it draws every configuration.

Values are sorted once: among sorted values a mean rank is a running sum of counts, so that no resample is sorted again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emq_lib.core.checks import real_number
from emq_lib.core.errors import InvalidParameterError

UNEXPLAINED = 1e-6  # share of a variance below which nothing is left of it


def kept_count(n: int, percent: float) -> int:
    """Return how many of n configurations a share is: the nearest number (a half to the even one), one or more.

    Raises:
        InvalidParameterError: the share is not above 0 and up to 100.
    """
    if real_number(percent, "a share in percent", 0) > 100:
        raise InvalidParameterError(f"a share in percent must lie above 0 and up to 100, got {percent}.")
    return max(1, round(n * percent / 100))


def rank_function(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return what turns counts (R, N), how often each value is drawn, into its mean rank in each resample, (R, N).

    Ranks come less their mean.

    Args:
        values: shape (N,).
    """
    order = np.argsort(values, kind="stable")
    new = np.append(True, np.diff(values[order]) > 0)
    starts, group = np.flatnonzero(new), np.empty(len(values), dtype=np.intp)
    group[order] = np.cumsum(new) - 1

    def ranks(counts: np.ndarray) -> np.ndarray:
        tied = np.add.reduceat(counts[:, order], starts, axis=1)
        total = np.cumsum(tied, axis=1)
        return (total - tied / 2 - total[:, -1:] / 2)[:, group]

    return ranks


def rho_of_counts(scores: np.ndarray, accuracy: np.ndarray, percent: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from counts (R, N) to rho at a share in each resample, (R,); NaN where it ranks nothing.

    Args:
        scores: shape (N,).
        accuracy: shape (N,).
        percent: share that is kept.
    """
    best = np.argsort(-scores, kind="stable")
    score_ranks, accuracy_ranks = rank_function(scores[best]), rank_function(accuracy[best])

    def rho(counts: np.ndarray) -> np.ndarray:
        counts = counts[:, best]
        if percent < 100:
            before = np.cumsum(counts, axis=1) - counts
            keep = kept_count(int(counts[0].sum()), percent)
            counts = np.clip(keep - before, 0, counts)
        x, y = score_ranks(counts), accuracy_ranks(counts)
        norm = np.sqrt(np.einsum("rn,rn,rn->r", counts, x, x) * np.einsum("rn,rn,rn->r", counts, y, y))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.einsum("rn,rn,rn->r", counts, x, y) / norm

    return rho


def partial_of_counts(
    scores: np.ndarray, accuracy: np.ndarray, covariates: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from counts (R, N) to partial rho in each resample, (R,); NaN where nothing is left.

    Args:
        scores: shape (N,).
        accuracy: shape (N,).
        covariates: shape (N, K).
    """
    functions = [rank_function(values) for values in (scores, accuracy, *covariates.T)]

    def partial(counts: np.ndarray) -> np.ndarray:
        ranks = np.stack([ranks(counts) for ranks in functions], axis=1)
        products = (ranks * counts[:, None]) @ ranks.transpose(0, 2, 1)
        norm = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
        norm = np.where(norm > 0, norm, np.inf)  # a constant explains nothing
        rho = products / norm[:, :, None] / norm[:, None, :]
        explained = rho[:, :2, 2:] @ np.linalg.pinv(rho[:, 2:, 2:], rcond=1e-10, hermitian=True) @ rho[:, 2:, :2]
        left = rho[:, :2, :2] - explained
        with np.errstate(invalid="ignore", divide="ignore"):
            value = left[:, 0, 1] / np.sqrt(left[:, 0, 0] * left[:, 1, 1])
        return np.where(np.minimum(left[:, 0, 0], left[:, 1, 1]) < UNEXPLAINED, np.nan, value)

    return partial
