"""Long measurements: killed and resumed, on two processes, on a full disk, and two at once."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from book.places import REPOSITORY
from book.studies import bench
from book.studies.bench import load_bench
from book.studies.rows import PARTIAL, PartialRows
from emq_lib.core.errors import DiskFullError, StudyBusyError
from emq_lib.core.files import atomic_path, sha256

RUN = """
    import dataclasses
    from book.studies import bench
    from book.studies.images import load_dataset
    from emq_lib.bench import engine
    from emq_lib.core.profiles import get_profile
    engine.BLOCK = 4
    profile = get_profile("digits-resnet8")
    profile = dataclasses.replace(
        profile, training=dataclasses.replace(profile.training, epochs=5), bench_configs=60, stratified_configs=30
    )
    bench.build_bench(profile, load_dataset(profile), scheduler={scheduler!r})
"""


def _start(study, scheduler=None):
    environment = os.environ | {"EMQ_STUDY_ROOT": str(study.parent)}
    code = textwrap.dedent(RUN).format(scheduler=scheduler)
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=environment, cwd=REPOSITORY)


@pytest.fixture
def small(profile):
    return dataclasses.replace(profile, bench_configs=60, stratified_configs=30)


@pytest.fixture
def whole(own_study, small, data):
    """Build the small bench in this process, remove it, and return its hash."""
    path = own_study / "bench.parquet"
    path.unlink()
    bench.build_bench(small, data)
    digest = sha256(path)
    path.unlink()
    return digest


def _wait_for_lines(path, count, process):
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)


def test_killed_outright_and_resumed_ends_with_the_same_bytes(own_study, small, data, whole):
    partial = own_study / PARTIAL
    process = _start(own_study)
    _wait_for_lines(partial, 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (own_study / "bench.parquet").exists()
    done = len(PartialRows(partial).read())
    assert done >= 12
    partial.write_text(partial.read_text() + '{"rows": {"0123": {"top1": 12')  # as if it had died while writing
    bench.build_bench(small, data)
    assert sha256(own_study / "bench.parquet") == whole
    assert not partial.exists()


def test_a_lost_worker_costs_only_its_unfinished_rows(own_study, small, whole):
    distributed = pytest.importorskip("distributed")
    partial = own_study / PARTIAL
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        process = _start(own_study, cluster.scheduler_address)
        _wait_for_lines(partial, 3, process)
        before = PartialRows(partial).read()
        os.kill(cluster.workers[0].pid, signal.SIGKILL)
        assert process.wait(timeout=120) == 0
    assert sha256(own_study / "bench.parquet") == whole
    table = load_bench(small).table.set_index("key")
    assert all(table.loc[key, "loss"] == row["loss"] for key, row in before.items())


def test_two_runs_cannot_write_one_study(own_study, small, data, whole):
    process = _start(own_study)
    _wait_for_lines(own_study / PARTIAL, 1, process)
    with pytest.raises(StudyBusyError, match="Another run is writing the study"):
        bench.build_bench(small, data)
    assert process.wait(timeout=120) == 0


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
