"""Claims: stated only if they hold, entered into the ledger; chapters refuse bad parameters."""

import pandas as pd
import pytest

from book.making import plots, tables
from book.making.chapter import _made_by, read_ledger, start_chapter
from emq_lib.core.errors import ClaimError, InvalidParameterError, UnknownProfileError
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


def test_bounds_by_profile_bind_that_profile_only(chapter):
    chapter.claim("other", "{}", 100, within={"cifar10-resnet20": (0, 1)})
    with pytest.raises(ClaimError):
        chapter.claim("own", "{}", 100, within={"digits-resnet8": (0, 1)})


def test_a_rerun_starts_a_fresh_page(chapter):
    chapter.claim("key", "{}", 1, within=(0, 2))
    again = start_chapter("test", "digits-resnet8", False)
    assert read_ledger(again).empty


def test_wrong_parameters_are_named():
    with pytest.raises(UnknownProfileError, match="Known profiles"):
        start_chapter("test", "nope", False)
    with pytest.raises(InvalidParameterError, match="REBUILD must be True or False, got 'maybe'"):
        start_chapter("test", "digits-resnet8", "maybe")
    with pytest.raises(InvalidParameterError, match="SEED must be a whole number, 0 or more, got -1"):
        start_chapter("test", "digits-resnet8", False, -1)


def test_another_seed_is_another_study_and_must_be_rebuilt(tmp_path, monkeypatch):
    with pytest.raises(InvalidParameterError, match="not made with SEED = 3"):
        start_chapter("test", "digits-resnet8", False, 3)
    monkeypatch.setenv("EMQ_LEDGER_DIR", str(tmp_path))
    published, drawn = (start_chapter("test", "digits-resnet8", True, seed) for seed in (0, 3))
    assert drawn.profile.rng("bench").random() != published.profile.rng("bench").random()
    drawn.claim("own", "{}", 100, within={"digits-resnet8": (0, 1)})


def test_a_chapter_says_which_line_made_it():
    line = _made_by("02_proxies", {"PROFILE": "digits-resnet8", "REBUILD": False, "SEED": 0})
    expected = (
        "papermill book/02_proxies.ipynb _build/02_proxies.ipynb -p PROFILE digits-resnet8 -p REBUILD False -p SEED 0"
    )
    assert expected in line.splitlines()


def test_the_same_table_gives_the_same_page(monkeypatch):
    pages = []
    monkeypatch.setattr(plots, "display", lambda shown: pages.append(shown.data))
    for value in (2.5, 2.5, 3.5):
        tables.show_table(pd.DataFrame({"proxy": ["OMPQ"], "top1": [value]}))
    assert pages[0] == pages[1] != pages[2]
