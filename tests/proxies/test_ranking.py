"""Rank statistics against SciPy, scikit-learn, closed forms and simulated truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LinearRegression

from emq_lib.core.errors import ConfigLengthError, InvalidBitsError, InvalidParameterError, InvalidScoreError
from emq_lib.proxies import counts as counts_
from emq_lib.proxies import intervals, oracles, ranking, resampling

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


def test_of_equal_scores_the_first_stay():
    scores, accuracy = np.array([5.0, 4, 3, 3, 3, 1]), np.array([6.0, 1, 5, 9, 9, 0])
    assert ranking.rho_at(scores, accuracy, 50) == pytest.approx(stats.spearmanr(scores[:3], accuracy[:3]).statistic)
    scores = np.array([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    with pytest.raises(InvalidScoreError, match="the best 30 % all have the same score"):
        ranking.rho_at(scores, np.arange(10.0), 30)
    with pytest.raises(InvalidScoreError, match="the best 30 % all have the same accuracy"):
        ranking.rho_at(np.arange(10.0), np.array([0] * 7 + [1] * 3), 30)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(3, 40), percent=st.sampled_from([20, 50, 100]))
def test_counting_draws_equals_ranking_them(seed, levels, percent):
    rng = np.random.default_rng(seed)
    scores, accuracy = rng.integers(levels, size=60).astype(float), rng.integers(levels, size=60).astype(float)
    counts = resampling.draw(4, [np.arange(60)], rng)
    assert (counts.sum(axis=1) == 60).all()
    for found, row in zip(counts_.rho_of_counts(scores, accuracy, percent)(counts), counts, strict=True):
        drawn = np.repeat(np.arange(60), row)
        x, y = scores[drawn], accuracy[drawn]
        kept = sorted(range(60), key=lambda i: -x[i])[: 60 * percent // 100]
        if len(set(x[kept])) > 1 and len(set(y[kept])) > 1:
            assert found == pytest.approx(stats.spearmanr(x[kept], y[kept]).statistic, abs=1e-12)
        else:
            assert np.isnan(found)


def test_interval_agrees_with_scipys():
    """The same generator draws the same resamples; ties with the estimate are counted otherwise."""
    x, y = _pair(100, 0.9, 20)
    found = intervals.bootstrap_rho(x, y, resamples=4_000, rng=np.random.default_rng(0))

    def rho(a, b, axis):
        ranks = (stats.rankdata(values, axis=axis) for values in (a, b))
        return stats.pearsonr(*ranks, axis=axis).statistic

    other = stats.bootstrap((x, y), rho, paired=True, n_resamples=4_000, method="BCa", rng=np.random.default_rng(0))
    assert (found.lo, found.hi) == pytest.approx(other.confidence_interval, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("correlation", "n"), [(0.8, 200), (0.99, 100)])
def test_interval_covers_the_truth_as_often_as_it_says(correlation, n):
    truth = 6 / np.pi * np.arcsin(correlation / 2)  # Spearman's rho of a bivariate normal
    rng = np.random.default_rng(2)
    hits = []
    for seed in range(300):
        estimate = intervals.bootstrap_rho(*_pair(n, correlation, 1000 + seed), resamples=300, rng=rng)
        hits.append(estimate.lo <= truth <= estimate.hi)
    assert 0.91 <= np.mean(hits) <= 0.98  # 95 % with a binomial standard error of 1.3 points


def test_a_perfect_ranking_has_an_interval_without_width():
    x = np.arange(50.0)
    estimate = intervals.bootstrap_rho(x, x**3, rng=np.random.default_rng(0))
    assert (estimate.value, estimate.lo, estimate.hi) == pytest.approx((1, 1, 1))
    assert str(estimate) == "1.00 [1.00, 1.00], n = 50"


def test_a_higher_level_is_wider():
    narrow, wide = (
        intervals.bootstrap_rho(*_pair(80, 0.6, 1), level=level, rng=np.random.default_rng(0)) for level in (0.8, 0.99)
    )
    assert wide.lo < narrow.lo < narrow.hi < wide.hi
    assert wide.level == 0.99


def test_resamples_that_rank_nothing_are_not_passed_over():
    scores = np.array([3.0, 2] + [1] * 48)
    with pytest.raises(InvalidScoreError, match="resamples rank nothing"):
        intervals.bootstrap_rho(scores, np.arange(50.0), percent=10, rng=np.random.default_rng(0))


def test_bootstrap_repeats_with_its_seed_and_narrows_with_n():
    widths = []
    for n in (50, 800):
        first, again = (
            intervals.bootstrap_rho(*_pair(n, 0.6, 3), resamples=500, rng=np.random.default_rng(4)) for _ in range(2)
        )
        assert first == again
        widths.append(first.hi - first.lo)
    assert widths[1] < widths[0] / 3


def test_paired_comparison_sees_a_difference_that_unpaired_intervals_hide():
    rng = np.random.default_rng(5)
    accuracy = rng.normal(size=200)
    shared = accuracy + 0.5 * rng.normal(size=200)
    better, worse = shared + 0.05 * rng.normal(size=200), shared + 0.3 * rng.normal(size=200)
    found = intervals.compare(better, worse, accuracy, rng=rng)
    assert found.lo <= found.difference <= found.hi
    assert found.lo > 0
    assert found.p < 0.05
    one, two = (intervals.bootstrap_rho(s, accuracy, rng=rng) for s in (better, worse))
    assert one.lo < two.hi  # the single intervals overlap
    same = intervals.compare(better, better, accuracy, rng=rng)
    assert same.difference == 0
    assert same.p == 1


@pytest.mark.slow
def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(6)
    p = []
    for _ in range(200):
        accuracy = rng.normal(size=100)
        found = intervals.compare(*(accuracy + rng.normal(size=(2, 100))), accuracy, resamples=200, rng=rng)
        p.append(found.p)
        assert (found.lo <= 0 <= found.hi) == (found.p >= 0.05) or abs(found.p - 0.05) < 0.02
    assert np.mean(np.array(p) < 0.05) < 0.11
    assert 0.4 < np.mean(np.array(p) < 0.5) < 0.6


def test_holm_against_a_worked_example():
    np.testing.assert_allclose(intervals.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.9, 0.8]).max() == 1
    assert intervals.holm([]).shape == (0,)
    with pytest.raises(InvalidParameterError, match="0 to 1"):
        intervals.holm([0.1, np.nan])


def test_partial_rho_is_the_correlation_of_residual_ranks():
    rng = np.random.default_rng(7)
    size = rng.normal(size=300)
    x, y = size + rng.normal(size=300), size + rng.normal(size=300)
    rx, ry, rs = (stats.rankdata(v) for v in (x, y, size))
    residuals = [r - LinearRegression().fit(rs[:, None], r).predict(rs[:, None]) for r in (rx, ry)]
    assert ranking.partial_rho(x, y, size[:, None]) == pytest.approx(np.corrcoef(residuals)[0, 1])
    assert abs(ranking.partial_rho(x, y, size[:, None])) < ranking.spearman(x, y)


def test_partial_rho_agrees_with_the_formula_for_one_covariate():
    rng = np.random.default_rng(10)
    x, y, z = np.linalg.cholesky([[1, 0.8, 0.6], [0.8, 1, 0.5], [0.6, 0.5, 1]]) @ rng.normal(size=(3, 400))
    xy, xz, yz = (ranking.spearman(*pair) for pair in ((x, y), (x, z), (y, z)))
    closed_form = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    found = intervals.bootstrap_partial_rho(x, y, z[:, None], rng=rng)
    assert found.value == pytest.approx(closed_form, abs=1e-12)
    assert found.lo < (0.7859 - 0.5822 * 0.4826) / np.sqrt((1 - 0.5822**2) * (1 - 0.4826**2)) < found.hi
    repeated = np.column_stack([z, -z, np.ones(400)])  # collinear and constant columns add nothing
    assert ranking.partial_rho(x, y, repeated) == pytest.approx(closed_form, abs=1e-9)


@pytest.mark.parametrize(
    "proxy", [lambda s, b: 3 * s, lambda s, b: s**3, lambda s, b: -b, lambda s, b: s + b / 7, lambda s, b: 8 * s + 1e9]
)
def test_partial_rho_of_the_covariates_themselves_is_undefined(proxy):
    rng = np.random.default_rng(11)
    size, bops = rng.integers(60_000, 120_000, size=100).astype(float), rng.uniform(1e8, 3e8, size=100)
    accuracy, covariates = size / 1e5 + rng.normal(size=100), np.column_stack([size, bops])
    assert np.isnan(ranking.partial_rho(proxy(size, bops), accuracy, covariates))
    estimate = intervals.bootstrap_partial_rho(proxy(size, bops), accuracy, covariates, rng=rng)
    assert np.isnan([estimate.value, estimate.lo, estimate.hi]).all()


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_noise_ceiling_is_what_a_perfect_predictor_reaches(noise):
    rng = np.random.default_rng(8)
    truth = rng.normal(size=3_000)
    quarters = truth + noise * rng.normal(size=(4, 3_000))
    ceiling = intervals.noise_ceiling(quarters[0], quarters[1], resamples=200, rng=rng)
    whole, other = quarters[:2].mean(axis=0), quarters[2:].mean(axis=0)
    assert ceiling.halves.value < ceiling.full < ceiling.perfect.value < 1
    assert ceiling.full == pytest.approx(ranking.spearman(whole, other), abs=0.03)
    assert ceiling.perfect.value == pytest.approx(ranking.spearman(truth, whole), abs=0.02)
    assert ceiling.halves.value**0.5 == pytest.approx(ranking.spearman(truth, quarters[0]), abs=0.02)


def test_noise_ceiling_of_pure_noise_is_low():
    rng = np.random.default_rng(12)
    ceiling = intervals.noise_ceiling(*rng.normal(size=(2, 60)), rng=rng)
    assert ceiling.perfect.lo == 0
    assert ceiling.perfect.hi < 0.8


def test_additive_oracle_recovers_an_additive_truth():
    rng = np.random.default_rng(9)
    table = rng.normal(size=(8, 3))
    configs = rng.integers(2, 5, size=(300, 8))
    accuracy = table[np.arange(8), configs - 2].sum(axis=1)
    oracle = oracles.additive_oracle(configs[:150], accuracy[:150], configs[150:], CHOICES)
    assert ranking.spearman(oracle.predictions, accuracy[150:]) > 0.999
    from_table = oracle.table[np.arange(8), configs[150:] - 2].sum(axis=1)
    np.testing.assert_allclose(np.diff(from_table), np.diff(oracle.predictions), atol=1e-9)


def test_pairwise_oracle_knows_interactions_that_a_sum_cannot():
    rng = np.random.default_rng(13)
    configs = rng.integers(2, 5, size=(400, 4))
    accuracy = np.where(configs[:, 0] == configs[:, 1], 1.0, -1.0) + 0.1 * configs[:, 2]
    halves = configs[:200], accuracy[:200], configs[200:], CHOICES
    additive, pairwise = oracles.additive_oracle(*halves), oracles.pairwise_oracle(*halves)
    assert pairwise.table is None
    assert ranking.spearman(pairwise.predictions, accuracy[200:]) > 0.95
    assert ranking.spearman(additive.predictions, accuracy[200:]) < 0.5


def test_pair_interactions_find_the_pair_and_little_else():
    rng = np.random.default_rng(21)
    configs = rng.choice(CHOICES, size=(600, 6))
    accuracy = configs @ np.arange(6.0) - 7 * ((configs[:, 1] == 2) & (configs[:, 4] == 2)) + rng.normal(size=600)
    effects, p_values = oracles.pair_interactions(configs, accuracy, CHOICES)
    assert effects[1, 4] == effects[4, 1] == pytest.approx(-7, abs=0.6)
    assert p_values[1, 4] < 1e-9
    others = np.delete(p_values[np.triu_indices(6, 1)], 7)  # (1, 4) is the eighth pair
    assert others.min() > 1e-3
    assert 0.2 < np.median(others) < 0.8
    lowest = configs == 2
    columns = [np.ones(600), *(column == b for b in (2, 3) for column in configs.T), lowest[:, 0] & lowest[:, 5]]
    truth = np.linalg.lstsq(np.stack(columns, axis=1).astype(float), accuracy)[0][-1]
    assert effects[0, 5] == pytest.approx(truth, abs=1e-9)


def test_p_values_of_pair_interactions_are_uniform_without_any():
    rng = np.random.default_rng(22)
    found = []
    for _ in range(40):
        configs = rng.choice(CHOICES, size=(120, 4))
        noise = rng.normal(size=120) * (1 + 3 * (configs[:, 0] == 2))  # of unequal variance
        found.extend(oracles.pair_interactions(configs, noise, CHOICES)[1][np.triu_indices(4, 1)])
    assert abs(np.mean(np.array(found) < 0.1) - 0.1) < 0.06


def test_pair_interactions_need_more_configurations_than_coefficients():
    rng = np.random.default_rng(23)
    configs = rng.choice(CHOICES, size=(10, 6))
    with pytest.raises(InvalidScoreError, match="too few"):
        oracles.pair_interactions(configs, rng.normal(size=10), CHOICES)


@pytest.mark.parametrize("oracle", [oracles.additive_oracle, oracles.pairwise_oracle])
def test_oracles_refuse_foreign_configurations(oracle):
    rng = np.random.default_rng(14)
    configs, accuracy = rng.integers(2, 5, size=(40, 3)), rng.normal(size=40)
    with pytest.raises(InvalidBitsError):
        oracle(configs, accuracy, configs + 1, CHOICES)
    with pytest.raises(ConfigLengthError):
        oracle(configs, accuracy, configs[:, :2], CHOICES)
    with pytest.raises(InvalidScoreError, match="one for each of 40"):
        oracle(configs, accuracy[:39], configs, CHOICES)


def test_a_table_is_stretched_to_another_depth():
    table = np.random.default_rng(23).normal(size=(7, 3))
    np.testing.assert_array_equal(oracles.resample_layers(table, 7), table)
    ramp = np.linspace(0, 1, 40)[:, None] * [1.0, 2.0]
    depths = (np.arange(9) + 0.5) / 9 * 40 - 0.5
    np.testing.assert_allclose(oracles.resample_layers(ramp, 9), depths[:, None] / 39 * [1.0, 2.0], atol=1e-12)
    assert np.array_equal(oracles.resample_layers(table[:1], 5), np.repeat(table[:1], 5, axis=0))


def test_regret_is_what_trusting_costs():
    accuracy, scores, costs = np.array([50, 60, 70, 80.0]), np.array([4, 3, 2, 1.0]), np.array([1, 2, 3, 4.0])
    assert ranking.regret(scores, accuracy, costs, budget=3) == 20
    with pytest.raises(InvalidScoreError, match="the cheapest costs 1"):
        ranking.regret(scores, accuracy, costs, budget=0.5)
    with pytest.raises(InvalidScoreError, match="one finite number for each of 4"):
        ranking.regret(scores, accuracy, costs[:3], budget=3)


def test_interval_of_regret_comes_from_resampling_whole_configurations():
    rng = np.random.default_rng(0)
    accuracy, costs = rng.normal(60, 10, size=80), rng.uniform(size=80)
    scores = accuracy + rng.normal(0, 5, size=80)
    found = intervals.bootstrap_regret(scores, accuracy, costs, 0.5, resamples=3_000, rng=np.random.default_rng(1))
    fits = np.flatnonzero(costs <= 0.5)
    draws = [rng.choice(fits, size=len(fits)) for _ in range(3_000)]
    lost = [accuracy[rows].max() - accuracy[rows][scores[rows].argmax()] for rows in draws]
    assert (found.value, found.n) == (ranking.regret(scores, accuracy, costs, 0.5), len(fits))
    np.testing.assert_allclose([found.lo, found.hi], np.quantile(lost, [0.025, 0.975]), atol=1.0)
    perfect = intervals.bootstrap_regret(accuracy, accuracy, costs, 0.5, rng=rng)
    assert (perfect.value, perfect.lo, perfect.hi) == (0, 0, 0)


def test_rho_inside_bins_ignores_what_cost_alone_explains():
    rng = np.random.default_rng(3)
    costs = rng.uniform(size=200)
    hidden = rng.normal(size=200)
    accuracy = 100 * costs + hidden
    knows = intervals.bootstrap_binned_rho(hidden + 50 * costs, accuracy, costs, rng=rng)
    order = np.argsort(costs, kind="stable").reshape(5, 40)
    truth = np.mean([stats.spearmanr((hidden + 50 * costs)[rows], accuracy[rows]).statistic for rows in order])
    assert knows.value == pytest.approx(truth)
    assert knows.lo < truth < knows.hi
    blind = intervals.bootstrap_binned_rho(rng.normal(size=200), accuracy, costs, rng=rng)
    assert blind.lo < 0 < blind.hi
    equal = intervals.bootstrap_binned_rho(np.floor(5 * (costs.argsort().argsort() / 200)), accuracy, costs, rng=rng)
    assert np.isnan(equal.value)
    with pytest.raises(InvalidScoreError, match="50 bins"):
        intervals.bootstrap_binned_rho(hidden, accuracy, costs, bins=50, rng=rng)


@pytest.mark.slow
def test_interval_inside_bins_covers_the_truth():
    rng, hits = np.random.default_rng(11), 0
    truth = 6 / np.pi * np.arcsin(0.8 / 2)
    for _ in range(200):
        x = rng.normal(size=150)
        y = 0.8 * x + 0.6 * rng.normal(size=150)
        found = intervals.bootstrap_binned_rho(x, y, rng.uniform(size=150), bins=3, resamples=400, rng=rng)
        hits += found.lo <= truth <= found.hi
    assert 0.90 <= hits / 200 <= 0.985


@pytest.mark.slow
def test_predicted_number_of_configurations_has_the_power_it_promises():
    """Among simulated benches of that size, four in five show the difference."""
    rng = np.random.default_rng(2)

    def bench(n):
        accuracy = rng.normal(size=n)
        return accuracy + 0.6 * rng.normal(size=n), accuracy + 0.8 * rng.normal(size=n), accuracy

    large = [intervals.compare(*bench(2_000), resamples=400, rng=rng) for _ in range(5)]
    n = round(np.median([found.configs_to_separate() for found in large]))
    shown = np.mean([intervals.compare(*bench(n), resamples=400, rng=rng).lo > 0 for _ in range(150)])
    assert 0.68 <= shown <= 0.92
    assert intervals.Comparison(0.0, -1, 1, 1, 0.1, 50).configs_to_separate() == np.inf


def test_weighted_tau_looks_at_the_best():
    accuracy = np.arange(20.0)
    swapped_best, swapped_worst = accuracy.copy(), accuracy.copy()
    swapped_best[[18, 19]], swapped_worst[[0, 1]] = [19, 18], [1, 0]
    assert ranking.weighted_tau(swapped_best, accuracy) < ranking.weighted_tau(swapped_worst, accuracy) < 1
    assert ranking.kendall(swapped_best, accuracy) == pytest.approx(ranking.kendall(swapped_worst, accuracy))


@pytest.mark.slow
@pytest.mark.parametrize("statistic", [ranking.kendall, ranking.weighted_tau, ranking.logit_pearson])
def test_interval_of_any_statistic_is_scipys(statistic):
    rng = np.random.default_rng(3)
    scores = rng.normal(size=60)
    top1 = 50 + 8 * scores + 4 * rng.normal(size=60)
    found = intervals.bootstrap(statistic, scores, top1, resamples=1_000, rng=rng)
    other = stats.bootstrap((scores, top1), statistic, paired=True, vectorized=False, n_resamples=1_000, rng=rng)
    assert found.value == statistic(scores, top1)
    ends = other.confidence_interval
    np.testing.assert_allclose((found.lo, found.hi), ends, atol=0.15 * (ends.high - ends.low))


def test_correlation_on_the_logit_scale():
    scores = np.array([-2.0, 0.5, 1.0, 3.0])
    assert ranking.logit_pearson(scores, 100 / (1 + np.exp(-scores))) == pytest.approx(1)


def test_none_or_all_of_the_images_are_half_an_image_off():
    """The logit of half of 200 images off either end, where those of 0 and 100 % are infinite."""
    scores, top1 = np.array([-2.0, 0.5, 1.0, 3.0]), np.array([0.0, 50, 60, 100])
    logits = [np.log(0.0025 / 0.9975), 0, np.log(0.6 / 0.4), np.log(0.9975 / 0.0025)]
    truth = stats.pearsonr(scores, logits).statistic
    assert ranking.logit_pearson(scores, top1, images=200) == pytest.approx(truth)
    rising = [ranking.logit_pearson(scores, top1, images=images) for images in (10, 200, 10_000, 10**9)]
    assert np.isfinite(rising).all()
    with pytest.raises(InvalidScoreError, match="0 to 100"):
        ranking.logit_pearson(scores, np.array([-0.1, 10, 20, 30]))


@pytest.mark.parametrize(
    ("rho", "n", "low", "high"), [(0.7921, 50, 0.65, 0.88), (0.57, 25, 0.21, 0.79), (0.4259, 10, -0.30, 0.84)]
)
def test_sampling_interval_of_reported_correlations(rho, n, low, high):
    assert intervals.sampling_interval(rho, n) == pytest.approx((low, high), abs=0.005)


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
        intervals.bootstrap_rho(*_pair(12, 0.5, 0), rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: ranking.rho_at(x, y, 0),
        lambda x, y: ranking.rho_at(x, y, 101),
        lambda x, y: intervals.bootstrap_rho(x, y, level=95, rng=np.random.default_rng(0)),
        lambda x, y: intervals.bootstrap_rho(x, y, resamples=10, rng=np.random.default_rng(0)),
        lambda x, y: intervals.sampling_interval(0.5, 3),
        lambda x, y: intervals.sampling_interval(1.0, 30),
    ],
)
def test_arguments_out_of_range_are_named(call):
    with pytest.raises(InvalidParameterError, match=r"must lie|or more|need"):
        call(*_pair(50, 0.5, 0))


def test_many_proxies_need_a_column_for_each_configuration():
    with pytest.raises(InvalidScoreError, match="need one column for each"):
        ranking.fitness_many(np.ones((4, 30)), np.arange(29.0))
    assert np.isnan(ranking.fitness_many(np.arange(20.0).reshape(2, 10), np.arange(10.0))).all()  # 20 % keep only two
