"""The released scores against the slips spelled out: lists, zips and reversals in plain Python."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from book.studies.networks import fresh_model, layer_table
from book.studies.proxies import load_statistics, released_statistics
from emq_lib.proxies import handmade, released, scores

CHOICES = (2, 3, 4)


@pytest.fixture
def network(profile):
    model = fresh_model(profile).eval()
    table = layer_table(model, profile)
    return model, list(table.loc[table["kind"] == "Conv2d", "name"])


@pytest.fixture(scope="module")
def found(profile, data):
    return released_statistics(profile, data.calibration)


@pytest.fixture
def statistics(study, profile, found):
    return dataclasses.replace(load_statistics(profile), released=found)


def _score(name, statistics, config):
    return scores.score(handmade.score_table(f"{name}, as released", statistics), np.array([config]), CHOICES)[0]


CONFIG = (2, 4, 3, 3, 4, 2)


def test_the_network_is_random_and_lists_all_convolutions(found, network, data):
    model, names = network
    assert names == [
        "conv1",
        *(f"layer{stage}.0.conv{number}" for stage in (1, 2, 3) for number in (1, 2)),
    ]
    images = data.calibration[: released.IMAGES]
    weights = [model.get_submodule(name).weight for name in names]
    loss = F.cross_entropy(model(images.inputs()), images.labels)
    snip = [(w * g).abs().sum().item() for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
    np.testing.assert_allclose(found.snip, snip, rtol=1e-3)
    assert found.in_block.tolist() == [False] + [True] * 6
    assert found.stage.tolist() == [2, 2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("HAWQ", lambda r: r.eigenvalue[1:-1]),
        ("HAWQ-V2", lambda r: r.trace[1:-1]),
        ("OMPQ", lambda r: np.exp(-r.similarity)),
        ("bit-SNIP", lambda r: r.snip),
        ("bit-Synflow", lambda r: r.synflow[:-1]),
    ],
)
def test_bits_meet_the_layers_that_zip_gives_them(name, listed, statistics):
    truth = sum(bits * value for bits, value in zip(CONFIG, listed(statistics.released), strict=False))
    assert _score(name, statistics, CONFIG) == pytest.approx(truth)


def test_the_released_formula_is_a_sum_of_roots_of_bits(statistics, network):
    """Softmax over output channels sums to one, so the gradient drops out: sqrt(b) E[sqrt(W+)] / C, C reversed."""
    model, names = network
    weights = [model.get_submodule(name).weight.detach().double() for name in names]
    # folding scales every weight by the root of 1 / (1 + 1e-5), the batch norms' epsilon
    roots = [(w.clamp(min=0) / np.sqrt(1 + 1e-5)).sqrt().mean().item() for w in weights]
    channels = [len(w) for w in weights][::-1]
    truth = sum(np.sqrt(b) * root / c for b, root, c in zip(CONFIG, roots, channels, strict=False))
    assert _score("EMQ", statistics, CONFIG) == pytest.approx(truth, rel=1e-6)


def test_quantization_entropy_counts_bits_from_the_first_block(statistics):
    weights = [8, 8, 7, 7, 6, 6]  # stages of the six convolutions in blocks: 1 + 1 + 6, 1 + 6 and 6
    truth = sum(
        weight * np.log(handmade.rounded_normal_std(8) * handmade.rounded_normal_std(bits))
        for weight, bits in zip(weights, CONFIG, strict=True)
    )
    assert _score("QE", statistics, CONFIG) == pytest.approx(truth)


def test_short_lists_leave_bits_out_and_long_ones_are_cut():
    np.testing.assert_array_equal(released.align(np.array([1.0, 2.0]), 3), [1, 2, 0])
    np.testing.assert_array_equal(released.align(np.array([1.0, 2.0, 3.0]), 2), [1, 2])


@pytest.mark.slow
def test_another_seed_is_another_network(profile, data, found):
    other = released_statistics(dataclasses.replace(profile, seed=7), data.calibration)
    assert not np.allclose(other.snip, found.snip, rtol=1e-3)
