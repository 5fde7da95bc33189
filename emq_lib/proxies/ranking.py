"""Rank correlations: how well scores order configurations, and the accuracy that trusting them loses.

Explained in chapter 02.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from emq_lib.core.errors import InvalidParameterError, InvalidScoreError

PERCENTS = (20, 50, 100)
MINIMUM = 30
_UNEXPLAINED = 1e-6  # share of a variance below which nothing is left of it


def spearman(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Return Spearman's rho, ties given their mean rank.

    >>> spearman([1, 2, 3, 4], [10, 20, 40, 30])
    0.8
    """
    return rho_at(scores, accuracy, 100)


def rho_at(scores: np.ndarray, accuracy: np.ndarray, percent: float) -> float:
    """Return Spearman's rho among the configurations that the scores rank highest: the paper's metric.

    Args:
        scores: shape (N,); higher is better.
        accuracy: shape (N,).
        percent: share that is kept, above 0 and up to 100, rounded to the nearest number of configurations (a half
            to the even one); of equal scores the first ones stay.

    Raises:
        InvalidScoreError: lengths differ, fewer than 3 configurations stay, a value is not finite or all are equal.
        InvalidParameterError: the share is not one.
    """
    scores, accuracy = _checked(scores, accuracy)
    kept = _best(scores, percent)
    if len(kept) < 3:
        raise InvalidScoreError(
            f"{percent} % of {len(scores)} configurations are {len(kept)}; a rank correlation needs 3."
        )
    for name, values in (("score", scores[kept]), ("accuracy", accuracy[kept])):
        if (values == values[0]).all():
            raise InvalidScoreError(f"the best {percent} % all have the same {name}, so they rank nothing.")
    return float(fitness_terms(scores[None], accuracy, (percent,))[0, 0])


def fitness(scores: np.ndarray, accuracy: np.ndarray, percents: Sequence[float] = PERCENTS) -> float:
    """Return the mean of rho at the given shares: the paper's fitness.

    Raises:
        InvalidScoreError: see :func:`rho_at`.
    """
    return float(np.mean([rho_at(scores, accuracy, percent) for percent in percents]))


def fitness_many(scores: np.ndarray, accuracy: np.ndarray, percents: Sequence[float] = PERCENTS) -> np.ndarray:
    """Return the fitness of many proxies at once.

    Args:
        scores: shape (P, N).
        accuracy: shape (N,).
        percents: shares whose rho is averaged.

    Returns:
        shape (P,); NaN where scores are not finite, or equal within one of the shares, or a share keeps fewer than 3.

    Raises:
        InvalidScoreError: shapes do not fit, or an accuracy is not finite.
    """
    return fitness_terms(scores, accuracy, percents).mean(axis=1)


def fitness_terms(scores: np.ndarray, accuracy: np.ndarray, percents: Sequence[float]) -> np.ndarray:
    """Return rho at each share for each row of scores, shape (P, len(percents)); NaN as in :func:`fitness_many`."""
    scores, accuracy = np.asarray(scores, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1:] != accuracy.shape:
        raise InvalidScoreError(f"scores {scores.shape} need one column for each of the accuracies {accuracy.shape}.")
    if not np.isfinite(accuracy).all():
        raise InvalidScoreError("the accuracies hold NaN or infinity: measure those configurations again.")
    order = np.argsort(-scores, axis=1, kind="stable")
    terms = []
    for percent in percents:
        kept = order[:, : _count(scores.shape[1], percent)]
        rho = _correlation(np.take_along_axis(scores, kept, axis=1), accuracy[kept])
        terms.append(rho if kept.shape[1] >= 3 else np.full(len(scores), np.nan))
    return np.where(np.isfinite(scores).all(axis=1)[:, None], np.stack(terms, axis=1), np.nan)


