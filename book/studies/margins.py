"""What hits on images say: means over seeds and images, and differences of methods, image by image.

Explained in chapter 05.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from book.studies.bench import load_bench
from emq_lib.core.checks import real_numbers
from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.profiles import Profile
from emq_lib.proxies.intervals import holm

FLOAT = "float"


@dataclass(frozen=True)
class Mean:
    """A mean over images and seeds, in points: the estimate, its 95 % interval, and the p-value of being zero."""

    value: float
    lo: float
    hi: float
    p_value: float
    images: int
    seeds: int


def mean_of(values: np.ndarray) -> Mean:
    """Estimate the mean of a table of seeds by images, both of which are samples.

    Two crossed random effects, one value per cell (Searle, Casella and McCulloch 1992): with the mean squares S of
    seeds, I of images and R of what is left, the mean of s seeds and i images has the variance (S + I - R) / (s i), for
    S and I both hold the noise that R measures. A mean square below R says that its effect has no variance, and counts
    as R. Degrees of freedom by Satterthwaite. With one seed only images count.

    Args:
        values: shape (seeds, images), two images at least: hits, or differences of hits of two methods on the same
            images.

    Raises:
        InvalidScoreError: values that are no finite numbers.
        InvalidParameterError: another shape.

    >>> mean_of(np.array([[1.0, 0.0, 1.0, 1.0]])).value
    75.0
    """
    values = 100 * np.atleast_2d(real_numbers(values, "hits"))
    if values.ndim != 2 or values.shape[1] < 2 or not len(values):
        raise InvalidParameterError(f"hits are a table of seeds by two images or more, got shape {values.shape}.")
    value = float(values.mean())
    terms = [(square / values.size, free) for square, free in _squares(values)]
    variance = sum(term for term, _ in terms)
    if variance <= 0:
        return Mean(value, value, value, float(value == 0), values.shape[1], len(values))
    freedom = variance**2 / sum(term**2 / free for term, free in terms)
    margin = stats.t.ppf(0.975, freedom) * variance**0.5
    p_value = 2 * stats.t.sf(abs(value) / variance**0.5, freedom)
    return Mean(value, value - margin, value + margin, float(p_value), values.shape[1], len(values))


def _squares(values: np.ndarray) -> list[tuple[float, int]]:
    """Return the mean squares whose sum, over the number of cells, is the variance of the mean; with their freedom."""
    seeds, images = values.shape
    by_image = (seeds * values.mean(axis=0).var(ddof=1), images - 1)
    if seeds == 1:
        return [by_image]
    by_seed = (images * values.mean(axis=1).var(ddof=1), seeds - 1)
    left = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    freedom = (seeds - 1) * (images - 1)
    residual = float((left**2).sum() / freedom)
    effects = [found for found in (by_image, by_seed) if found[0] > residual]
    return [*effects, ((1 - len(effects)) * residual, freedom)]


def images_of_half_a(profile: Profile) -> int:
    """Return how many images, the first ones, searches and choices have seen: half A of the study's bench.

    Raises:
        MissingArtefactError, CorruptArtefactError, StaleArtefactError: of the bench.
    """
    return int(load_bench(profile).table["n_a"].max())


def held_out_hits(profile: Profile, table: pd.DataFrame) -> pd.Series:
    """Return each method's hits, 0 or 1, on images that no search has seen, shape (seeds, images).

    Evolution and the best random configuration were chosen on half A of the bench's images; the others are left.

    Args:
        profile: the study; its bench says how many images half A has.
        table: of :func:`book.studies.quantization.load_comparison`.

    Returns:
        series of arrays, index (quantizer, average_bits, proxy).

    Raises:
        InvalidParameterError: the comparison was measured on no other images than half A.
        MissingArtefactError, CorruptArtefactError, StaleArtefactError: of the bench.
    """
    seen = images_of_half_a(profile)
    if (images := int(table["images"].min())) < seen + 2:
        raise InvalidParameterError(
            f"The comparison of {profile.name!r} was measured on {images} images, of which searches have seen {seen}. "
            "Build it again with more images."
        )
    groups = table.sort_values("seed").groupby(["quantizer", "average_bits", "proxy"], sort=False)
    return groups.apply(lambda rows: np.stack(rows["hits"])[:, seen:].astype(np.float64))


def compare_methods(profile: Profile, table: pd.DataFrame, method: str) -> pd.DataFrame:
    """Return by how much one method's choices are above the others', image by image.

    Args:
        profile: the study.
        table: of :func:`book.studies.quantization.load_comparison`.
        method: the one that the others are compared with.

    Returns:
        columns quantizer, average_bits, proxy (the other), value, lo, hi, p_value (two-sided), holm (the p-values of
        one quantizer and budget adjusted by Holm's method), images, seeds.

    Raises:
        InvalidParameterError: the table has no such method, or see :func:`held_out_hits`.
    """
    hits, rows = held_out_hits(profile, table), []
    hits = hits[hits.index.get_level_values("quantizer") != FLOAT]
    for (quantizer, average), group in hits.groupby(level=[0, 1], sort=False):
        by_proxy = group.droplevel([0, 1])
        if method in by_proxy:
            own = by_proxy[method]
            for proxy, other in by_proxy.drop(method).items():
                shared = min(len(own), len(other))
                found = dataclasses.asdict(mean_of(own[:shared] - other[:shared]))
                rows.append({"quantizer": quantizer, "average_bits": average, "proxy": proxy} | found)
    if not rows:
        known = ", ".join(sorted(set(table["proxy"]) - {FLOAT}))
        raise InvalidParameterError(f"No method {method!r} stands beside another one; there are {known}.")
    found = pd.DataFrame(rows)
    adjusted = found.groupby(["quantizer", "average_bits"], sort=False)["p_value"].transform(lambda p: holm(list(p)))
    return found.assign(holm=adjusted)
