"""Rank correlations with intervals: how well scores order configurations, and how sure one can be of it.

Explained in chapter 02.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import OneHotEncoder

from emq_lib.errors import InvalidScoreError

PERCENTS = (20, 50, 100)
MINIMUM = 30
_ALPHAS = np.logspace(-3, 3, 25)
_BLOCK = 2_000_000  # numbers that a block of resamples may hold


@dataclass(frozen=True)
class RankEstimate:
    """A rank correlation with its 95 % interval over `n` configurations."""

    value: float
    lo: float
    hi: float
    n: int

    def __str__(self) -> str:
        """Return the estimate as a reader wants it: value, interval, n."""
        return f"{self.value:.2f} [{self.lo:.2f}, {self.hi:.2f}], n = {self.n}"


@dataclass(frozen=True)
class Comparison:
    """Difference of two rank correlations on the same configurations.

    Attributes:
        difference: rho of the first minus rho of the second.
        lo: lower end of its 95 % interval.
        hi: upper end.
        p: two-sided bootstrap p-value of no difference.
        n: number of configurations.
    """

    difference: float
    lo: float
    hi: float
    p: float
    n: int


@dataclass(frozen=True)
class NoiseCeiling:
    """How well a bench ranks itself.

    Attributes:
        halves: rho between the accuracies on two halves of the test images, with its interval.
        full: its Spearman-Brown step-up, the agreement of two whole test sets: 2 r / (1 + r).
    """

    halves: RankEstimate
    full: float


@dataclass(frozen=True)
class Oracle:
    """A regression from bits to accuracy, fitted on one half of the configurations.

    Attributes:
        table: score table (S, B).
        predictions: its scores of the other half, shape (N,).
        alpha: ridge penalty, chosen by leave-one-out on the first half.
    """

    table: np.ndarray
    predictions: np.ndarray
    alpha: float


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
        percent: share that is kept, rounded to whole configurations; of equal scores the first ones stay.

    Raises:
        InvalidScoreError: lengths differ, fewer than 3 configurations stay, a value is not finite or all are equal.
    """
    scores, accuracy = _checked(scores, accuracy)
    kept = _best(scores, percent)
    if len(kept) < 3:
        raise InvalidScoreError(
            f"{percent} % of {len(scores)} configurations are {len(kept)}; a rank correlation needs 3."
        )
    value = float(fitness_terms(scores[None], accuracy, (percent,))[0, 0])
    if np.isnan(value):
        raise InvalidScoreError(f"the best {percent} % all have the same score or accuracy, so they rank nothing.")
    return value


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
        shape (P,); NaN where scores are not finite, or equal within one of the shares.
    """
    return fitness_terms(np.asarray(scores, dtype=np.float64), np.asarray(accuracy), percents).mean(axis=1)


def fitness_terms(scores: np.ndarray, accuracy: np.ndarray, percents: Sequence[float]) -> np.ndarray:
    """Return rho at each share for each row of scores, shape (P, len(percents)); NaN as in :func:`fitness_many`."""
    order = np.argsort(-scores, axis=1, kind="stable")
    terms = []
    for percent in percents:
        kept = order[:, : _count(scores.shape[1], percent)]
        terms.append(_correlation(np.take_along_axis(scores, kept, axis=1), np.asarray(accuracy)[kept]))
    return np.where(np.isfinite(scores).all(axis=1)[:, None], np.stack(terms, axis=1), np.nan)


def kendall(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Return Kendall's tau-b."""
    return float(stats.kendalltau(*_checked(scores, accuracy)).statistic)


def bootstrap_rho(
    scores: np.ndarray,
    accuracy: np.ndarray,
    *,
    percent: float = 100,
    resamples: int = 2_000,
    rng: np.random.Generator,
) -> RankEstimate:
    """Estimate rho (at a share) with a 95 % percentile bootstrap interval over configurations.

    Configurations are drawn with replacement, and the share is cut afresh in each resample (Efron and Tibshirani 1993,
    section 13.3).

    Args:
        scores: shape (N,), N at least 30.
        accuracy: shape (N,).
        percent: see :func:`rho_at`.
        resamples: number of bootstrap resamples.
        rng: source of randomness.

    Raises:
        InvalidScoreError: see :func:`rho_at`; or fewer than 30 configurations.
    """
    value = rho_at(scores, accuracy, percent)
    draws = _resampled([np.asarray(scores)], accuracy, percent=percent, resamples=resamples, rng=rng)[0]
    lo, hi = np.nanquantile(draws, [0.025, 0.975])
    return RankEstimate(value, float(lo), float(hi), len(scores))


def compare(
    first: np.ndarray, second: np.ndarray, accuracy: np.ndarray, *, resamples: int = 2_000, rng: np.random.Generator
) -> Comparison:
    """Compare two proxies by a paired bootstrap: both are scored on the same resampled configurations.

    The p-value is twice the smaller share of resampled differences on one side of zero, with one added to numerator
    and denominator, so that it is never zero.

    Raises:
        InvalidScoreError: see :func:`bootstrap_rho`.
    """
    difference = spearman(first, accuracy) - spearman(second, accuracy)
    one, two = _resampled([first, second], accuracy, percent=100, resamples=resamples, rng=rng)
    drawn = one - two
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1
    lo, hi = np.quantile(drawn, [0.025, 0.975])
    return Comparison(difference, float(lo), float(hi), min(1.0, 2 * tail / (resamples + 1)), len(accuracy))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values adjusted for their number by Holm's step-down method (Holm 1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return adjusted


