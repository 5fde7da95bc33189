"""Long measurements: a lost worker, two runs at once, a full disk."""

import dataclasses
import os
import pickle
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
from killing import held

from book.studies import bench, checkpoints, checks
from book.studies.bench import load_bench
from book.studies.networks import build_network, load_folded
from book.studies.rows import PARTIAL, PartialRows
from emq_lib.bench import engine, remote
from emq_lib.core.errors import DiskFullError, StudyBusyError
from emq_lib.core.files import atomic_path, sha256
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.models import INPUT_SHAPES, MODELS, build_model


@pytest.fixture
def small(profile, monkeypatch):
    monkeypatch.setattr(engine, "BLOCK", 4)
    return dataclasses.replace(profile, bench_configs=20, stratified_configs=5, bench_images=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("imagenet")])
def test_a_network_travels_to_workers(name):
    folded = fold_batchnorm(build_model(name, seed=0).eval())
    x = torch.randn(2, *INPUT_SHAPES["digits" if name == "resnet8" else "cifar10"], generator=torch.Generator())
    with torch.inference_mode():
        assert torch.equal(pickle.loads(pickle.dumps(folded))(x), folded(x))


def test_a_worker_measures_what_this_process_does(study, small, data):
    network, _ = build_network(small, data)
    split, blocks = data.test[:50], [[(2,) * 6, (3,) * 6], [(4,) * 6]]
    parts = (load_folded(small, "cpu"), network.bank, network.activation_ranges, split)
    sent = pickle.dumps(parts)
    found = [item for block in blocks for item in remote._measure_remotely(sent, block)]
    expected = [item for block in engine.measure(network, split, np.array(sum(blocks, []))) for item in block]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.config, ours.loss) == (theirs.config, theirs.loss)
        np.testing.assert_array_equal(ours.correct, theirs.correct)


@pytest.mark.slow
def test_a_lost_worker_costs_only_its_unfinished_rows(own_study, small, data):
    distributed = pytest.importorskip("distributed")
    path, before = own_study / "bench.parquet", {}
    path.unlink()
    bench.build_bench(small, data)
    whole = sha256(path)
    path.unlink()

    def kill_a_worker(cluster):
        while not before:
            time.sleep(0.01)
            if (own_study / PARTIAL).exists() and len(found := PartialRows(own_study / PARTIAL).read()) >= 8:
                before.update(found)
        os.kill(cluster.workers[0].pid, signal.SIGKILL)

    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            client.wait_for_workers(2)
        thread = threading.Thread(target=kill_a_worker, args=(cluster,), daemon=True)
        thread.start()
        bench.build_bench(small, data, scheduler=cluster.scheduler_address)
        thread.join(timeout=5)
    assert sha256(path) == whole
    table = load_bench(small).table.set_index("key")
    assert before
    assert all(table.loc[key, "loss"] == row["loss"] for key, row in before.items())


def test_two_runs_cannot_write_one_study_and_readers_do_not_mind(own_study, profile, data):
    before = {path.name: path.read_bytes() for path in own_study.iterdir()}
    with held(own_study):
        started = time.perf_counter()
        for build in (checkpoints.build_checkpoint, bench.build_bench, checks.build_checks):
            with pytest.raises(StudyBusyError, match="Another run is writing the study"):
                build(profile, data)
        assert time.perf_counter() - started < 5
        assert len(load_bench(profile)) == 103
        assert len(bench.load_layers(profile)) == 8
    assert {path.name: path.read_bytes() for path in own_study.iterdir()} == before
    bench.build_bench(profile, data)  # once the other has ended


@pytest.fixture
def small_disk():
    """Let no file grow beyond 4,000 bytes, which the operating system reports as it reports a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_loses_no_finished_row(tmp_path, small_disk):
    rows, written = PartialRows(tmp_path / "rows.jsonl"), {}

    def fill():
        for index in range(1_000):
            block = {f"{index:024d}": {"top1": float(index), "loss": 0.5}}
            rows.append(block, seconds=0.5)
            written.update(block)

    with pytest.raises(DiskFullError, match="No room to write"):
        fill()
    assert 10 < len(written) < 1_000
    again = PartialRows(tmp_path / "rows.jsonl")
    assert again.read() == written
    assert again.seconds == 0.5 * len(written)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, small_disk):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(DiskFullError, match="free some and call again"), atomic_path(path) as temporary:
        temporary.write_text("x" * 10_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
