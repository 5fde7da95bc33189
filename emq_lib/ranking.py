"""Rank correlations with intervals: how well scores order configurations, and how sure one can be of it.

Explained in chapter 02.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg, stats
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import PolynomialFeatures

from emq_lib.core.costs import choice_indices
from emq_lib.core.errors import InvalidParameterError, InvalidScoreError

PERCENTS = (20, 50, 100)
MINIMUM = 30
_ALPHAS = np.logspace(-3, 3, 25)
_UNEXPLAINED = 1e-6  # share of a variance below which nothing is left of it
_BLOCK = 500_000  # numbers that a block of resamples may hold


@dataclass(frozen=True)
class RankEstimate:
    """A rank correlation with its interval over `n` configurations; `level` is the coverage of the interval."""

    value: float
    lo: float
    hi: float
    n: int
    level: float = 0.95

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
        se: its standard error.
        n: number of configurations.
    """

    difference: float
    lo: float
    hi: float
    p: float
    se: float
    n: int

    def configs_to_separate(self, *, power: float = 0.8, level: float = 0.95) -> float:
        """Return how many configurations would show this difference with the given probability.

        The standard error falls with the root of n: n' = n ((z_level + z_power) se / difference)^2, in normal
        approximation. Infinite if there is no difference.
        """
        z = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
        return self.n * (z * self.se / self.difference) ** 2 if self.difference else math.inf


@dataclass(frozen=True)
class NoiseCeiling:
    """How well a bench ranks itself, and so how well anything can be seen to rank it.

    With r the correlation of two halves, classical test theory (Spearman 1910, Brown 1910) takes each half as the true
    accuracy plus independent noise of the images. Then r is the reliability of a half, 2 r / (1 + r) that of the whole
    test set, and a predictor without any error correlates with a measurement as the root of its reliability.

    Attributes:
        halves: rho between the accuracies on two halves of the test images, with its interval.
        full: its step-up 2 r / (1 + r): how two whole test sets would agree. Not an upper bound: a proxy may be less
            noisy than a measurement.
        perfect: root of `full`: how the true accuracy would rank the measurements on the whole test set. This bounds
            every proxy that has not seen the test images; the root of `halves` bounds it when scored on one half.
    """

    halves: RankEstimate
    full: float
    perfect: RankEstimate


@dataclass(frozen=True)
class Oracle:
    """A regression from bits to accuracy, fitted on one half of the configurations.

    Attributes:
        table: score table (S, B); None if the regression has products of layers, which no table holds.
        predictions: its scores of the other half, shape (N,).
        alpha: ridge penalty, chosen by leave-one-out on the first half.
    """

    table: np.ndarray | None
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


def bootstrap_rho(
    scores: np.ndarray,
    accuracy: np.ndarray,
    *,
    percent: float = 100,
    resamples: int = 2_000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> RankEstimate:
    """Estimate rho (at a share) with a bootstrap interval over configurations.

    Configurations are drawn with replacement, and the share is cut afresh in each resample. The interval is corrected
    for bias and skewness (BCa, Efron 1987): plain percentiles lie too low where rho is near 1, and are too wide where
    a share is cut. In simulations it covers the truth 94 to 96 times in a hundred, but 91 times at rho = 0.998.

    Args:
        scores: shape (N,), N at least 30.
        accuracy: shape (N,).
        percent: see :func:`rho_at`.
        resamples: number of bootstrap resamples.
        level: coverage of the interval.
        rng: source of randomness.

    Raises:
        InvalidScoreError: see :func:`rho_at`; or fewer than 30 configurations; or one resample in twenty ranks nothing.
        InvalidParameterError: the share, the level or the number of resamples is not one.
    """
    value = rho_at(scores, accuracy, percent)
    statistic = _rho_of_counts(scores, accuracy, percent)
    found = _bootstrap(statistic, len(scores), resamples=resamples, rng=rng)
    return RankEstimate(value, *_interval(found, level), len(scores), level)


def bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    scores: np.ndarray,
    accuracy: np.ndarray,
    *,
    resamples: int = 500,
    level: float = 0.95,
    rng: np.random.Generator,
) -> RankEstimate:
    """Estimate any function of scores and accuracies with a BCa bootstrap interval over configurations.

    One call per resample: for :func:`kendall`, :func:`weighted_tau`, :func:`logit_pearson` and the reader's own. For
    rho, :func:`bootstrap_rho` is a hundred times faster.

    Args:
        statistic: takes scores and accuracies.
        scores: shape (N,), N at least 30.
        accuracy: shape (N,).
        resamples: number of bootstrap resamples.
        level: coverage of the interval.
        rng: source of randomness.

    Raises:
        InvalidScoreError: see :func:`bootstrap_rho`; or what the statistic refuses.
    """
    value = statistic(*_checked(scores, accuracy))
    pair = np.stack([scores, accuracy])

    def resampled(counts: np.ndarray) -> np.ndarray:
        return np.array([statistic(*np.repeat(pair, row, axis=1)) for row in counts])

    found = _bootstrap(resampled, len(scores), resamples=resamples, rng=rng)
    return RankEstimate(value, *_interval(found, level), len(scores), level)


