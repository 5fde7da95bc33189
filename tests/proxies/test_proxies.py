"""Proxies against loops written out in NumPy, and named errors for bad ones."""

import dataclasses
import itertools

import numpy as np
import pytest

from book.studies import proxies
from book.studies.bench import load_bench
from book.studies.networks import layer_table, load_folded
from book.studies.proxies import load_statistics
from emq_lib.core.errors import InvalidScoreError
from emq_lib.proxies import curvature, handmade
from emq_lib.proxies.scores import score


@pytest.fixture(scope="module")
def statistics(built_study, profile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMQ_STUDY_ROOT", str(built_study))
        return load_statistics(profile)


@pytest.fixture(scope="module")
def moments(built_study, profile, data):
    """Gradients and Fisher diagonal of every weight; the statistics keep a sample of large layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMQ_STUDY_ROOT", str(built_study))
        model = load_folded(profile, "cpu")
    layers = layer_table(model, profile)
    return curvature.gradient_moments(model, list(layers.loc[layers["searchable"], "name"]), data.calibration)


def _truth(name, s, moments, layer, column):
    """One entry of a score table, computed entry by entry in double precision."""
    b = s.choices[column]
    w, g, f = (np.asarray(tensors[layer], dtype=np.float64) for tensors in (s.weights, *moments))
    e = np.asarray(s.errors[layer][column], dtype=np.float64)
    return {
        "bit sum": lambda: b,
        "parameter bits": lambda: b * w.size,
        "BOPs": lambda: b * s.macs[layer],
        "HAWQ": lambda: -s.eigenvalue[layer] * (e**2).sum(),
        "HAWQ-V2": lambda: -s.trace[layer] / w.size * (e**2).sum(),
        "OMPQ": lambda: b * np.exp(-s.similarity[layer]),
        "QE": lambda: {0: 6, 1: 7, 2: 8}[2 - layer // 2] * np.log(_clipped_std(8) * _clipped_std(b)),
        "EMQ": lambda: np.sqrt(np.maximum(b * w, 0)).mean() / len(w),
        "Fisher error": lambda: -(f * e**2).sum(),
        "relative weight error": lambda: -(e**2).sum() / (w**2).sum(),
        "SQNR": lambda: 20 * np.log10(np.linalg.norm(w) / np.linalg.norm(e)),
        "relative output error": lambda: -s.output_error[layer, column],
        "one-layer loss": lambda: -s.loss[layer, column],
        "one-layer KL": lambda: -s.kl[layer, column],
        "sqrt one-layer KL": lambda: -np.sqrt(s.kl[layer, column]),
        "bit-SNIP": lambda: b * np.abs(w * g).sum(),
        "bit-plain": lambda: b * (w * g).sum(),
        "bit-grad-norm": lambda: b * np.sqrt((g**2).sum()),
        "bit-L2": lambda: b * np.sqrt((w**2).sum()),
        **{f"bit-{key}": lambda key=key: b * s.saliencies[key][layer] for key in s.saliencies if key not in OWN},
    }[name]()


OWN = ("SNIP", "plain", "grad-norm", "L2")  # computed from weights and gradients, and so here once more


def _clipped_std(bits):
    """Deviation of a rounded and cut normal variable, by summing over a fine grid."""
    x = np.linspace(-9, 9, 2_000_001)
    density = np.exp(-(x**2) / 2)
    rounded = np.clip(np.round(x), -(2 ** (bits - 1)), 2 ** (bits - 1))
    return np.sqrt((density * rounded**2).sum() / density.sum())


SEPARABLE = [name for name, entry in handmade.PROXIES.items() if entry.variant != "as_released"]
SEPARABLE = [name for name in SEPARABLE if name not in ("CLADO", "added logit changes")]


@pytest.mark.parametrize("name", SEPARABLE)
def test_table_agrees_with_its_formula(name, statistics, moments):
    table = handmade.score_table(name, statistics)
    truth = [[_truth(name, statistics, moments, layer, column) for column in range(3)] for layer in range(6)]
    np.testing.assert_allclose(table, truth, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in SEPARABLE if name not in ("bit-plain", "bit-GraSP")])
def test_more_bits_score_higher(name, statistics):
    table = handmade.score_table(name, statistics)
    assert (table[:, -1] > table[:, 0]).all()


def test_pairs_are_summed_over_all_slots_that_a_configuration_selects(statistics):
    configs = np.array([[2, 3, 4, 2, 2, 4], [4, 4, 4, 4, 4, 4]])
    losses = statistics.pair_losses.reshape(6, 3, 6, 3)
    products = statistics.logit_products.reshape(6, 3, 6, 3)
    clado, added = (handmade.score_table(name, statistics) for name in ("CLADO", "added logit changes"))
    for row, config in enumerate(configs):
        pairs = itertools.combinations(range(6), 2)
        alone = sum(losses[s, b - 2, s, b - 2] for s, b in enumerate(config))
        together = sum(losses[s, config[s] - 2, t, config[t] - 2] for s, t in pairs)
        assert score(clado, configs, (2, 3, 4))[row] == pytest.approx(-alone - together)
        change = sum(products[s, config[s] - 2, t, config[t] - 2] for s in range(6) for t in range(6))
        assert score(added, configs, (2, 3, 4))[row] == pytest.approx(-change / 2)


def test_layers_that_share_their_bits_are_one_row(statistics):
    tied = dataclasses.replace(
        statistics, slots=np.array([0, 1, 1, 2, 3, 4]), kl=statistics.kl[1:], loss=statistics.loss[1:]
    )
    apart, together = (handmade.score_table("HAWQ-V2", s) for s in (statistics, tied))
    np.testing.assert_allclose(together, [apart[0], apart[1] + apart[2], apart[3], apart[4], apart[5]])
    assert handmade.score_table("bit sum", tied).shape == handmade.score_table("one-layer KL", tied).shape == (5, 3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda s: np.zeros((6, 2)), "shape"),
        (lambda s: np.full((6, 3), np.nan), r"not finite at layer 'layer1\.0\.conv1'"),
        (lambda s: np.ones((6, 3)), "cannot rank"),
    ],
)
def test_bad_proxies_are_named(table, message, statistics, monkeypatch):
    monkeypatch.setitem(handmade.PROXIES, "broken", dataclasses.replace(handmade.PROXIES["bit sum"], scores=table))
    with pytest.raises(InvalidScoreError, match=message):
        handmade.score_table("broken", statistics)


def test_unknown_proxy_lists_the_known_ones(statistics):
    with pytest.raises(InvalidScoreError, match="registered proxies: bit sum"):
        handmade.score_table("astrology", statistics)


def test_stored_scores_are_those_of_the_configurations(own_study, profile):
    proxies.build_proxies(profile)
    scores, facts = proxies.load_proxies(profile)
    table = load_bench(profile).table
    assert set(scores.index) == set(table["config_id"])
    for name, fact in facts.items():
        if fact["table"].shape == (6, 3):
            truth = [sum(fact["table"][slot, bits - 2] for slot, bits in enumerate(config)) for config in table["bits"]]
            np.testing.assert_allclose(scores.loc[table["config_id"], name], truth)
        assert fact["seconds"] >= 0