def partial_rho(scores: np.ndarray, accuracy: np.ndarray, covariates: np.ndarray) -> float:
    """Return Spearman's partial correlation of scores and accuracy at fixed covariates.

    All columns are replaced by their ranks; those of the covariates are regressed out of the other two; what is left is
    correlated.

    Args:
        scores: shape (N,).
        accuracy: shape (N,).
        covariates: shape (N, K), e.g. size and BOPs.

    Returns:
        the correlation; NaN if the scores' ranks are a linear function of the covariates', so that nothing is left.
    """
    scores, accuracy = _checked(scores, accuracy)
    columns = stats.rankdata(np.column_stack([scores, accuracy, covariates]), axis=0)
    design = np.column_stack([np.ones(len(columns)), columns[:, 2:]])
    left = columns[:, :2] - design @ np.linalg.lstsq(design, columns[:, :2], rcond=None)[0]
    spread = left.std(axis=0)
    if spread.min() < 1e-8 * columns[:, :2].std(axis=0).max():
        return float("nan")
    return float((left[:, 0] * left[:, 1]).mean() / spread.prod())


def noise_ceiling(half_a: np.ndarray, half_b: np.ndarray, *, rng: np.random.Generator) -> NoiseCeiling:
    """Return how well the accuracies on one half of the test images rank as those on the other half do."""
    halves = bootstrap_rho(half_a, half_b, rng=rng)
    return NoiseCeiling(halves, 2 * halves.value / (1 + halves.value))


def additive_oracle(configs: np.ndarray, accuracy: np.ndarray, others: np.ndarray, choices: Sequence[int]) -> Oracle:
    """Fit ridge regression from one-hot bits to measured accuracy, and predict other configurations.

    It sees accuracies, which no proxy does, so it says what a sum over layers can reach.

    Args:
        configs: bits to fit on, shape (N, S).
        accuracy: their accuracy, shape (N,).
        others: bits to predict, shape (M, S).
        choices: the B allowed widths.
    """
    encoder = _one_hot(configs.shape[1], choices)
    model = RidgeCV(alphas=_ALPHAS).fit(encoder.transform(configs), accuracy)
    table = model.coef_.reshape(configs.shape[1], len(choices))
    return Oracle(table, model.predict(encoder.transform(others)), float(model.alpha_))


def regret(scores: np.ndarray, accuracy: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """Return the accuracy lost by trusting the scores among the configurations within a budget.

    Args:
        scores: shape (N,).
        accuracy: shape (N,).
        costs: shape (N,).
        budget: upper bound on the cost.

    Raises:
        InvalidScoreError: no configuration fits.
    """
    scores, accuracy = _checked(scores, accuracy)
    fits = np.flatnonzero(np.asarray(costs) <= budget)
    if not len(fits):
        raise InvalidScoreError(f"no configuration costs {budget} or less; the cheapest costs {np.min(costs)}.")
    return float(accuracy[fits].max() - accuracy[fits[scores[fits].argmax()]])


def sampling_interval(rho: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return the interval that sampling alone puts around a reported rank correlation.

    Fisher's z with the variance 1.06 / (n - 3) for Spearman's rho (Fieller, Hartley and Pearson 1957).

    >>> [round(end, 2) for end in sampling_interval(0.7921, 50)]
    [0.65, 0.88]
    """
    half_width = stats.norm.ppf((1 + level) / 2) * np.sqrt(1.06 / (n - 3))
    return float(np.tanh(np.arctanh(rho) - half_width)), float(np.tanh(np.arctanh(rho) + half_width))


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


def _resampled(
    scores: Sequence[np.ndarray], accuracy: np.ndarray, *, percent: float, resamples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return rho of each proxy on the same resampled configurations, one array (resamples,) each."""
    n = len(accuracy)
    if n < MINIMUM:
        raise InvalidScoreError(f"a bootstrap interval needs {MINIMUM} configurations or more, got {n}.")
    drawn: list[list[np.ndarray]] = [[] for _ in scores]
    for start in range(0, resamples, step := max(1, _BLOCK // n)):
        rows = rng.integers(n, size=(min(step, resamples - start), n))
        for values, found in zip(scores, drawn, strict=True):
            found.append(_resample_rho(np.asarray(values, dtype=np.float64)[rows], np.asarray(accuracy)[rows], percent))
    return [np.concatenate(found) for found in drawn]


def _resample_rho(scores: np.ndarray, accuracy: np.ndarray, percent: float) -> np.ndarray:
    if percent < 100:
        kept = np.argsort(-scores, axis=1, kind="stable")[:, : _count(scores.shape[1], percent)]
        scores, accuracy = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(accuracy, kept, axis=1)
    return _correlation(scores, accuracy)


def _one_hot(slots: int, choices: Sequence[int]) -> OneHotEncoder:
    return OneHotEncoder(categories=[list(choices)] * slots, sparse_output=False).fit(np.full((1, slots), choices[0]))
