"""The start of a chapter refuses bad parameters; claims are stated only if they hold, and entered into the ledger."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from nbconvert.filters import markdown2html

from book.making.chapter import Chapter, _made_by, read_costs, read_ledger, start_chapter
from book.places import REPOSITORY
from book.studies.study import study_folder
from emq_lib.core.errors import (
    ClaimError,
    CorruptArtefactError,
    InvalidParameterError,
    UnknownProfileError,
    UnwritablePathError,
)
from emq_lib.core.profiles import get_profile


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    monkeypatch.setenv("EMQ_LEDGER_DIR", str(tmp_path))
    return start_chapter("test", "digits-resnet8", False)


def test_a_claim_that_holds_is_stated_and_entered(chapter):
    text = chapter.claim("key", "It is {:.1f}", 2, within=(1, 3), interval=(1.5, 2.5), n=7, paper="3")
    assert text.data == "It is 2.0 (95 % interval 1.5 to 2.5, n = 7)"
    row = read_ledger(chapter).iloc[0]
    assert (row["chapter"], row["key"], row["value"], row["lo"], row["n"], row["paper"]) == (
        "test",
        "key",
        2,
        1.5,
        7,
        "3",
    )


@pytest.mark.parametrize(
    ("interval", "reported", "agrees"),
    [
        ((0.5, 0.7), (0.65, 0.9), "yes"),
        ((0.5, 0.6), (0.65, 0.9), "no, lower here"),
        ((0.92, 0.95), (0.65, 0.9), "no, higher here"),
        (None, (2, 2), "yes"),
        (None, (1, 1), "no, higher here"),
        ((0.5, 0.7), None, ""),
    ],
)
def test_a_claim_says_whether_it_agrees_with_the_paper(chapter, interval, reported, agrees):
    chapter.claim("key", "{}", 2, within=(0, 5), interval=interval, reported=reported)
    assert read_ledger(chapter)["agrees"].item() == agrees


@pytest.mark.parametrize("value", [0.9, 3.1, float("nan"), float("inf")])
def test_a_claim_that_does_not_hold_stops_the_chapter(chapter, value):
    with pytest.raises(ClaimError, match="claim 'key'"):
        chapter.claim("key", "{}", value, within=(1, 3))
    assert read_ledger(chapter).empty


@pytest.mark.parametrize(
    ("profile", "seed", "printed"),
    [("cifar10-resnet20", 0, True), ("digits-resnet8", 0, False), ("cifar10-resnet20", 3, False)],
)
def test_findings_are_expected_of_the_printed_study_only(profile, seed, printed):
    assert start_chapter("test", profile, rebuild=seed > 0, seed=seed).as_printed == printed


def test_a_chapter_sees_its_own_study_with_its_own_seed_and_the_others_as_published():
    chapter = start_chapter("test", "digits-resnet8", rebuild=True, seed=3)
    assert chapter.study("digits-resnet8") is chapter.profile
    assert chapter.study("digits-resnet8").seed == get_profile("digits-resnet8").seed + 3
    assert chapter.study("cifar10-resnet20") == get_profile("cifar10-resnet20")


@pytest.mark.parametrize("content", [b'{"key": 1', b"[1, 2]\n", b"\xff\xfe\n", b"3\n", b"{}\n\nx"])
def test_a_page_of_the_ledger_that_is_cut_or_altered_is_named(chapter, content):
    chapter.ledger.with_name("other.jsonl").write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="other.jsonl is cut or altered .*Execute other again"):
        read_ledger(chapter)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 3}', '{"a": {"b": {"c": {}}}}', '{"a": {"b": {"c": null}}}'])
def test_costs_that_are_cut_or_altered_are_named(content, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "chapters.json").write_text(content)
    monkeypatch.setattr("book.making.chapter.REPOSITORY", tmp_path)
    with pytest.raises(CorruptArtefactError, match="chapters.json is cut or altered"):
        read_costs()


def test_bounds_by_profile_bind_that_profile_only(chapter):
    chapter.claim("other", "{}", 100, within={"cifar10-resnet20": (0, 1)})
    with pytest.raises(ClaimError):
        chapter.claim("own", "{}", 100, within={"digits-resnet8": (0, 1)})


def test_a_rerun_starts_a_fresh_page(chapter):
    chapter.claim("key", "{}", 1, within=(0, 2))
    again = start_chapter("test", "digits-resnet8", False)
    assert read_ledger(again).empty


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        (("nope", False, 0), UnknownProfileError, "Known profiles"),
        ((["digits-resnet8"], False, 0), InvalidParameterError, "PROFILE must be the name"),
        ((None, False, 0), InvalidParameterError, "PROFILE must be the name"),
        (("digits-resnet8", "maybe", 0), InvalidParameterError, "REBUILD must be True or False, got 'maybe'"),
        (("digits-resnet8", "True", 0), InvalidParameterError, "REBUILD must be True or False, got 'True'"),
        (("digits-resnet8", 1, 0), InvalidParameterError, "REBUILD must be True or False, got 1"),
        (("digits-resnet8", None, 0), InvalidParameterError, "REBUILD must be True or False, got None"),
        *(
            (("digits-resnet8", False, seed), InvalidParameterError, "SEED must be a whole number from 0")
            for seed in (-1, True, False, "1", 1.0, None, float("nan"), 2**32, 10**400, [1])
        ),
        (("digits-resnet8", False, 3), InvalidParameterError, "no study of digits-resnet8 with SEED = 3"),
    ],
)
def test_wrong_parameters_are_named_and_leave_the_ledger_as_it_was(parameters, error, words, tmp_path, monkeypatch):
    monkeypatch.setenv("EMQ_LEDGER_DIR", str(tmp_path))
    (tmp_path / "test.jsonl").write_text("claims of the run before\n")
    with pytest.raises(error, match=words):
        start_chapter("test", *parameters)
    assert (tmp_path / "test.jsonl").read_text() == "claims of the run before\n"


@pytest.mark.parametrize("seed", [0, 1])
def test_files_of_another_seed_are_neither_shown_nor_overwritten(seed, tmp_path, monkeypatch):
    folder = tmp_path / "digits-resnet8"
    folder.mkdir()
    manifest = json.dumps({"layers.csv": {"sha256": "0" * 64, "seed": 1 - seed}})
    (folder / "manifest.json").write_text(manifest)
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path))
    for rebuild in (False, True):
        with pytest.raises(InvalidParameterError, match=f"not made with SEED = {seed}.*EMQ_STUDY_ROOT"):
            start_chapter("test", "digits-resnet8", rebuild, seed)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"manifest.json": manifest}


def test_a_student_who_rebuilds_with_another_seed_leaves_the_published_study_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("EMQ_LEDGER_DIR", str(tmp_path))
    monkeypatch.delenv("EMQ_STUDY_ROOT", raising=False)
    published = get_profile("digits-resnet8")
    drawn = start_chapter("test", "digits-resnet8", rebuild=True, seed=3)
    assert drawn.profile.rng("bench").random() != published.rng("bench").random()
    assert study_folder(published) == REPOSITORY / "data" / "digits-resnet8"
    assert REPOSITORY / "_build" in study_folder(drawn.profile).parents
    drawn.claim("own", "{}", 100, within={"digits-resnet8": (0, 1)})  # bounds bind the published draw alone


def test_claims_of_another_seed_stand_apart(monkeypatch):
    monkeypatch.delenv("EMQ_LEDGER_DIR", raising=False)
    published = get_profile("digits-resnet8")
    ledgers = [Chapter("test", profile, True).ledger for profile in (published, replace(published, seed=3))]
    assert ledgers[0] != ledgers[1]
    assert ledgers[0] == REPOSITORY / "_build" / "digits-resnet8" / "ledger" / "test.jsonl"


def test_a_place_where_no_ledger_can_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMQ_LEDGER_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(UnwritablePathError, match="EMQ_LEDGER_DIR"):
        start_chapter("test", "digits-resnet8", False)


def test_a_ledger_that_turns_read_only_is_named(chapter):
    chapter.ledger.unlink()
    chapter.ledger.mkdir()
    with pytest.raises(UnwritablePathError, match="EMQ_LEDGER_DIR"):
        chapter.claim("key", "{}", 1, within=(0, 2))


@pytest.mark.parametrize(
    ("cell", "unknown"),
    [
        ('# Parameters\nPROFIL = "digits-resnet8"\n', "PROFIL"),
        ("# Parameters\nREBUILT = True\nSEEDS: int = 1\n", "REBUILT, SEEDS"),
        ('# Parameters\nPROFILE = "digits-resnet8"\nSEED = 0\n', None),
        ("COLOURS = 3\n", None),
    ],
)
def test_a_misspelt_parameter_of_papermill_is_named(cell, unknown, tmp_path, monkeypatch):
    monkeypatch.setenv("EMQ_LEDGER_DIR", str(tmp_path))
    shell = SimpleNamespace(user_ns={"In": ["", "PROFILE = 'a'", cell]})
    monkeypatch.setattr("book.making.chapter.get_ipython", lambda: shell)
    if unknown is None:
        start_chapter("test", "digits-resnet8", False)
        return
    with pytest.raises(InvalidParameterError, match=f"No parameter {unknown}: chapters have PROFILE, REBUILD, SEED"):
        start_chapter("test", "digits-resnet8", False)
    assert not list(tmp_path.iterdir())


def test_a_chapter_says_which_files_are_published_although_out_of_date(tmp_path, monkeypatch):
    monkeypatch.setenv("EMQ_LEDGER_DIR", str(tmp_path))
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path))
    entries = {
        "layers.csv": {"sha256": "0" * 64, "seed": 0},
        "evolution.jsonl": {"sha256": "0" * 64, "seed": 0, "outdated": "its <inputs> were wrong; searched again soon."},
    }
    (tmp_path / "digits-resnet8").mkdir()
    (tmp_path / "digits-resnet8" / "manifest.json").write_text(json.dumps(entries))
    shown = []
    monkeypatch.setattr("book.making.chapter.display", lambda markdown: shown.append(markdown.data))
    start_chapter("test", "digits-resnet8", False)
    assert [text for text in shown if "layers.csv" in text] == []
    (sentence,) = (text for text in shown if "evolution.jsonl" in text)
    assert "out of date" in sentence
    assert sentence.endswith("its &lt;inputs&gt; were wrong; searched again soon.")


def test_a_chapter_says_which_line_made_it():
    line = _made_by("02_proxies", {"PROFILE": "digits-resnet8", "REBUILD": False, "SEED": 0})
    expected = (
        "mkdir -p _build && .venv/bin/papermill book/02_proxies.ipynb _build/02_proxies.ipynb "
        "-p PROFILE digits-resnet8 -p REBUILD False -p SEED 0"
    )
    assert expected in line.splitlines()


def test_the_line_that_made_a_chapter_shows_any_name_as_text():
    costs = pd.DataFrame([("<b>", "a```b", "x", 1.0, 1.0)], columns=["device", "study", "chapter", "seconds", "memory"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("book.making.chapter.read_costs", lambda: costs)
        shown = _made_by("x", {"PROFILE": "a```b"})
    html = markdown2html(shown)
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert "'a```b'" in html