def compare(
    first: np.ndarray,
    second: np.ndarray,
    accuracy: np.ndarray,
    *,
    percent: float = 100,
    resamples: int = 2_000,
    rng: np.random.Generator,
) -> Comparison:
    """Compare two proxies by a paired bootstrap: both are scored on the same resampled configurations.

    The p-value is two-sided and belongs to the interval: one minus the level at which the BCa interval of the
    difference just reaches zero. It is never zero: no draw beyond zero counts as half a draw.

    Args:
        first: scores of one proxy, shape (N,), N at least 30.
        second: scores of the other, shape (N,).
        accuracy: shape (N,).
        percent: see :func:`rho_at`; each proxy is judged among its own best.
        resamples: number of bootstrap resamples.
        rng: source of randomness.

    Raises:
        InvalidScoreError: see :func:`bootstrap_rho`.
    """
    difference = rho_at(first, accuracy, percent) - rho_at(second, accuracy, percent)
    one, two = (_rho_of_counts(scores, accuracy, percent) for scores in (first, second))
    found = _bootstrap(lambda counts: one(counts) - two(counts), len(accuracy), resamples=resamples, rng=rng)
    return Comparison(difference, *_interval(found, 0.95), _p_value(found), float(found.draws.std()), len(accuracy))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values adjusted for their number by Holm's step-down method (Holm 1979), in the order given.

    Raises:
        InvalidParameterError: a value is NaN or outside 0 to 1.

    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise InvalidParameterError(f"p-values must lie in 0 to 1, got {p}.")
    order = np.argsort(p, kind="stable")
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


