"""Rank statistics against SciPy, scikit-learn, closed forms and simulated truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LinearRegression

from emq_lib import ranking
from emq_lib.errors import InvalidScoreError

CHOICES = (2, 3, 4)


def _pair(n, correlation, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return x, correlation * x + np.sqrt(1 - correlation**2) * rng.normal(size=n)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=40))
def test_rho_agrees_with_scipy_also_among_ties(pairs):
    x, y = np.array(pairs, dtype=float).T
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert ranking.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert ranking.kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("percent", [20, 50])
def test_rho_at_a_share_is_rho_inside_the_best_scored(percent):
    x, y = _pair(101, 0.7, 0)
    kept = sorted(range(101), key=lambda i: -x[i])[: round(101 * percent / 100)]
    assert ranking.rho_at(x, y, percent) == pytest.approx(stats.spearmanr(x[kept], y[kept]).statistic)


def test_many_proxies_at_once_get_the_same_fitness():
    rng = np.random.default_rng(1)
    scores, accuracy = rng.normal(size=(20, 60)), rng.normal(size=60)
    many = ranking.fitness_many(scores, accuracy)
    np.testing.assert_allclose(many, [ranking.fitness(row, accuracy) for row in scores], atol=1e-12)
    scores[3, 5], scores[4] = np.nan, 1.0
    assert np.isnan(ranking.fitness_many(scores, accuracy)[[3, 4]]).all()


def test_a_stable_sort_breaks_ties():
    scores = np.array([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    with pytest.raises(InvalidScoreError, match="the best 30 % all have the same"):
        ranking.rho_at(scores, np.arange(10.0), 30)


def test_interval_covers_the_truth_as_often_as_it_says():
    correlation, n, rounds = 0.8, 150, 300
    truth = 6 / np.pi * np.arcsin(correlation / 2)  # Spearman's rho of a bivariate normal
    rng = np.random.default_rng(2)
    hits = []
    for seed in range(rounds):
        estimate = ranking.bootstrap_rho(*_pair(n, correlation, 1000 + seed), resamples=300, rng=rng)
        hits.append(estimate.lo <= truth <= estimate.hi)
    assert 0.91 <= np.mean(hits) <= 0.98  # 95 % with a binomial standard error of 1.3 points


def test_bootstrap_repeats_with_its_seed_and_narrows_with_n():
    widths = []
    for n in (50, 800):
        first, again = (
            ranking.bootstrap_rho(*_pair(n, 0.6, 3), resamples=500, rng=np.random.default_rng(4)) for _ in range(2)
        )
        assert first == again
        widths.append(first.hi - first.lo)
    assert widths[1] < widths[0] / 3


def test_paired_comparison_sees_a_difference_that_unpaired_intervals_hide():
    rng = np.random.default_rng(5)
    accuracy = rng.normal(size=200)
    shared = accuracy + 0.5 * rng.normal(size=200)
    better, worse = shared + 0.05 * rng.normal(size=200), shared + 0.3 * rng.normal(size=200)
    found = ranking.compare(better, worse, accuracy, rng=rng)
    assert found.lo <= found.difference <= found.hi
    assert found.lo > 0
    assert found.p < 0.05
    one, two = (ranking.bootstrap_rho(s, accuracy, rng=rng) for s in (better, worse))
    assert one.lo < two.hi  # the single intervals overlap
    same = ranking.compare(better, better, accuracy, rng=rng)
    assert same.difference == 0
    assert same.p == 1


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(6)
    p = []
    for _ in range(150):
        accuracy = rng.normal(size=60)
        pair = accuracy + rng.normal(size=(2, 60))
        p.append(ranking.compare(*pair, accuracy, resamples=200, rng=rng).p)
    assert np.mean(np.array(p) < 0.05) < 0.12


def test_holm_against_a_worked_example():
    np.testing.assert_allclose(ranking.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert ranking.holm([0.9, 0.8]).max() == 1


def test_partial_rho_is_the_correlation_of_residual_ranks():
    rng = np.random.default_rng(7)
    size = rng.normal(size=300)
    x, y = size + rng.normal(size=300), size + rng.normal(size=300)
    rx, ry, rs = (stats.rankdata(v) for v in (x, y, size))
    residuals = [r - LinearRegression().fit(rs[:, None], r).predict(rs[:, None]) for r in (rx, ry)]
    assert ranking.partial_rho(x, y, size[:, None]) == pytest.approx(np.corrcoef(residuals)[0, 1])
    assert abs(ranking.partial_rho(x, y, size[:, None])) < ranking.spearman(x, y)
    assert np.isnan(ranking.partial_rho(3 * size, y, size[:, None]))


def test_noise_ceiling_steps_up_to_whole_test_sets():
    rng = np.random.default_rng(8)
    truth = rng.normal(size=4_000)
    quarters = truth + rng.normal(size=(4, 4_000))
    ceiling = ranking.noise_ceiling(quarters[0], quarters[1], rng=rng)
    whole = stats.spearmanr(quarters[:2].mean(axis=0), quarters[2:].mean(axis=0)).statistic
    assert ceiling.halves.value < ceiling.full == pytest.approx(whole, abs=0.03)


def test_additive_oracle_recovers_an_additive_truth():
    rng = np.random.default_rng(9)
    table = rng.normal(size=(8, 3))
    configs = rng.integers(2, 5, size=(300, 8))
    accuracy = table[np.arange(8), configs - 2].sum(axis=1)
    oracle = ranking.additive_oracle(configs[:150], accuracy[:150], configs[150:], CHOICES)
    assert ranking.spearman(oracle.predictions, accuracy[150:]) > 0.999
    from_table = oracle.table[np.arange(8), configs[150:] - 2].sum(axis=1)
    np.testing.assert_allclose(np.diff(from_table), np.diff(oracle.predictions), atol=1e-9)


def test_regret_is_what_trusting_costs():
    accuracy, scores, costs = np.array([50, 60, 70, 80.0]), np.array([4, 3, 2, 1.0]), np.array([1, 2, 3, 4.0])
    assert ranking.regret(scores, accuracy, costs, budget=3) == 20
    with pytest.raises(InvalidScoreError, match="the cheapest costs 1"):
        ranking.regret(scores, accuracy, costs, budget=0.5)


@pytest.mark.parametrize(
    ("rho", "n", "low", "high"), [(0.7921, 50, 0.65, 0.88), (0.57, 25, 0.21, 0.79), (0.4259, 10, -0.30, 0.84)]
)
def test_sampling_interval_of_reported_correlations(rho, n, low, high):
    assert ranking.sampling_interval(rho, n) == pytest.approx((low, high), abs=0.005)


@pytest.mark.parametrize(
    ("scores", "accuracy", "message"),
    [
        ([1.0, 2, 3], [1.0, 2], "must be 1-D, alike"),
        ([1.0, np.nan, 3], [1.0, 2, 3], "scores hold NaN or infinity at position 1"),
        ([1.0, 2, 3], [5.0, 5, 5], "accuracies are all equal"),
    ],
)
def test_bad_input_is_named(scores, accuracy, message):
    with pytest.raises(InvalidScoreError, match=message):
        ranking.spearman(np.array(scores), np.array(accuracy))


def test_too_few_configurations_for_an_interval():
    with pytest.raises(InvalidScoreError, match="30 configurations or more, got 12"):
        ranking.bootstrap_rho(*_pair(12, 0.5, 0), rng=np.random.default_rng(0))
