"""Means over runs, and differences of means, with their 95 % intervals."""

from __future__ import annotations

import pandas as pd
from pandas.core.groupby import SeriesGroupBy
from scipy import stats


def mean_with_interval(groups: SeriesGroupBy) -> pd.DataFrame:
    """Return, per group of runs, the columns mean, lo and hi (a 95 % t interval over the runs) and n; NaN do not count.

    >>> mean_with_interval(pd.Series([1.0, 3.0]).groupby([0, 0])).round(1).to_dict("records")
    [{'mean': 2.0, 'lo': -10.7, 'hi': 14.7, 'n': 2}]
    """
    table = groups.agg(["mean", "sem", "count"])
    half = table["sem"] * stats.t.ppf(0.975, table["count"] - 1)
    ends = {"lo": table["mean"] - half, "hi": table["mean"] + half}
    return table.assign(**ends, n=table["count"])[["mean", "lo", "hi", "n"]]


def difference_of_means(one: pd.Series, two: pd.Series) -> tuple[float, tuple[float, float], int]:
    """Return by how much the first runs' mean exceeds the second's, Welch's 95 % interval, and how many the first are.

    NaN do not count.

    >>> difference_of_means(pd.Series([2.0, 4.0, 6.0]), pd.Series([1.0, 2.0, 3.0]))[0]
    2.0
    """
    one, two = one.dropna(), two.dropna()
    ends = stats.ttest_ind(one, two, equal_var=False).confidence_interval(0.95)
    return (float(one.mean() - two.mean()), (float(ends.low), float(ends.high)), len(one))
