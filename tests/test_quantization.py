"""Choosing configurations: allocated ones keep their budgets, and every method is named."""

import numpy as np
import pytest

from emq_lib import bench, quantization
from emq_lib.costs import size_cost
from emq_lib.layer_statistics import load_statistics
from emq_lib.proxies import score_table


@pytest.fixture
def size(study, profile):
    return size_cost(bench.load_layers(profile), profile.choices)


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
