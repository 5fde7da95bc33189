"""Means over seeds and images against analysis of variance and simulation; margins image by image, on half B."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.formula.api import ols

from book.studies import margins
from emq_lib.core.errors import InvalidParameterError, InvalidScoreError


def _drawn(rng, seeds, images, *, of_seeds, of_images, left):
    """Draw a table with random effects of seeds and of images, whose true mean is 0."""
    luck, ease = rng.normal(0, of_seeds, (seeds, 1)), rng.normal(0, of_images, (1, images))
    return luck + ease + rng.normal(0, left, (seeds, images))


def _anova(values):
    """Return statsmodels' mean squares of seeds, images and what is left, and their degrees of freedom."""
    rows = [(seed, image, value) for (seed, image), value in np.ndenumerate(values)]
    table = pd.DataFrame(rows, columns=["seed", "image", "value"])
    found = sm.stats.anova_lm(ols("value ~ C(seed) + C(image)", table).fit())
    return [(found.loc[row, "mean_sq"], found.loc[row, "df"]) for row in ("C(seed)", "C(image)", "Residual")]


def test_the_variance_of_a_mean_is_that_of_two_crossed_random_effects():
    """By hand from statsmodels' analysis of variance: (S + I - R) / cells, the noise counted once."""
    values = _drawn(np.random.default_rng(0), 3, 20, of_seeds=0.2, of_images=0.3, left=0.1)
    (of_seeds, a), (of_images, b), (left, c) = _anova(values)
    assert min(of_seeds, of_images) > left
    variance = (of_seeds + of_images - left) / values.size
    freedom = variance**2 / sum((s / values.size) ** 2 / d for s, d in ((of_seeds, a), (of_images, b), (left, c)))
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    found = margins.mean_of(values)
    assert (found.lo, found.hi) == pytest.approx((100 * (values.mean() - half), 100 * (values.mean() + half)))
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(values.mean()) / variance**0.5, freedom))


@pytest.mark.parametrize(("of_seeds", "of_images", "kept"), [(0.0, 0.3, 1), (0.3, 0.0, 0), (0.0, 0.0, 2)])
def test_an_effect_below_the_noise_has_no_variance(of_seeds, of_images, kept):
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = _drawn(rng, 3, 12, of_seeds=of_seeds, of_images=of_images, left=0.2)
        squares = _anova(values)
        if [s > squares[2][0] for s, _ in squares[:2]] == [kept == 0, kept == 1]:
            break
    square, freedom = squares[kept]
    half = 100 * stats.t.ppf(0.975, freedom) * (square / values.size) ** 0.5
    found = margins.mean_of(values)
    assert (found.hi - found.lo) / 2 == pytest.approx(half)


def test_of_one_seed_only_images_count():
    values = np.random.default_rng(2).random(50) < 0.7
    interval = stats.ttest_1samp(100.0 * values, 0).confidence_interval(0.95)
    found = margins.mean_of(values)
    assert (found.lo, found.hi, found.seeds) == (pytest.approx(interval.low), pytest.approx(interval.high), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_seeds", "of_images", "left"), [(0.0, 0.3, 0.15), (0.004, 0.3, 0.15), (0.02, 0.3, 0.15), (0.006, 0.1, 0.3)]
)
def test_intervals_cover_the_truth_as_often_as_they_say_and_are_no_wider_than_need_be(of_seeds, of_images, left):
    rng, covered, widths, means = np.random.default_rng(0), 0, [], []
    for _ in range(400):
        found = margins.mean_of(_drawn(rng, 3, 300, of_seeds=of_seeds, of_images=of_images, left=left))
        covered += found.lo <= 0 <= found.hi
        widths.append(found.hi - found.lo)
        means.append(found.value)
    assert 0.92 <= covered / 400 <= 0.985
    assert np.median(widths) < 1.35 * 2 * 1.96 * np.std(means)


def test_what_never_varies_has_no_interval():
    assert margins.mean_of(np.zeros((3, 9))) == margins.Mean(0.0, 0.0, 0.0, 1.0, 9, 3)
    assert margins.mean_of(np.ones((3, 9))) == margins.Mean(100.0, 100.0, 100.0, 0.0, 9, 3)


@pytest.mark.parametrize(
    "values", [None, "hits", [[1.0], [2.0, 3.0]], [[np.nan, 1.0]], [[1j, 2.0]], [["1", "0"]], object()], ids=range(7)
)
def test_hits_that_are_no_numbers(values):
    with pytest.raises(InvalidScoreError, match="hits"):
        margins.mean_of(values)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (3, 1), (1,), (0, 5), (2, 3, 4)])
def test_hits_of_another_shape(shape):
    with pytest.raises(InvalidParameterError, match="seeds by two images or more"):
        margins.mean_of(np.zeros(shape))


@pytest.fixture
def table(study, profile):
    """Return hits of three methods under three seeds; on half A, on which configurations were chosen, all are right."""
    rng, rows, seen = np.random.default_rng(1), [], margins.images_of_half_a(profile)
    count = seen + 200
    for seed in range(3):
        own = rng.random(count) < 0.8
        own[:seen] = True
        flipped = own.copy()
        flipped[seen : seen + 30] = ~flipped[seen : seen + 30]
        rows += [
            {"proxy": name, "hits": hits, "seed": seed, "quantizer": "rtn", "average_bits": 3.0, "images": count}
            for name, hits in (("evolved", own), ("random", flipped), ("uniform", own))
        ]
    return pd.DataFrame(rows)


def test_differences_are_taken_image_by_image_and_on_images_that_no_search_saw(profile, table):
    found = margins.compare_methods(profile, table, "evolved").set_index("proxy")
    hits = margins.held_out_hits(profile, table)["rtn", 3.0]
    assert hits["evolved"].shape == (3, 200)
    assert found.loc["uniform", ["value", "lo", "hi", "p_value"]].tolist() == [0, 0, 0, 1]
    expected = 100 * (hits["evolved"].mean() - hits["random"].mean())
    assert found.loc["random", "value"] == pytest.approx(expected)
    apart = margins.mean_of(hits["evolved"]), margins.mean_of(hits["random"])
    width = found.loc["random", "hi"] - found.loc["random", "lo"]
    assert width < apart[0].hi - apart[0].lo + apart[1].hi - apart[1].lo
    assert (found["holm"] >= found["p_value"]).all()


@pytest.mark.parametrize("left", [-50, 0, 1])
def test_a_comparison_on_images_that_searches_saw_is_refused(profile, table, left):
    """Half A is the bench's own, however many images the comparison was measured on."""
    count = margins.images_of_half_a(profile) + left
    short = table.assign(images=count, hits=[hits[:count] for hits in table["hits"]])
    with pytest.raises(InvalidParameterError, match="of which searches have seen"):
        margins.held_out_hits(profile, short)


def test_a_method_that_the_table_does_not_have_is_named(profile, table):
    with pytest.raises(InvalidParameterError, match="'evolution'.* there are evolved, random, uniform"):
        margins.compare_methods(profile, table, "evolution")
