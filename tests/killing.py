"""Runs that are killed, or find no room: a job in a process of its own, and what the next run makes of the remains.

A job is a function at the top of a test module (or a `functools.partial` of one) that writes into the study's folder.
:func:`check_kills` kills it again and again on copies of a folder, :func:`check_full_disks` fills its disk.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from emq_lib.core.files import MANIFEST, read_manifest, vouched_path

KILLS = int(os.environ.get("EMQ_KILLS", "12"))  # of every job, half of them at steps; 200 for the whole measurement
PATIENCE = 20  # seconds that what a killed process started may take to end
WALL_TIMES = ("seconds", "costs", "search_seconds", "quantize_seconds")
_STEPS = ("os.rename", "os.remove", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_HOLD = """
import sys, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
_HEAVY = ("torch._dynamo", "book.studies.bench", "book.studies.proxies", "book.studies.evolution")


@dataclass(frozen=True)
class Run:
    """How a run ended.

    Attributes:
        killed: or by itself.
        seconds: after how long.
        steps: what it did to files, unless it was killed.
        error: type and message of the error that ended it; empty if none did.
    """

    killed: bool
    seconds: float
    steps: int = 0
    error: str = ""


def run(
    job: Callable[[], object],
    root: pathlib.Path,
    *,
    step: int | None = None,
    fail: int | None = None,
    after: float | None = None,
    room: int | None = None,
) -> Run:
    """Run a job with ``EMQ_STUDY_ROOT=root`` in a process of its own, and kill it or let it fail.

    Args:
        job: what it does.
        root: the folder of studies.
        step: kill it just before this step, counted from 0. A step opens a file under `root` for writing, renames,
            removes or truncates one.
        fail: do not kill it there, but let this step and later ones that open or rename fail with this error number.
        after: kill it after so many seconds.
        room: let no file grow beyond so many bytes.

    Raises:
        AssertionError: something that it started is still running after 20 seconds, or it ended in an odd way.
    """
    receiver, sender = _server().Pipe(duplex=False)
    process = _server().Process(target=_child, args=(job, str(root), (step, fail, room), sender))
    process.start()
    sender.close()
    receiver.recv()  # it is ready
    started = time.perf_counter()
    process.join(after)
    if process.is_alive():
        process.kill()
        process.join()
    seconds = time.perf_counter() - started
    _check_nothing_runs(process.pid)
    try:
        result = receiver.recv()
    except EOFError:
        assert process.exitcode == -signal.SIGKILL, f"it ended with {process.exitcode}"
        return Run(True, seconds)
    return Run(False, seconds, *result)


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    """Return what starts processes: a server that has imported the library once and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_HEAVY, __name__])
    return context


def _child(
    job: Callable[[], object],
    root: str,
    trouble: tuple[int | None, int | None, int | None],
    sender: multiprocessing.connection.Connection,
) -> None:
    os.setpgid(0, 0)
    os.environ["EMQ_STUDY_ROOT"] = root
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    (step, fail, room), steps = trouble, 0

    def count(event: str, details: tuple) -> None:
        nonlocal steps
        writes = event in _STEPS or (event == "open" and (details[2] or 0) & _WRITES)
        if not (writes and isinstance(details[0], str | os.PathLike) and os.fspath(details[0]).startswith(root)):
            return
        if steps == step and fail is None:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        if fail is not None and steps > step and event in ("open", "os.rename") and not details[0].endswith(".lock"):
            raise OSError(fail, os.strerror(fail), os.fspath(details[0]))

    sys.addaudithook(count)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    sender.send("ready")
    try:
        job()
    except BaseException as error:
        traceback.print_exc()
        sender.send((steps, f"{type(error).__name__}: {error}"))
    else:
        sender.send((steps, ""))


def _check_nothing_runs(group: int) -> None:
    """Raise unless every process of a group ends soon."""
    deadline = time.monotonic() + PATIENCE
    while left := _running(group):
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            raise AssertionError(f"processes {left} outlive the one that started them")
        time.sleep(0.05)


def _running(group: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True)
    rows = (line.split() for line in listed.stdout.splitlines())
    return [int(pid) for pid, of, state in rows if int(of) == group and not state.startswith("Z")]


def check_kills(
    job: Callable[[], object], start: pathlib.Path, scratch: pathlib.Path, *, kills: int = KILLS, seed: int = 0
) -> Run:
    """Kill a job at its steps and at random moments; after each, the same job must end as if it had not been killed.

    Half of the kills fall at steps, evenly spread over all of them; at a random moment the job is killed once, twice or
    three times in a row. Then it runs to its end: every file of the folder has the bytes of an undisturbed run, wall
    times aside, and there is no other file.

    Args:
        job: what it does, resumably.
        start: a folder of studies to start from, which stays as it is.
        scratch: an empty folder.
        kills: how many.
        seed: of the random moments.

    Returns:
        the undisturbed run.
    """
    calm, truth = _undisturbed(job, start, scratch)
    for number, blows in enumerate(_blows(calm, kills, random.Random(seed))):
        root = shutil.copytree(start, scratch / str(number))
        for blow in blows:
            assert not run(job, root, **blow).error, blow
        _check_finishes(job, root, truth)
    return calm


def check_full_disks(
    job: Callable[[], object], start: pathlib.Path, scratch: pathlib.Path, *, steps: int = KILLS, rooms: Sequence[int]
) -> None:
    """Let a job find no room, from one of its steps on or for files beyond a size; then it must end as if it had.

    It ends with DiskFullError, leaves no temporary file and no file that the manifest does not vouch for. Only at
    its last step may it end as ever, if that removes a file, which needs no room.

    Args:
        job: what it does, resumably.
        start: a folder of studies to start from, which stays as it is.
        scratch: an empty folder.
        steps: at how many steps, evenly spread.
        rooms: sizes in bytes, each below that of a file that the job writes.
    """
    calm, truth = _undisturbed(job, start, scratch)
    troubles = [{"step": number * calm.steps // steps, "fail": errno.ENOSPC} for number in range(steps)]
    for number, trouble in enumerate([*troubles, *({"room": room} for room in rooms)]):
        root = shutil.copytree(start, scratch / str(number))
        found = run(job, root, **trouble)
        if not found.error and trouble.get("step") == calm.steps - 1:  # the last step removes, and needs no room
            assert contents(root) == truth, (trouble, found)
            continue
        assert found.error.startswith("DiskFullError: No room to write"), (trouble, found)
        for folder in root.iterdir():
            for filename in read_manifest(folder):
                vouched_path(folder, filename)
            assert not list(folder.glob(".*.tmp")), trouble
        _check_finishes(job, root, truth)


def _undisturbed(
    job: Callable[[], object], start: pathlib.Path, scratch: pathlib.Path
) -> tuple[Run, dict[str, object]]:
    """Return how a job ends that nothing disturbs, and the contents of its folder then."""
    calm = run(job, shutil.copytree(start, scratch / "calm"))
    assert not calm.error, calm
    return calm, contents(scratch / "calm")


def _check_finishes(job: Callable[[], object], root: pathlib.Path, truth: dict[str, object]) -> None:
    """Check that a job finishes what is left in a folder, and that the folder then holds what it should."""
    last = run(job, root)
    assert not last.error, last
    found = contents(root)
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    assert [name for name in truth if found[name] != truth[name]] == []
    shutil.rmtree(root)


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Let another process write a study inside the block: it holds the lock of the study's folder."""
    command = [sys.executable, "-c", _HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            process.communicate()


def _blows(calm: Run, kills: int, rng: random.Random) -> Iterator[list[dict[str, float]]]:
    """Yield the kills of one start after another: a step, or one to three moments."""
    at_steps = min(kills // 2, calm.steps)
    yield from ([{"step": number * calm.steps // at_steps}] for number in range(at_steps))
    left = kills - at_steps
    while left:
        count = min(left, rng.randint(1, 3))
        yield [{"after": rng.uniform(0, calm.seconds)} for _ in range(count)]
        left -= count


def contents(root: pathlib.Path) -> dict[str, object]:
    """Return what stands in every file below a folder, locks and wall times aside."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): _content(path) for path in paths}


def _content(path: pathlib.Path) -> object:
    if path.suffix in (".csv", ".parquet") and (timed := _wall_times(path)):
        table = _table(path).drop(columns=timed)
        return table.dtypes.astype(str).to_dict(), table.to_dict("list")
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        found = [_without_wall_times(json.loads(line)) for line in lines]
        for name, entry in found[0].items() if path.name == MANIFEST else ():
            if (file := path.with_name(name)).suffix in (".csv", ".parquet") and file.is_file() and _wall_times(file):
                del entry["sha256"]
        return found
    return path.read_bytes()


def _table(path: pathlib.Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, keep_default_na=False)


def _wall_times(path: pathlib.Path) -> list[str]:
    return [name for name in WALL_TIMES if name in _table(path)]


def _without_wall_times(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_wall_times(part) for name, part in value.items() if name not in WALL_TIMES}
    return [_without_wall_times(part) for part in value] if isinstance(value, list) else value
