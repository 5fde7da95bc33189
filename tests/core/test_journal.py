"""Journals: whole lines after any crash, nothing written by opening, other runs and damaged lines named."""

import json
import os
import resource
import signal
import sys

import pytest

from emq_lib.core.errors import CorruptArtefactError, DiskFullError, UnwritablePathError
from emq_lib.core.journal import Journal

WHO = {"run": "evolution, 0", "code": "1234"}
LINES = [{"number": number, "text": "ü" * number} for number in range(20)]


def _filled(path, lines=LINES):
    journal = Journal(path, WHO)
    for line in lines:
        journal.append(line)
    return path.read_bytes()


def test_what_was_appended_is_read_again_and_goes_on(tmp_path):
    path = tmp_path / "folder" / "a.jsonl"
    whole = _filled(path)
    assert Journal(path, WHO).lines == LINES
    path.unlink()
    for line in LINES:  # a new run for each line writes the same bytes
        Journal(path, WHO).append(line)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", [0, 1, 20, 45, 60, 100, 101, 102, 103, 104, 105, 106, 200, -2, -1])
def test_a_line_cut_off_is_taken_back_by_the_next_one(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    whole = _filled(path)
    path.write_bytes(whole[:cut])
    journal = Journal(path, WHO)
    assert path.read_bytes() == whole[:cut]  # opening writes nothing
    assert journal.lines == LINES[: len(journal.lines)]
    for line in LINES[len(journal.lines) :]:
        journal.append(line)
    assert path.read_bytes() == whole


def test_reading_while_a_run_appends_takes_nothing_from_it(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = Journal(path, WHO)
    for number, line in enumerate(LINES):
        writer.append(line)
        assert Journal(path, WHO).lines == LINES[: number + 1]
    assert writer.lines == LINES


def test_a_file_removed_under_a_run_starts_afresh(tmp_path):
    path = tmp_path / "a.jsonl"
    journal = Journal(path, WHO)
    journal.append(LINES[0])
    path.unlink()
    journal.append(LINES[1])
    assert Journal(path, WHO).lines == [LINES[1]]


@pytest.mark.parametrize("other", [{}, {"run": "evolution, 0"}, WHO | {"code": "1235"}, {"rows of": "x"}])
def test_a_journal_of_another_run_is_refused(tmp_path, other):
    path = tmp_path / "a.jsonl"
    before = _filled(path)
    with pytest.raises(CorruptArtefactError, match=r"a\.jsonl is of another run.*Delete it to start afresh"):
        Journal(path, other)
    assert path.read_bytes() == before


WRONG = [
    b"",
    b"x",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"{}{}",
    b"\xff\xfe",
    b"\x00\x00",
    b"[" * 10_000,
    b"1" * 5_000,
    b'{"a": }',
    "{'a': 1}".encode("utf-16"),
]


@pytest.mark.parametrize("line", WRONG)
def test_a_line_that_no_run_wrote_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    content = _filled(path, LINES[:2]) + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="line 4, was written by no run. Delete"):
        Journal(path, WHO)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"\n", b"{}\n", b"[]\n", b"\xff\n", json.dumps(WHO).encode() + b"\n", b"\x00\n"])
def test_a_file_that_is_no_journal_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="another run"):
        Journal(tmp_path / "a.jsonl", WHO)


@pytest.mark.parametrize("place", ["file/below.jsonl", "x" * 300, "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnwritablePathError, match="cannot be written"):
        Journal(tmp_path / place, WHO).append({})


@pytest.mark.parametrize("room", [10, 60, 100, 500])
def test_a_full_disk_keeps_whole_lines(tmp_path, room):
    path = tmp_path / "a.jsonl"
    journal, limits = Journal(path, WHO), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="No room to write"):
            list(map(journal.append, LINES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Journal(path, WHO).lines == journal.lines == LINES[: len(journal.lines)]
    for line in LINES[len(journal.lines) :]:
        journal.append(line)
    assert path.read_bytes() == _filled(tmp_path / "b.jsonl")


def test_killed_at_any_step_it_is_whole_again(tmp_path):
    path = tmp_path / "a.jsonl"
    for steps in (1, 2, 3, 5, 6, 1_000):
        process = os.fork()
        if not process:
            _append_until(path, steps)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == (0 if steps == 1_000 else -signal.SIGKILL)
        with path.open("ab") as file:
            file.write(b'{"number": 1' if steps < 1_000 else b"")  # it may have died while writing
    assert path.read_bytes() == _filled(tmp_path / "b.jsonl")


def _append_until(path, steps):
    """Write the missing lines and end; killed before a step: a file opened, or truncated."""

    def count(event, details):
        nonlocal steps
        if event in ("open", "os.truncate") and str(details[0]) == str(path):
            steps -= 1
            if steps < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    journal = Journal(path, WHO)
    list(map(journal.append, LINES[len(journal.lines) :]))
    os._exit(0)
