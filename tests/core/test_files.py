"""Files that are written whole or not at all: errors by name, full disks, temporary files, manifests, tables."""

import contextlib
import errno
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest

from emq_lib.core import errors, files
from emq_lib.core.errors import CorruptArtefactError, DiskFullError, MissingArtefactError, UnwritablePathError
from emq_lib.core.files import (
    MANIFEST,
    atomic_path,
    read_manifest,
    read_table,
    sha256,
    staged_path,
    sweep,
    vouched_path,
    write_bytes,
)

LETTERS = "x" * 300


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("place", ["folder", "file/below", "file/below/that", LETTERS, f"{LETTERS}/file", "."])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(UnwritablePathError, match="cannot be written.*Give another path"):
        write_bytes(tmp_path / place, b"new")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UnwritablePathError, match="Permission denied"):
        write_bytes(tmp_path / "file", b"new")
    tmp_path.chmod(0o700)


STEPS = [(pathlib.Path, "write_bytes"), (os, "fsync"), (os, "replace"), (pathlib.Path, "mkdir")]


@pytest.mark.parametrize(("number", "named"), [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError)])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[1])
def test_a_disk_that_is_full_at_any_step_leaves_the_old_file(tmp_path, monkeypatch, step, number, named):
    _fails_at_every_step(tmp_path, monkeypatch, step, number, named)


@pytest.mark.parametrize(("number", "named"), [(errno.EACCES, UnwritablePathError), (errno.EROFS, UnwritablePathError)])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[1])
def test_a_place_that_refuses_any_step_leaves_the_old_file(tmp_path, monkeypatch, step, number, named):
    _fails_at_every_step(tmp_path, monkeypatch, step, number, named)


