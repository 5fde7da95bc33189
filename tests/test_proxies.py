"""Proxies against loops written out in NumPy, and named errors for bad ones."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from emq_lib import bench, proxies
from emq_lib.errors import InvalidScoreError
from emq_lib.layer_statistics import load_statistics


@pytest.fixture
def statistics(study, profile):
    return load_statistics(profile)


def _truth(name, s, layer, column):
    """One entry of a score table, computed entry by entry in double precision."""
    b = s.choices[column]
    w, g, f = (np.asarray(tensors[layer], dtype=np.float64) for tensors in (s.weights, s.gradients, s.curvature))
    e = np.asarray(s.errors[layer][column], dtype=np.float64)
    return {
        "bit sum": lambda: b,
        "parameter bits": lambda: b * w.size,
        "BOPs": lambda: b * s.macs[layer],
        "bit-SNIP": lambda: b * np.abs(w * g).sum(),
        "bit-Synflow": lambda: b * s.synflow[layer],
        "HAWQ-V2": lambda: -s.trace[layer] / w.size * (e**2).sum(),
        "Fisher error": lambda: -(f * e**2).sum(),
        "relative weight error": lambda: -(e**2).sum() / (w**2).sum(),
        "relative output error": lambda: -s.output_error[layer, column],
        "one-layer KL": lambda: -s.kl[layer, column],
        "sqrt one-layer KL": lambda: -np.sqrt(s.kl[layer, column]),
    }[name]()


@pytest.mark.parametrize("name", proxies.PROXIES)
def test_table_agrees_with_its_formula(name, statistics):
    table = proxies.score_table(name, statistics)
    truth = [[_truth(name, statistics, layer, column) for column in range(3)] for layer in range(6)]
    np.testing.assert_allclose(table, truth, rtol=1e-4)


@pytest.mark.parametrize("name", proxies.PROXIES)
def test_more_bits_score_higher(name, statistics):
    table = proxies.score_table(name, statistics)
    assert (table[:, -1] > table[:, 0]).all()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda s: np.zeros((6, 2)), "shape"),
        (lambda s: np.full((6, 3), np.nan), r"not finite at layer 'layer1\.0\.conv1'"),
        (lambda s: np.ones((6, 3)), "cannot rank"),
    ],
)
def test_bad_proxies_are_named(table, message, statistics, monkeypatch):
    monkeypatch.setitem(proxies.PROXIES, "broken", dataclasses.replace(proxies.PROXIES["bit sum"], table=table))
    with pytest.raises(InvalidScoreError, match=message):
        proxies.score_table("broken", statistics)


def test_unknown_proxy_lists_the_known_ones(statistics):
    with pytest.raises(InvalidScoreError, match="registered proxies: bit sum"):
        proxies.score_table("astrology", statistics)


def test_stored_scores_are_sums_of_table_entries(own_study, profile):
    proxies.build_proxies(profile)
    scores, facts = proxies.load_proxies(profile)
    configs = bench.Bench.load(profile).configs
    assert isinstance(scores, pd.DataFrame)
    for name, fact in facts.items():
        truth = [sum(fact["table"][slot, bits - 2] for slot, bits in enumerate(config)) for config in configs]
        np.testing.assert_allclose(scores[name], truth)
        assert fact["seconds"] >= 0
