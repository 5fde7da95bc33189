"""Choosing configurations: random ones fill the budget, allocated ones keep it."""

import numpy as np
import pytest

from emq_lib import bench, quantization
from emq_lib.costs import size_cost
from emq_lib.layer_statistics import load_statistics
from emq_lib.proxies import score_table


@pytest.fixture
def size(study, profile):
    return size_cost(bench.load_layers(profile), profile.choices)


def test_random_configurations_use_the_budget_up(size, profile):
    rng = np.random.default_rng(0)
    smallest_step = np.diff(size.table, axis=1).min()
    drawn = set()
    for _ in range(50):
        budget = rng.uniform(size.smallest, size.fixed + size.table[:, -1].sum())
        config = quantization.random_within(size, budget, profile.choices, rng=rng)
        cost = size.total([config], profile.choices)[0]
        assert cost <= budget
        left = budget - cost
        raisable = [s for s, b in enumerate(config) if b < 4 and size.table[s, b - 1] - size.table[s, b - 2] <= left]
        assert not raisable
        drawn.add(config)
    assert smallest_step > 0
    assert len(drawn) > 30


def test_choices_keep_their_budgets_and_name_every_method(size, profile, study):
    statistics = load_statistics(profile)
    names = ("bit sum", "one-layer KL")
    tables = {name: {"table": score_table(name, statistics), "variant": "x", "seconds": 1.0} for name in names}
    chosen = quantization.choose_configurations(profile, tables, size)
    configs = np.array([bench.parse_bits(text) for text in chosen["bits"]])
    assert (size.total(configs, profile.choices) <= chosen["budget_bytes"]).all()
    assert set(chosen["proxy"]) == {*names, "random"}
    assert set(chosen.query("proxy == 'one-layer KL'")["average_bits"]) == set(profile.budgets)
    assert set(chosen.query("proxy == 'bit sum'")["average_bits"]) == {*profile.budgets, *quantization.FRONT}
    assert (chosen.groupby(["proxy", "average_bits"]).size()["random"] == quantization.RANDOM_DRAWS).all()
