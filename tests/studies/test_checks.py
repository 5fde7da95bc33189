"""Checks of the bench: what is measured again equals the bench where nothing changed, and differs where it did."""

import dataclasses

import pandas as pd
import pytest

from book.studies import bench, checks
from book.studies.bench import load_bench
from emq_lib.bench import remote
from emq_lib.core.errors import InvalidParameterError
from emq_lib.quantization import adaround


@pytest.fixture
def few(monkeypatch, profile):
    monkeypatch.setattr(checks, "CONFIGS", 4)
    monkeypatch.setattr(checks, "IN_ORDER", 2)
    monkeypatch.setattr(adaround, "ITERATIONS", 20)
    monkeypatch.setattr(checks, "WEIGHTS_ONLY", dataclasses.replace(checks.WEIGHTS_ONLY, iterations=100))
    return dataclasses.replace(profile, bench_configs=4, stratified_configs=1, one_bit_configs=0, bench_images=200)


@pytest.mark.slow
def test_draw_zero_is_the_bench_and_other_draws_are_not(own_study, few, data, monkeypatch):
    for quantizer in ("rtn", "adaround"):
        bench.build_bench(few, data, quantizer=quantizer)
    with monkeypatch.context() as patch:
        patch.setattr(checks, "_measure_in_order", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            checks.build_checks(few, data)
    assert not (own_study / "checks.csv").exists()
    monkeypatch.setattr(remote, "measure", _interrupted)  # all but the last check is on disk
    checks.build_checks(few, data)
    table = checks.load_checks(few)
    assert table.groupby(["quantizer", "draw"]).size().to_dict() == {
        **{(quantizer, draw): 4 for quantizer in ("rtn", "adaround") for draw in range(3)},
        ("in order", 0): 2,
    }
    for quantizer in ("rtn", "adaround"):
        rows = load_bench(few, quantizer=quantizer).table.set_index("config_id")
        own = table[(table["quantizer"] == quantizer) & (table["draw"] == 0)].set_index("bits")
        pd.testing.assert_series_equal(own["loss"], rows.loc[own.index, "loss"], check_names=False)
        other = table[(table["quantizer"] == quantizer) & (table["draw"] == 1)].set_index("bits")
        assert (other["loss"] != own["loss"]).all()
    in_order = table[table["quantizer"] == "in order"].set_index("bits")["top1"]
    nearest = table[(table["quantizer"] == "rtn") & (table["draw"] == 0)].set_index("bits")["top1"]
    assert in_order.mean() > nearest[in_order.index].mean()


def _interrupted(*_args, **_kwargs):
    raise KeyboardInterrupt


def test_draws_are_disjoint_and_only_as_many_as_there_are_images(data):
    draws = [checks.with_calibration(data, draw).calibration.images for draw in range(3)]
    assert (draws[0] == data.calibration.images).all()
    assert len({image.numpy().tobytes() for draw in draws for image in draw}) == sum(map(len, draws))
    with pytest.raises(InvalidParameterError, match="needs more than"):
        checks.with_calibration(data, 5)
