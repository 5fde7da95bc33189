"""Claims: stated only if they hold, entered into the ledger; chapters refuse bad parameters."""

import pytest

from emq_lib import report
from emq_lib.errors import ClaimError, InvalidParameterError, UnknownProfileError


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    monkeypatch.setenv("EMQ_LEDGER_DIR", str(tmp_path))
    return report.start_chapter("test", "digits-resnet8", False)


def test_a_claim_that_holds_is_stated_and_entered(chapter):
    text = chapter.claim("key", "It is {:.1f}", 2, within=(1, 3), interval=(1.5, 2.5), n=7, paper="3")
    assert text.data == "It is 2.0 (95 % interval 1.5 to 2.5, n = 7)"
    row = report.read_ledger(chapter).iloc[0]
    assert (row["chapter"], row["key"], row["value"], row["lo"], row["n"], row["paper"]) == (
        "test",
        "key",
        2,
        1.5,
        7,
        "3",
    )


@pytest.mark.parametrize("value", [0.9, 3.1, float("nan"), float("inf")])
def test_a_claim_that_does_not_hold_stops_the_chapter(chapter, value):
    with pytest.raises(ClaimError, match="claim 'key'"):
        chapter.claim("key", "{}", value, within=(1, 3))
    assert report.read_ledger(chapter).empty


def test_bounds_by_profile_bind_that_profile_only(chapter):
    chapter.claim("other", "{}", 100, within={"cifar10-resnet20": (0, 1)})
    with pytest.raises(ClaimError):
        chapter.claim("own", "{}", 100, within={"digits-resnet8": (0, 1)})


def test_a_rerun_starts_a_fresh_page(chapter):
    chapter.claim("key", "{}", 1, within=(0, 2))
    again = report.start_chapter("test", "digits-resnet8", False)
    assert report.read_ledger(again).empty


def test_wrong_parameters_are_named():
    with pytest.raises(UnknownProfileError, match="Known profiles"):
        report.start_chapter("test", "nope", False)
    with pytest.raises(InvalidParameterError, match="REBUILD must be True or False, got 'maybe'"):
        report.start_chapter("test", "digits-resnet8", "maybe")
