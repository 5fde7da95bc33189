"""Rank correlations: how well scores order configurations, and the accuracy that trusting them loses.

Explained in chapter 02.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from emq_lib.core.checks import real_number, real_numbers, whole_number
from emq_lib.core.errors import InvalidParameterError, InvalidScoreError
from emq_lib.proxies.counts import UNEXPLAINED, kept_count, partial_of_counts

PERCENTS = (20, 50, 100)


def spearman(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Return Spearman's rho of scores and accuracies, shape (N,) each, ties given their mean rank.

    Raises:
        InvalidScoreError: see :func:`checked_pair`.

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
    scores, accuracy = checked_pair(scores, accuracy)
    kept = np.argsort(-scores, kind="stable")[: kept_count(len(scores), percent)]
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

    Args:
        scores: shape (N,).
        accuracy: shape (N,).
        percents: the shares.

    Raises:
        InvalidScoreError, InvalidParameterError: see :func:`rho_at`.
        InvalidParameterError: no shares.
    """
    return float(np.mean([rho_at(scores, accuracy, percent) for percent in _shares(percents)]))


def _shares(percents: Sequence[float]) -> Sequence[float]:
    if not isinstance(percents, Sequence | np.ndarray) or isinstance(percents, str) or not len(percents):
        raise InvalidParameterError(f"need one share in percent or more, got {percents!r:.60}.")
    return percents


def fitness_many(scores: np.ndarray, accuracy: np.ndarray, percents: Sequence[float] = PERCENTS) -> np.ndarray:
    """Return the fitness of many proxies at once.

    Args:
        scores: shape (P, N).
        accuracy: shape (N,).
        percents: shares whose rho is averaged.

    Returns:
        shape (P,); NaN where scores are not finite, or equal within one of the shares, or a share keeps fewer than 3.

    Raises:
        InvalidScoreError: shapes do not fit, or something is no real number, or an accuracy is not finite.
        InvalidParameterError: no shares, or one that is not above 0 and up to 100.
    """
    return fitness_terms(scores, accuracy, percents).mean(axis=1)


def fitness_terms(scores: np.ndarray, accuracy: np.ndarray, percents: Sequence[float]) -> np.ndarray:
    """Return rho at each share for each row of scores, shape (P, len(percents)); NaN as in :func:`fitness_many`.

    Arguments and errors are those of :func:`fitness_many`.
    """
    scores, accuracy = real_numbers(scores, "scores", finite=False), real_numbers(accuracy, "accuracies")
    if scores.ndim != 2 or scores.shape[1:] != accuracy.shape or not scores.size:
        raise InvalidScoreError(f"scores {scores.shape} need one column for each of the accuracies {accuracy.shape}.")
    percents = _shares(percents)
    order = np.argsort(-scores, axis=1, kind="stable")
    terms = []
    for percent in percents:
        kept = order[:, : kept_count(scores.shape[1], percent)]
        rho = _correlation(np.take_along_axis(scores, kept, axis=1), accuracy[kept])
        terms.append(rho if kept.shape[1] >= 3 else np.full(len(scores), np.nan))
    return np.where(np.isfinite(scores).all(axis=1)[:, None], np.stack(terms, axis=1), np.nan)


