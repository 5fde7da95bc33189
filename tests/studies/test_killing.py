"""The harness of killed runs finds what it is there to find."""

import os
import pathlib
import subprocess

import killing
import pytest
from killing import check_full_disks, check_kills, run

pytestmark = pytest.mark.slow


def _folder() -> pathlib.Path:
    folder = pathlib.Path(os.environ["EMQ_STUDY_ROOT"]) / "study"
    folder.mkdir(exist_ok=True)
    return folder


def careful() -> None:
    for name in "ab":
        temporary = _folder() / f"{name}.tmp"
        temporary.write_text(name)
        temporary.replace(_folder() / name)


def appending() -> None:
    for name in "ab":
        with (_folder() / "lines").open("a") as file:
            file.write(name)


def untidy() -> None:
    temporary = _folder() / f"{os.getpid()}.tmp"
    temporary.write_text("a")
    temporary.replace(_folder() / "a")


def forgetful() -> None:
    subprocess.Popen(["sleep", "60"])


@pytest.fixture
def start(tmp_path):
    (tmp_path / "start").mkdir()
    return tmp_path / "start"


def test_a_careful_job_passes(start, tmp_path):
    calm = check_kills(careful, start, tmp_path, kills=8)
    assert calm.steps == 4
    assert (tmp_path / "calm" / "study" / "b").read_text() == "b"
    assert run(careful, start, step=3).killed
    assert not (start / "study" / "b").exists()
    assert (start / "study" / "a").exists()


def test_lines_twice_and_files_left_are_found(start, tmp_path):
    for job in (appending, untidy):
        with pytest.raises(AssertionError):
            check_kills(job, start, tmp_path / job.__name__, kills=8)


def test_errors_and_processes_left_are_found(start, tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="OSError"):
        check_full_disks(careful, start, tmp_path, steps=2, rooms=())
    monkeypatch.setattr(killing, "PATIENCE", 0.5)
    with pytest.raises(AssertionError, match="outlive the one that started them"):
        run(forgetful, start)