def _fails_at_every_step(tmp_path, monkeypatch, step, number, named):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(target, *_args, **_options):
        raise OSError(number, os.strerror(number), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(*step, fail)
        with pytest.raises(named, match=os.strerror(number)):
            write_bytes(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "another"),
        PermissionError(errno.EACCES, "Permission denied", "another"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset"),
        TimeoutError("slow"),
        errors.DatasetNotFoundError("no images"),
        errors.MissingArtefactError("no checkpoint"),
        errors.StudyBusyError("busy"),
        ValueError("wrong"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_errors_of_other_things_pass_through_a_block_that_writes(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)) as found:
        write()
    assert found.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_the_file_itself_are_named(tmp_path):
    def write(*modes):
        with atomic_path(tmp_path / "file") as path:
            for mode in modes:
                path.open(mode).close()

    with pytest.raises(UnwritablePathError, match="file cannot be written.*File exists"):
        write("x", "x")
    with pytest.raises(UnwritablePathError, match="file cannot be written.*No such file"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    names = {"own": os.getpid(), "dead": dead.pid, "living": living.pid, "again": living.pid, "huge": 10**30, "no": "x"}
    paths = {name: tmp_path / f".{name}.{owner}.tmp" for name, owner in names.items()}
    for path in paths.values():
        path.write_text("half")
    os.utime(paths["again"], (1e9, 1e9))  # written long before the process that has its number now began
    (tmp_path / "table.tmp").write_text("a user's")
    sweep(tmp_path)
    living.communicate()
    assert {name for name, path in paths.items() if path.exists()} <= {"own", "living", "huge"}
    assert {"own", "living"} <= {name for name, path in paths.items() if path.exists()}
    assert (tmp_path / "table.tmp").exists()


def test_without_proc_a_number_that_runs_is_trusted(tmp_path, monkeypatch):
    path = tmp_path / f".file.{os.getpid()}.tmp"
    path.write_text("half")
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(files, "_started", lambda _: pathlib.Path("/nowhere").read_text())
    sweep(tmp_path)
    assert path.exists()


def test_writing_removes_what_killed_writers_of_the_same_file_left(tmp_path):
    (tmp_path / ".file*.1.tmp").write_text("of another file")
    (tmp_path / ".file.99999999.tmp").write_text("half")
    write_bytes(tmp_path / "file", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file*.1.tmp", "file"]


MANIFESTS = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "text": b'"x"',
    "cut": b'{"a": {"sha256": "0',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16 without a mark": '{"a": 1}'.encode("utf-16-le")[:-1],
    "deep": b"[" * 100_000,
    "huge number": b"1" * 5_000,
    "random": bytes(range(256)),
    **{
        f"entry {value!r}": json.dumps({"a": value}).encode()
        for value in (None, 3, "x", [], {}, True, {"sha256": None}, {"sha256": 3}, {"sha256": ["0"]}, {"rows": 1})
    },
    **{
        f"{key} {value!r}": json.dumps({"a": {"sha256": "0", key: value}}).encode()
        for key, value in (
            ("seconds", "long"),
            ("seconds", None),
            ("seconds", float("nan")),
            ("seconds", float("inf")),
            ("seconds", 10**400),
            ("rows", "many"),
            ("rows", [1]),
            ("seed", "0"),
            ("seed", 0.5),
            ("device", 3),
            ("note", None),
            ("costs", []),
            ("costs", {"a": "x"}),
            ("inputs", []),
            ("inputs", "x"),
            ("inputs", 3),
            ("inputs", {"a": 3}),
            ("inputs", {"a": ["x"]}),
            ("outdated", 1),
            ("outdated", True),
        )
    },
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none_is_named(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    (tmp_path / "a").write_text("a")
    for read in (read_manifest, lambda folder: vouched_path(folder, "a")):
        with pytest.raises(CorruptArtefactError, match="manifest.json.*Restore it"):
            read(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == content


def _enter(folder, name, digest):
    manifest = read_manifest(folder) | {name: {"sha256": digest}}
    write_bytes(folder / MANIFEST, json.dumps(manifest).encode())


def test_a_file_is_vouched_for_wherever_a_kill_left_it(tmp_path):
    path, staged = tmp_path / "a", staged_path(tmp_path, "a")
    with pytest.raises(MissingArtefactError, match="does not exist"):
        vouched_path(tmp_path, "a")
    path.write_text("old")
    with pytest.raises(MissingArtefactError, match="nothing vouches"):
        vouched_path(tmp_path, "a")
    _enter(tmp_path, "a", sha256(path))
    staged.write_text("newer")
    assert vouched_path(tmp_path, "a") == path  # staged, and not yet entered
    _enter(tmp_path, "a", sha256(staged))
    assert vouched_path(tmp_path, "a") == staged  # entered, and not yet in its place
    os.replace(staged, path)
    assert vouched_path(tmp_path, "a") == path
    path.write_text("worse")
    with pytest.raises(CorruptArtefactError, match="truncated or altered"):
        vouched_path(tmp_path, "a")
    path.unlink()
    path.mkdir()
    with pytest.raises(MissingArtefactError, match="does not exist"):
        vouched_path(tmp_path, "a")


def test_readers_find_a_file_that_is_being_replaced(tmp_path):
    path, staged, stop = tmp_path / "a", staged_path(tmp_path, "a"), threading.Event()

    def replace(number):
        staged.write_text(str(number))
        _enter(tmp_path, "a", sha256(staged))
        os.replace(staged, path)

    def write():
        number = 1
        while not stop.is_set():
            replace(number)
            number += 1

    replace(0)
    writer = threading.Thread(target=write)
    writer.start()
    found = 0
    try:
        for _ in range(300):
            with contextlib.suppress(FileNotFoundError):  # put in its place after it was found
                found += bool(vouched_path(tmp_path, "a").read_text())
    finally:
        stop.set()
        writer.join()
    assert found > 250


TABLE = pd.DataFrame({"name": ["a", "b"], "top1": [90.5, 80.0], "count": [3, 4], "right": [True, False]})
COLUMNS = {"name": str, "top1": float, "count": int, "right": bool}


def _write(table, path):
    table.to_parquet(path, index=False) if path.suffix == ".parquet" else table.to_csv(path, index=False)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_is_read_as_it_was_written(tmp_path, ending):
    _write(TABLE, tmp_path / f"t.{ending}")
    found = read_table(tmp_path / f"t.{ending}", COLUMNS, unique=("name",))
    pd.testing.assert_frame_equal(found, TABLE, check_dtype=False)


WRONG_TABLES = {
    "no rows": TABLE.iloc[:0],
    "a column gone": TABLE.drop(columns="top1"),
    "NaN": TABLE.assign(top1=[np.nan, 1.0]),
    "infinity": TABLE.assign(top1=[np.inf, 1.0]),
    "text for a number": TABLE.assign(top1=["high", "low"]),
    "one text for a number": TABLE.astype({"top1": str}).assign(top1=["90.5", "low"]),
    "a fraction for a count": TABLE.assign(count=[1.5, 2.0]),
    "no count": TABLE.assign(count=["", 2]).astype({"count": str}),
    "no name": TABLE.assign(name=[None, "b"]),
    "rows twice": pd.concat([TABLE, TABLE]),
    "text for a truth value": TABLE.assign(right=["maybe", "no"]),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("what", WRONG_TABLES)
def test_a_table_of_other_content_is_named(tmp_path, what, ending):
    _write(WRONG_TABLES[what], tmp_path / f"t.{ending}")
    with pytest.raises(CorruptArtefactError, match=rf"t\.{ending}.*Restore it, or make it again"):
        read_table(tmp_path / f"t.{ending}", COLUMNS, unique=("name",))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\x00" * 50, bytes(range(256)), b"PAR1" * 20, b"\xff\xfe", b"a,b\n1,2,3\n"]
)
def test_bytes_that_are_no_table_are_named(tmp_path, content, ending):
    path = tmp_path / f"t.{ending}"
    path.write_bytes(content)
    with pytest.raises(CorruptArtefactError, match=rf"t\.{ending}"):
        read_table(path, COLUMNS)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8, 0.95])
def test_a_table_cut_off_is_named(tmp_path, part):
    _write(pd.concat([TABLE] * 20), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(content[: int(part * len(content))])
    with pytest.raises(CorruptArtefactError, match="is not a table"):
        read_table(tmp_path / "t.parquet", COLUMNS)


def test_a_heading_without_a_name_does_not_shift_the_columns(tmp_path):
    (tmp_path / "t.csv").write_text("name,top1,count\na,90.5,3,True\nb,80.0,4,False\n")
    with pytest.raises(CorruptArtefactError, match=r"t\.csv"):
        read_table(tmp_path / "t.csv", {"name": None, "top1": None})