def kendall(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Return Kendall's tau-b."""
    return float(stats.kendalltau(*_checked(scores, accuracy)).statistic)


def weighted_tau(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Return Kendall's tau with hyperbolic weights, in which exchanges among the best count most (Vigna 2015)."""
    return float(stats.weightedtau(*_checked(scores, accuracy)).statistic)


def logit_pearson(scores: np.ndarray, top1: np.ndarray) -> float:
    """Return Pearson's correlation of scores with log(a / (1 - a)), where a is the top-1 accuracy.

    Args:
        scores: shape (N,).
        top1: in percent, shape (N,).

    Raises:
        InvalidScoreError: see :func:`rho_at`; or an accuracy is not inside 0 to 100.
    """
    scores, top1 = _checked(scores, top1)
    if not ((top1 > 0) & (top1 < 100)).all():
        raise InvalidScoreError("a logit needs accuracies inside 0 to 100 %.")
    return float(stats.pearsonr(scores, np.log(top1 / (100 - top1))).statistic)


def partial_rho(scores: np.ndarray, accuracy: np.ndarray, covariates: np.ndarray) -> float:
    """Return Spearman's partial correlation of scores and accuracy at fixed covariates.

    All columns are replaced by their ranks; those of the covariates are regressed out of the other two; what is left is
    correlated.

    Args:
        scores: shape (N,).
        accuracy: shape (N,).
        covariates: shape (N, K), e.g. size and BOPs.

    Returns:
        the correlation; NaN if scores or accuracies are a linear function of the covariates, in ranks or in values, up
        to a millionth of their variance. Nothing but rounding is then left to correlate: the proxy *is* size.

    Raises:
        InvalidScoreError: see :func:`rho_at`; or the covariates have another length or are not finite.
    """
    scores, accuracy = _checked(scores, accuracy)
    covariates = _checked_covariates(covariates, len(scores))
    if min(_unexplained(values, covariates) for values in (scores, accuracy)) < _UNEXPLAINED:
        return float("nan")
    return float(_partial_of_counts(scores, accuracy, covariates)(np.ones((1, len(scores)), dtype=np.int64))[0])


def regret(scores: np.ndarray, accuracy: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """Return the accuracy lost by trusting the scores among the configurations within a budget.

    The best measured accuracy within the budget minus that of the configuration with the highest score (of equal scores
    the first one). Both are looked up, so luck of the images makes the best one look a little better than it is.

    Args:
        scores: shape (N,).
        accuracy: shape (N,).
        costs: shape (N,).
        budget: upper bound on the cost.

    Raises:
        InvalidScoreError: no configuration fits, or costs are not one finite number for each configuration.
    """
    scores, accuracy = _within(scores, accuracy, costs, budget)
    return float(accuracy.max() - accuracy[scores.argmax()])


def _within(
    scores: np.ndarray, accuracy: np.ndarray, costs: np.ndarray, budget: float
) -> tuple[np.ndarray, np.ndarray]:
    scores, accuracy = _checked(scores, accuracy)
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != scores.shape or not np.isfinite(costs).all():
        raise InvalidScoreError(f"costs {costs.shape} must be one finite number for each of {len(scores)} scores.")
    fits = np.flatnonzero(costs <= budget)
    if not len(fits):
        raise InvalidScoreError(f"no configuration costs {budget} or less; the cheapest costs {np.min(costs)}.")
    return scores[fits], accuracy[fits]


def _checked(scores: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, accuracy = np.asarray(scores, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if scores.ndim != 1 or scores.shape != accuracy.shape or len(scores) < 3:
        raise InvalidScoreError(f"scores {scores.shape} and accuracies {accuracy.shape} must be 1-D, alike, 3 or more.")
    for name, values in (("scores", scores), ("accuracies", accuracy)):
        if not np.isfinite(values).all():
            raise InvalidScoreError(
                f"the {name} hold NaN or infinity at position {np.flatnonzero(~np.isfinite(values))[0]}."
            )
        if (values == values[0]).all():
            raise InvalidScoreError(f"the {name} are all equal, so they rank nothing.")
    return scores, accuracy


def _count(n: int, percent: float) -> int:
    if not 0 < percent <= 100:
        raise InvalidParameterError(f"a share must lie above 0 and up to 100 %, got {percent}.")
    return max(1, round(n * percent / 100))


def _best(scores: np.ndarray, percent: float) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[: _count(len(scores), percent)]


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's rho of each pair of rows, shape (P,); NaN where a row is constant."""
    x, y = (stats.rankdata(values, axis=1) for values in (x, y))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    norm = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, (x * y).sum(axis=1) / norm, np.nan)


def _checked_covariates(covariates: np.ndarray, n: int) -> np.ndarray:
    covariates = np.asarray(covariates, dtype=np.float64)
    if covariates.ndim != 2 or len(covariates) != n or not np.isfinite(covariates).all():
        raise InvalidScoreError(f"covariates {covariates.shape} must be finite, with one row for each of {n} scores.")
    return covariates


def _unexplained(values: np.ndarray, covariates: np.ndarray) -> float:
    """Return the share of a variance that no linear function of the covariates explains."""
    values, covariates = values - values.mean(), covariates - covariates.mean(axis=0)
    covariates = covariates / np.maximum(np.abs(covariates).max(axis=0), np.finfo(np.float64).tiny)
    values = values / np.abs(values).max()
    left = values - covariates @ np.linalg.lstsq(covariates, values, rcond=None)[0]
    return float((left**2).sum() / (values**2).sum())


def _rank_function(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return what turns counts (R, N), how often each value is drawn, into its mean rank in each resample, (R, N).

    Ranks come less their mean. Values are sorted once: among sorted values a mean rank is a running sum of counts.
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


def _partial_of_counts(
    scores: np.ndarray, accuracy: np.ndarray, covariates: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from counts (R, N) to partial rho in each resample, (R,); NaN where nothing is left."""
    functions = [_rank_function(values) for values in (scores, accuracy, *covariates.T)]

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
        return np.where(np.minimum(left[:, 0, 0], left[:, 1, 1]) < _UNEXPLAINED, np.nan, value)

    return partial
