"""The comparison under every quantizer: rows are what direct measurement gives, and survive interruptions."""

import numpy as np
import pytest

from book.studies import quantization
from book.studies.checks import with_calibration
from book.studies.networks import build_network, load_folded
from book.studies.study import manifest_of
from emq_lib.bench.engine import measure
from emq_lib.core.configs import bits_text, parse_bits
from emq_lib.core.models import predict, top1
from emq_lib.quantization.brecq import Settings

pytestmark = pytest.mark.slow
SHORT = Settings(iterations=5, activation_iterations=2)


@pytest.fixture(autouse=True)
def _few_budgets(monkeypatch):
    monkeypatch.setattr(quantization, "BUDGETS", (2.25, 3.0))


def _build(profile, data, **how):
    quantization.build_comparison(profile, data, settings=SHORT, workers=1, **how)
    return quantization.load_comparison(profile)


def test_rows_are_what_direct_measurement_gives(choices, profile, data):
    table = _build(profile, data, seeds=2, quantizers=("rtn", "brecq"))
    drawn = with_calibration(data, 1)
    network, _ = build_network(profile, drawn)
    for row in table.query("quantizer == 'rtn' and seed == 1").itertuples():
        [[truth]] = measure(network, data.test, np.array([parse_bits(row.bits)]))
        assert np.array_equal(row.hits, truth.correct)
        assert row.top1 == pytest.approx(truth.top1)
    best = table.query("proxy == 'best of random'")
    assert set(best["average_bits"]) == set(quantization.BUDGETS)
    exact = table.query("quantizer == 'float'")
    assert exact["top1"].tolist() == [top1(predict(load_folded(profile, "cpu"), data.test), data.test.labels)]
    assert exact["hits"].iloc[0].mean() == pytest.approx(exact["top1"].iloc[0] / 100)
    counts = table.groupby(["quantizer", "seed"])["proxy"].value_counts().unstack()
    assert (counts["evolved for allocation"].drop("float") == 2).all()
    assert counts.loc[("rtn", 0), "random"] == 1  # the choices hold a random configuration for seed 0 alone
    assert np.isnan(counts.loc[("rtn", 1), "random"])
    same = table.query("bits == '322222'").groupby(["quantizer", "seed"])["key"].nunique()
    assert (same == 1).all()  # a configuration that two methods chose is measured once


def test_interrupted_and_resumed_gives_the_same_rows_and_more_seeds_extend_them(choices, profile, data, monkeypatch):
    whole = _build(profile, data, seeds=1, quantizers=("brecq",))
    path = quantization.study_folder(profile) / quantization.COMPARISON
    path.unlink()
    done, work = [], quantization.quantize_and_measure

    def stops(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args[-1])
        return work(*args)

    monkeypatch.setattr(quantization, "quantize_and_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        _build(profile, data, seeds=1, quantizers=("brecq",))
    counted = []
    monkeypatch.setattr(quantization, "quantize_and_measure", lambda *args: (counted.append(args[-1]), work(*args))[1])
    resumed = _build(profile, data, seeds=1, quantizers=("brecq",))
    assert not {job.configs for job in counted} & {job.configs for job in done}
    columns = ["proxy", "average_bits", "bits", "key", "top1", "loss"]
    assert resumed[columns].equals(whole[columns])
    assert all(np.array_equal(*pair) for pair in zip(resumed["hits"], whole["hits"], strict=True))
    counted.clear()
    extended = _build(profile, data, seeds=1, quantizers=("brecq", "qat"))
    spent = manifest_of(profile)[quantization.COMPARISON]["seconds"]
    _build(profile, data, seeds=1, quantizers=("brecq", "qat"))
    assert (
        manifest_of(profile)[quantization.COMPARISON]["seconds"] > spent
    )  # nothing was left to do; earlier time counts
    assert {job.quantizer for job in counted} == {"qat"}
    assert set(extended["quantizer"]) == {"brecq", "qat", "float"}
    assert set(extended.query("quantizer == 'qat'")["proxy"]) == set(quantization.TRAINED_METHODS)
    assert extended.query("quantizer == 'qat'")["top1"].min() > 60


def test_the_best_of_random_is_the_best_on_half_a(choices, profile, data):
    drawn = quantization.choose(profile, data).query("proxy == 'best of random' and average_bits == 3.0").iloc[0]
    network, _ = build_network(profile, data)
    half = data.test[: len(data.test) // 2]
    configs = np.array([parse_bits(bits) for bits in quantization.drawn_at_random(profile, 3.0)])
    found = [item for block in measure(network, half, configs) for item in block]
    assert max(item.top1 for item in found) == next(i.top1 for i in found if bits_text(i.config) == drawn["bits"])