def bootstrap_partial_rho(
    scores: np.ndarray,
    accuracy: np.ndarray,
    covariates: np.ndarray,
    *,
    resamples: int = 2_000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> RankEstimate:
    """Estimate :func:`partial_rho` with a BCa bootstrap interval over configurations.

    Args:
        scores: shape (N,), N at least 30.
        accuracy: shape (N,).
        covariates: shape (N, K).
        resamples: number of bootstrap resamples.
        level: coverage of the interval.
        rng: source of randomness.

    Returns:
        the estimate; value and both ends are NaN where :func:`partial_rho` is.

    Raises:
        InvalidScoreError: see :func:`partial_rho` and :func:`bootstrap_rho`.
    """
    value, n = partial_rho(scores, accuracy, covariates), len(scores)
    if np.isnan(value):
        return RankEstimate(value, value, value, n, level)
    statistic = _partial_of_counts(*_checked(scores, accuracy), _checked_covariates(covariates, n))
    found = _bootstrap(statistic, n, resamples=resamples, rng=rng)
    return RankEstimate(value, *_interval(found, level), n, level)


def bootstrap_binned_rho(
    scores: np.ndarray,
    accuracy: np.ndarray,
    costs: np.ndarray,
    *,
    bins: int = 5,
    resamples: int = 2_000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> RankEstimate:
    """Estimate the mean of rho inside bins of equally many configurations of similar cost, with its interval.

    What a proxy knows beyond cost, without assuming anything of how accuracy depends on it. Resamples are drawn within
    bins; the interval is BCa.

    Args:
        scores: shape (N,), N at least 30.
        accuracy: shape (N,).
        costs: shape (N,), e.g. size.
        bins: number of bins; none has more than one configuration more than another.
        resamples: number of bootstrap resamples.
        level: coverage of the interval.
        rng: source of randomness.

    Returns:
        the estimate; NaN where scores are equal within a bin, because the proxy is a function of the cost.

    Raises:
        InvalidScoreError: see :func:`bootstrap_rho`; or a bin would have fewer than 5 configurations.
        InvalidParameterError: the level, or the number of resamples or bins, is not one.
    """
    scores, accuracy = _checked(scores, accuracy)
    costs = _checked_covariates(np.reshape(costs, (-1, 1)), len(scores))[:, 0]
    if bins < 1 or len(scores) < 5 * bins:
        raise InvalidScoreError(f"{bins} bins of 5 configurations or more cannot be cut from {len(scores)}.")
    groups = np.array_split(np.argsort(costs, kind="stable"), bins)
    if any(np.ptp(values[group]) == 0 for values in (scores, accuracy) for group in groups):
        return RankEstimate(math.nan, math.nan, math.nan, len(scores), level)
    inside = [_rho_of_counts(scores[group], accuracy[group], 100) for group in groups]

    def statistic(counts: np.ndarray) -> np.ndarray:
        return np.mean([rho(counts[:, group]) for rho, group in zip(inside, groups, strict=True)], axis=0)

    found = _bootstrap(statistic, len(scores), resamples=resamples, rng=rng, strata=groups)
    value = float(statistic(np.ones((1, len(scores)), dtype=np.int64))[0])
    return RankEstimate(value, *_interval(found, level), len(scores), level)


def noise_ceiling(
    half_a: np.ndarray, half_b: np.ndarray, *, resamples: int = 2_000, rng: np.random.Generator
) -> NoiseCeiling:
    """Return how well the accuracies on one half of the test images rank as those on the other half do.

    Correlations of ranks stand in for those of classical test theory; the difference vanishes as noise does. Halves
    that do not agree at all (rho of zero or below) leave a ceiling of zero. The intervals are over configurations, with
    the images given.

    Args:
        half_a: accuracy or number of correct images on one half, shape (N,), N at least 30.
        half_b: likewise on the other, disjoint half.
        resamples: number of bootstrap resamples.
        rng: source of randomness.

    Raises:
        InvalidScoreError: see :func:`bootstrap_rho`.
    """
    halves = bootstrap_rho(half_a, half_b, resamples=resamples, rng=rng)
    value, lo, hi = (2 * r / (1 + r) for r in (max(0.0, end) for end in (halves.value, halves.lo, halves.hi)))
    return NoiseCeiling(halves, value, RankEstimate(value**0.5, lo**0.5, hi**0.5, halves.n, halves.level))


def additive_oracle(configs: np.ndarray, accuracy: np.ndarray, others: np.ndarray, choices: Sequence[int]) -> Oracle:
    """Fit ridge regression from one-hot bits to measured accuracy, and predict other configurations.

    It sees accuracies, which no proxy does, so it says what a sum over layers can reach. The penalty is chosen by
    leave-one-out on the configurations it is fitted to; the others are only predicted.

    Args:
        configs: bits to fit on, shape (N, S).
        accuracy: their accuracy, shape (N,).
        others: bits to predict, shape (M, S).
        choices: the B allowed widths.

    Raises:
        ConfigLengthError: the configurations differ in length.
        InvalidBitsError: a width outside the choices.
        InvalidScoreError: the accuracies have another length, are not finite or are all equal.
    """
    fitted, predicted, slots = _design(configs, accuracy, others, choices)
    model = RidgeCV(alphas=_ALPHAS).fit(fitted, accuracy)
    return Oracle(model.coef_.reshape(slots, len(choices)), model.predict(predicted), float(model.alpha_))


def pairwise_oracle(configs: np.ndarray, accuracy: np.ndarray, others: np.ndarray, choices: Sequence[int]) -> Oracle:
    """Fit ridge regression from one-hot bits and their products over pairs of layers, and predict other configurations.

    It says how much layers interact: what a score beyond a sum over layers can reach with this many measured
    configurations. Arguments, returns and errors are those of :func:`additive_oracle`, but there is no table.
    """
    fitted, predicted, _ = _design(configs, accuracy, others, choices)
    products = PolynomialFeatures(degree=2, interaction_only=True, include_bias=False).fit(fitted)
    model = RidgeCV(alphas=_ALPHAS).fit(products.transform(fitted), accuracy)
    return Oracle(None, model.predict(products.transform(predicted)), float(model.alpha_))


def pair_interactions(
    configs: np.ndarray, accuracy: np.ndarray, choices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate what two layers lose together, beyond the sum of what each loses alone, at the lowest width.

    For every pair of layers the coefficient of "both have the lowest width" in a least-squares regression of accuracy
    on that product and the one-hot bits of all layers. The p-values, of no interaction, use standard errors that allow
    unequal variances (White 1980, with the correction for degrees of freedom).

    Args:
        configs: bits, shape (N, S).
        accuracy: shape (N,).
        choices: the B allowed widths.

    Returns:
        two arrays of shape (S, S), symmetric: the interaction in the unit of the accuracy (diagonal zero), and its
        p-value (diagonal one).

    Raises:
        ConfigLengthError, InvalidBitsError, InvalidScoreError: see :func:`additive_oracle`.
        InvalidScoreError: there are no more configurations than coefficients.
    """
    one_hot, _, slots = _design(configs, accuracy, configs, choices)
    basis = linalg.orth(one_hot)  # the constant is among its span: one-hot bits of a layer sum to one
    free = len(one_hot) - basis.shape[1] - 1
    if free <= 0:
        raise InvalidScoreError(f"{len(one_hot)} configurations are too few for {basis.shape[1] + 1} coefficients.")
    lowest = one_hot[:, :: len(choices)]
    left = accuracy - basis @ (basis.T @ accuracy)
    effects, p_values = np.zeros((slots, slots)), np.ones((slots, slots))
    for first, second in itertools.combinations(range(slots), 2):
        product = lowest[:, first] * lowest[:, second]
        product = product - basis @ (basis.T @ product)
        energy = product @ product
        if energy > 1e-9:
            effect = product @ left / energy
            variance = np.square(product * (left - effect * product)).sum() / energy**2 * len(left) / free
            effects[first, second] = effects[second, first] = effect
            p_value = 2 * stats.t.sf(abs(effect) / np.sqrt(variance), free)
            p_values[first, second] = p_values[second, first] = p_value
    return effects, p_values


def resample_layers(table: np.ndarray, slots: int) -> np.ndarray:
    """Return a score table for a network of another depth, by linear interpolation over the relative depth.

    Slot s of S stands at (s + 1/2) / S. Beyond the first and the last slot the table stays as it is there.

    Args:
        table: shape (S, B).
        slots: number of slots of the other network.

    Returns:
        float64 array of shape (slots, B).

    >>> resample_layers(np.array([[0.0, 1.0], [4.0, 3.0]]), 4)
    array([[0. , 1. ],
           [1. , 1.5],
           [3. , 2.5],
           [4. , 3. ]])
    """
    table = np.asarray(table, dtype=np.float64)
    places, wanted = ((np.arange(count) + 0.5) / count for count in (len(table), slots))
    return np.stack([np.interp(wanted, places, column) for column in table.T], axis=1)


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


def bootstrap_regret(
    scores: np.ndarray,
    accuracy: np.ndarray,
    costs: np.ndarray,
    budget: float,
    *,
    resamples: int = 2_000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> RankEstimate:
    """Estimate :func:`regret` with an interval: the plain quantiles of resamples of the configurations within budget.

    Args:
        scores: shape (N,).
        accuracy: shape (N,).
        costs: shape (N,).
        budget: upper bound on the cost.
        resamples: number of bootstrap resamples.
        level: coverage of the interval.
        rng: source of randomness.

    Returns:
        the estimate; `n` counts the configurations within the budget.

    Raises:
        InvalidScoreError: see :func:`regret`.
    """
    value = regret(scores, accuracy, costs, budget)
    scores, accuracy = _within(scores, accuracy, costs, budget)
    drawn = _draw(resamples, [np.arange(len(scores))], rng) > 0
    first = np.where(drawn, scores, -np.inf).argmax(axis=1)
    lost = np.where(drawn, accuracy, -np.inf).max(axis=1) - accuracy[first]
    lo, hi = np.quantile(lost, [(1 - level) / 2, (1 + level) / 2])
    return RankEstimate(value, float(lo), float(hi), len(scores), level)


def sampling_interval(rho: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return the interval that sampling alone puts around a reported rank correlation.

    Fisher's z with the variance 1.06 / (n - 3) for Spearman's rho (Fieller, Hartley and Pearson 1957):
    tanh(atanh(rho) -+ z sqrt(1.06 / (n - 3))).

    Raises:
        InvalidParameterError: rho is not inside -1 to 1, n is not above 3, or the level is not inside 0 to 1.

    >>> [round(end, 2) for end in sampling_interval(0.7921, 50)]
    [0.65, 0.88]
    """
    if not (-1 < rho < 1 and n > 3 and 0 < level < 1):
        raise InvalidParameterError(f"need -1 < rho < 1, n > 3 and 0 < level < 1; got {rho}, {n} and {level}.")
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


def _rho_of_counts(scores: np.ndarray, accuracy: np.ndarray, percent: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from counts (R, N) to rho at a share in each resample, (R,); NaN where it ranks nothing."""
    scores, accuracy = np.asarray(scores, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    best = np.argsort(-scores, kind="stable")
    score_ranks, accuracy_ranks = _rank_function(scores[best]), _rank_function(accuracy[best])

    def rho(counts: np.ndarray) -> np.ndarray:
        counts = counts[:, best]
        if percent < 100:
            before = np.cumsum(counts, axis=1) - counts
            keep = _count(int(counts[0].sum()), percent)
            counts = np.clip(keep - before, 0, counts)
        x, y = score_ranks(counts), accuracy_ranks(counts)
        norm = np.sqrt(np.einsum("rn,rn,rn->r", counts, x, x) * np.einsum("rn,rn,rn->r", counts, y, y))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.einsum("rn,rn,rn->r", counts, x, y) / norm

    return rho


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


@dataclass(frozen=True)
class _Bootstrap:
    """Resampled values of a statistic, with the two constants of the BCa interval (Efron 1987)."""

    draws: np.ndarray
    bias: float
    acceleration: float


def _bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int,
    *,
    resamples: int,
    rng: np.random.Generator,
    strata: Sequence[np.ndarray] = (),
) -> _Bootstrap:
    """Draw resamples as counts, and leave each configuration out once for the acceleration."""
    if n < MINIMUM:
        raise InvalidScoreError(f"a bootstrap interval needs {MINIMUM} configurations or more, got {n}.")
    if resamples < 100:
        raise InvalidParameterError(f"a bootstrap interval needs 100 resamples or more, got {resamples}.")
    step = max(1, _BLOCK // n)
    strata = strata or [np.arange(n)]
    draws = [statistic(_draw(min(step, resamples - i), strata, rng)) for i in range(0, resamples, step)]
    left_out = [statistic(1 - np.eye(min(step, n - i), n, i, dtype=np.int64)) for i in range(0, n, step)]
    draws, left_out = (values[~np.isnan(values)] for values in map(np.concatenate, (draws, left_out)))
    if len(draws) < 0.95 * resamples:
        raise InvalidScoreError(
            f"{resamples - len(draws)} of {resamples} resamples rank nothing, because what they keep is equal: "
            "keep a larger share, or more configurations."
        )
    influence = left_out.mean() - left_out
    spread = (influence**2).sum() ** 1.5
    acceleration = (influence**3).sum() / (6 * spread) if spread > 0 else 0.0
    value = statistic(np.ones((1, n), dtype=np.int64))[0]
    return _Bootstrap(draws, stats.norm.ppf(_share_below(draws, value)), float(acceleration))


def _draw(resamples: int, strata: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw as many with replacement from each stratum as it has: how often each is drawn, shape (resamples, n)."""
    counts = np.empty((resamples, sum(map(len, strata))), dtype=np.int64)
    for members in strata:
        n = len(members)
        rows = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
        counts[:, members] = np.bincount(rows.ravel(), minlength=resamples * n).reshape(resamples, n)
    return counts


def _share_below(draws: np.ndarray, value: float) -> float:
    """Return the share of draws below a value, ties halved, kept off 0 and 1 by half a draw."""
    below = (draws < value).sum() + (draws == value).sum() / 2
    return float((below + 0.5) / (len(draws) + 1))


def _interval(found: _Bootstrap, level: float) -> tuple[float, float]:
    """Return both ends of the BCa interval: quantiles moved by bias and acceleration."""
    if not 0 < level < 1:
        raise InvalidParameterError(f"the level of an interval must lie inside 0 to 1, got {level}.")
    z = found.bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    lo, hi = np.quantile(found.draws, stats.norm.cdf(found.bias + z / (1 - found.acceleration * z)))
    return float(lo), float(hi)


def _p_value(found: _Bootstrap) -> float:
    """Return one minus the level at which the BCa interval just reaches zero."""
    z = stats.norm.ppf(_share_below(found.draws, 0.0)) - found.bias
    z = z / (1 + found.acceleration * z) - found.bias
    return float(min(1.0, 2 * stats.norm.sf(abs(z))))


def _design(
    configs: np.ndarray, accuracy: np.ndarray, others: np.ndarray, choices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return both halves one-hot, shapes (N, S B) and (M, S B), and S."""
    configs = np.atleast_2d(configs)
    slots = configs.shape[1]
    if np.shape(accuracy) != (len(configs),) or not np.isfinite(accuracy).all() or not np.ptp(accuracy) > 0:
        raise InvalidScoreError(
            f"accuracies {np.shape(accuracy)} must be finite, not all equal, one for each of {len(configs)} configs."
        )
    one_hot = np.eye(len(choices))
    fitted, predicted = (
        one_hot[choice_indices(bits, choices, slots)].reshape(-1, slots * len(choices)) for bits in (configs, others)
    )
    return fitted, predicted, slots
