"""Processes that share work: results in order, errors by name, and none that outlives its parent."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from book.places import REPOSITORY
from book.studies.study import sole_writer
from book.studies.workers import share
from emq_lib.core.errors import InvalidBitsError, InvalidParameterError, StudyBusyError, WorkerLostError
from emq_lib.core.profiles import get_profile

pytestmark = pytest.mark.slow


def _do(task):
    """Do what a task says, and return who did it with how many threads."""
    import torch

    if task == "fail":
        raise InvalidBitsError("no such bits")
    if task == "die":
        os._exit(3)
    if task == "write":
        with sole_writer(get_profile("digits-resnet8")):
            pass
    return task, os.getpid(), torch.get_num_threads()


def _compute_for_ever(folder, _task):
    (folder / str(os.getpid())).write_text("")
    while True:
        pass


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_from_single_threads(workers):
    found = list(share(_do, "abcd", workers))
    assert [task for task, _, _ in found] == list("abcd")
    assert {threads for _, _, threads in found} == {1}
    assert (os.getpid() in {process for _, process, _ in found}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("task", "error"), [("fail", InvalidBitsError), ("die", WorkerLostError)])
def test_errors_of_workers_reach_the_caller_by_name(workers, task, error):
    if (workers, task) == (1, "die"):
        pytest.skip("with one worker this process works")
    with pytest.raises(error, match="no such bits|call again, with fewer workers"):
        list(share(_do, [task], workers))


def test_workers_do_not_write_the_study_that_their_parent_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path))
    with sole_writer(get_profile("digits-resnet8")), pytest.raises(StudyBusyError, match="Another run is writing"):
        list(share(_do, ["write"], 2))


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", (2,)])
def test_a_number_of_workers_that_cannot_be_is_refused(workers):
    with pytest.raises(InvalidParameterError, match="number of workers"):
        list(share(_do, "ab", workers))


def _keep_two_busy(folder):
    list(share(functools.partial(_compute_for_ever, pathlib.Path(folder)), "ab", 2))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = f"import test_workers; test_workers._keep_two_busy({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(pathlib.Path(__file__).parent)])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2:
            assert parent.poll() is None, "the parent ended by itself"
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 20
    while [process for process in workers if _runs(process)]:
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _runs(process):
    try:
        return "Z" not in pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