def kendall(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Return Kendall's tau-b (Kendall 1945) of scores and accuracies, shape (N,) each.

    Raises:
        InvalidScoreError: see :func:`checked_pair`.
    """
    return float(stats.kendalltau(*checked_pair(scores, accuracy)).statistic)


def weighted_tau(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Return Kendall's tau with hyperbolic weights, in which exchanges among the best count most (Vigna 2015).

    Args:
        scores: shape (N,).
        accuracy: shape (N,).

    Raises:
        InvalidScoreError: see :func:`checked_pair`.
    """
    return float(stats.weightedtau(*checked_pair(scores, accuracy)).statistic)


def logit_pearson(scores: np.ndarray, top1: np.ndarray, *, images: int = 10_000) -> float:
    """Return Pearson's correlation of scores with log(a / (1 - a)), where a is the top-1 accuracy.

    Accuracies closer to 0 or 100 % than half an image count as half an image off, where the empirical logit has its
    ends too (Cox 1970): the logit of none or all images is infinite.

    Args:
        scores: shape (N,).
        top1: in percent, 0 to 100, shape (N,).
        images: number of images that the accuracies were measured on.

    Raises:
        InvalidScoreError: see :func:`rho_at`; or an accuracy is outside 0 to 100.
        InvalidParameterError: the number of images is not one.
    """
    scores, top1 = checked_pair(scores, top1)
    if not ((top1 >= 0) & (top1 <= 100)).all():
        raise InvalidScoreError("a logit needs accuracies in percent, 0 to 100.")
    half = 50 / whole_number(images, "the number of images", 1)
    inside = top1.clip(half, 100 - half)
    return float(stats.pearsonr(scores, np.log(inside / (100 - inside))).statistic)


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
    scores, accuracy = checked_pair(scores, accuracy)
    covariates = checked_covariates(covariates, len(scores))
    if min(_unexplained(values, covariates) for values in (scores, accuracy)) < UNEXPLAINED:
        return float("nan")
    return float(partial_of_counts(scores, accuracy, covariates)(np.ones((1, len(scores)), dtype=np.int64))[0])


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
        InvalidScoreError: see :func:`checked_pair`; or no configuration fits, or costs are not one finite number for
            each configuration.
        InvalidParameterError: the budget is no finite number.
    """
    scores, accuracy = within_budget(scores, accuracy, costs, budget)
    return float(accuracy.max() - accuracy[scores.argmax()])


def within_budget(
    scores: np.ndarray, accuracy: np.ndarray, costs: np.ndarray, budget: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and accuracies of the configurations within a budget. Arguments and errors: :func:`regret`."""
    scores, accuracy = checked_pair(scores, accuracy)
    costs = real_numbers(costs, "costs", ndim=1)
    if costs.shape != scores.shape:
        raise InvalidScoreError(f"costs {costs.shape} must be one finite number for each of {len(scores)} scores.")
    fits = np.flatnonzero(costs <= real_number(budget, "a budget"))
    if not len(fits):
        raise InvalidScoreError(f"no configuration costs {budget} or less; the cheapest costs {np.min(costs)}.")
    return scores[fits], accuracy[fits]


def checked_pair(scores: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and accuracies as float64 arrays of shape (N,).

    Raises:
        InvalidScoreError: lengths differ, there are fewer than 3, one is no finite real number, or all are equal.
    """
    scores, accuracy = real_numbers(scores, "scores"), real_numbers(accuracy, "accuracies")
    if scores.ndim != 1 or scores.shape != accuracy.shape or len(scores) < 3:
        raise InvalidScoreError(f"scores {scores.shape} and accuracies {accuracy.shape} must be 1-D, alike, 3 or more.")
    for name, values in (("scores", scores), ("accuracies", accuracy)):
        if (values == values[0]).all():
            raise InvalidScoreError(f"the {name} are all equal, so they rank nothing.")
    return scores, accuracy


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's rho of each pair of rows, shape (P,); NaN where a row is constant."""
    x, y = (stats.rankdata(values, axis=1) for values in (x, y))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    norm = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, (x * y).sum(axis=1) / norm, np.nan)


def checked_covariates(covariates: np.ndarray, n: int) -> np.ndarray:
    """Return covariates as a float64 array of shape (n, K).

    Raises:
        InvalidScoreError: another shape, or a value that is no finite real number.
    """
    covariates = real_numbers(covariates, "covariates")
    if covariates.ndim != 2 or len(covariates) != n:
        raise InvalidScoreError(f"covariates {covariates.shape} must be finite, with one row for each of {n} scores.")
    return covariates


def _unexplained(values: np.ndarray, covariates: np.ndarray) -> float:
    """Return the share of a variance that no linear function of the covariates explains."""
    values, covariates = values - values.mean(), covariates - covariates.mean(axis=0)
    covariates = covariates / np.maximum(np.abs(covariates).max(axis=0), np.finfo(np.float64).tiny)
    values = values / np.abs(values).max()
    left = values - covariates @ np.linalg.lstsq(covariates, values, rcond=None)[0]
    return float((left**2).sum() / (values**2).sum())
