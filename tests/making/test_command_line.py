"""The command line names its errors, and refuses what cannot succeed before it computes anything."""

import os
import re
import subprocess
import sys

import pytest

from book.making import __main__ as command_line
from book.making import notebooks
from book.places import REPOSITORY


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "nope"], "Unknown profile 'nope'. Known profiles"),
        (
            ["--profile", "digits-resnet8", "--seed", "7"],
            "There is no study of digits-resnet8 with SEED = 7. make book",
        ),
        (["--seed", "-1", "--rebuild"], "SEED must be a whole number from 0"),
    ],
)
@pytest.mark.parametrize("action", ["book", "notebooks", "slides"])
def test_what_cannot_succeed_is_refused_before_a_chapter_runs(action, arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "execute", lambda *_, **__: pytest.fail("a chapter ran"))
    assert command_line.main([action, *arguments]) == 2
    captured = capsys.readouterr()
    assert f"error: {words}" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["bok"], ["book", "--profil", "x", "y"], ["book", "--sed", "1"]])
def test_a_misspelt_argument_ends_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m book.making" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_ends_without_a_traceback(tmp_path, capsys, monkeypatch):
    (tmp_path / "_build").write_text("")
    monkeypatch.setattr(command_line, "REPOSITORY", tmp_path)
    for action in ("pages", "student"):
        assert command_line.main([action]) == 2
        assert "_build" in capsys.readouterr().err


@pytest.mark.slow
def test_building_pages_loads_nothing_that_computes():
    """The environment of ``make pages`` has no PyTorch."""
    absent = ("torch", "pandas", "numpy", "scipy", "matplotlib", "papermill", "jupytext")
    line = f"import sys; sys.modules.update(dict.fromkeys({absent})); import book.making.__main__, book.making.linking"
    subprocess.run([sys.executable, "-c", line], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("variable", ["PROFIL=digits-resnet8", "REBUILT=1", "SEEDS=1", "profile=digits-resnet8"])
def test_make_refuses_a_misspelt_variable(variable):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", "book", variable], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert f"No variable {variable.partition('=')[0]}" in done.stderr
    good = ["make", "-n", "student", "PROFILE=digits-resnet8", "REBUILD=1", "SEED=1"]
    subprocess.run(good, cwd=REPOSITORY, env=environment, capture_output=True, check=True)


def test_every_target_that_a_text_names_exists():
    (listed,) = re.findall(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    texts = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    texts += [*REPOSITORY.glob("book/*.py"), *REPOSITORY.glob("book/*.md")]
    named = {target for path in texts for target in re.findall(r"(?:`|^(?:# )?)make ([a-z]+)", path.read_text(), re.M)}
    assert {"pages", "test", "check"} <= named <= set(listed.split())
