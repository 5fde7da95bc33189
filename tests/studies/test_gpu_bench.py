"""Training, measuring and checking with everything on a GPU, as far as a machine without one can tell."""

import dataclasses
import types

import pytest
from devices import pretended_gpu

from book.studies import bench, checkpoints, checks
from book.studies.bench import load_bench
from emq_lib.bench import engine
from emq_lib.quantization import adaround


@pytest.mark.slow
def test_a_gpu_trains_measures_and_checks(tmp_path, monkeypatch, profile, data):
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path))
    monkeypatch.setattr(engine, "_record", lambda step, _another: types.SimpleNamespace(replay=step))
    monkeypatch.setattr(adaround, "ITERATIONS", 2)
    monkeypatch.setattr(checks, "CONFIGS", 2)
    monkeypatch.setattr(checks, "IN_ORDER", 1)
    monkeypatch.setattr(checks, "WEIGHTS_ONLY", dataclasses.replace(checks.WEIGHTS_ONLY, iterations=2))
    short = dataclasses.replace(profile.training, epochs=1)
    few = dataclasses.replace(profile, training=short, bench_configs=3, stratified_configs=2, one_bit_configs=0)
    data = dataclasses.replace(
        data,
        train=data.train[:128],
        calibration=data.train[:32],
        validation=data.validation[:32],
        test=data.test[:40],
    )
    with pretended_gpu():
        images = data.to("cuda")
        checkpoints.build_checkpoint(few, images)
        for quantizer in ("rtn", "adaround"):
            bench.build_bench(few, images, quantizer=quantizer)
        checks.build_checks(few, images)
    assert len(checks.load_checks(few)) == 13
    bench.build_bench(few, data)  # the processor finds the rows of the GPU, which it need not measure again
    assert len(load_bench(few)) > 5
