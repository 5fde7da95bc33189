"""The bootstrap over configurations, with intervals corrected for bias and skewness (BCa, Efron 1987).

:func:`scipy.stats.bootstrap` draws the same resamples from the same generator and returns the same ends to four digits
(a test compares them). It takes two to seven times as long for a rank correlation, because it sorts every resample, and
has no strata, no resamples that rank nothing, and no interval for a perfect ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from emq_lib.core.checks import random_source, real_number, whole_number
from emq_lib.core.errors import InvalidParameterError, InvalidScoreError

MINIMUM = 30  # configurations
_FEWEST, _MOST = 100, 1_000_000  # resamples
_BLOCK = 500_000  # numbers that a block of resamples may hold


@dataclass(frozen=True)
class Resampled:
    """A statistic of resamples, with the two constants of the BCa interval.

    Attributes:
        draws: the statistic of each resample in which it exists, shape (R,).
        bias: normal quantile of the share of draws below the statistic of the configurations themselves.
        acceleration: skewness of the influence of single configurations, over 6.
    """

    draws: np.ndarray
    bias: float
    acceleration: float

    def interval(self, level: float) -> tuple[float, float]:
        """Return both ends of the BCa interval: quantiles moved by bias and acceleration.

        Raises:
            InvalidParameterError: the level is not inside 0 to 1.
        """
        z = self.bias + stats.norm.ppf(tails(level))
        lo, hi = np.quantile(self.draws, stats.norm.cdf(self.bias + z / (1 - self.acceleration * z)))
        return float(lo), float(hi)

    @property
    def p_value(self) -> float:
        """One minus the level at which the BCa interval just reaches zero."""
        z = stats.norm.ppf(_share_below(self.draws, 0.0)) - self.bias
        z = z / (1 + self.acceleration * z) - self.bias
        return float(min(1.0, 2 * stats.norm.sf(abs(z))))


def tails(level: float) -> list[float]:
    """Return the shares below both ends of an interval of that coverage.

    Raises:
        InvalidParameterError: the level is not inside 0 to 1.
    """
    level = real_number(level, "the level of an interval", 0, 1)
    return [(1 - level) / 2, (1 + level) / 2]


def resample(
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int,
    *,
    resamples: int,
    rng: np.random.Generator,
    strata: Sequence[np.ndarray] = (),
) -> Resampled:
    """Compute a statistic of resamples, and with each configuration left out once for the acceleration.

    Args:
        statistic: counts (R, n), how often each configuration is drawn -> its values (R,); NaN where it has none.
        n: number of configurations, at least 30.
        resamples: number of resamples, 100 to a million.
        rng: source of randomness.
        strata: positions of the configurations that are drawn among themselves; by default all together.

    Raises:
        InvalidScoreError: too few configurations, or one resample in twenty has no value.
        InvalidParameterError: too few or too many resamples, or no generator.
    """
    if n < MINIMUM:
        raise InvalidScoreError(f"a bootstrap interval needs {MINIMUM} configurations or more, got {n}.")
    resamples = resample_count(resamples)
    step = max(1, _BLOCK // n)
    strata = strata or [np.arange(n)]
    draws = [statistic(draw(min(step, resamples - i), strata, rng)) for i in range(0, resamples, step)]
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
    return Resampled(draws, stats.norm.ppf(_share_below(draws, value)), float(acceleration))


def resample_count(resamples: int) -> int:
    """Return a number of resamples after checking that it gives an interval, and in bearable time.

    Raises:
        InvalidParameterError: it is no whole number from 100 to a million.
    """
    if whole_number(resamples, "the number of resamples", _FEWEST) > _MOST:
        raise InvalidParameterError(
            f"the number of resamples must be a whole number, {_FEWEST} or more, up to {_MOST}."
        )
    return int(resamples)


def draw(resamples: int, strata: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw as many with replacement from each stratum as it has: how often each is drawn, shape (resamples, n).

    Raises:
        InvalidParameterError: no generator.
    """
    rng = random_source(rng)
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
