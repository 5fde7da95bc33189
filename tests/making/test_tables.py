"""Tables and sources are shown as they are: nothing in them is taken for HTML or markdown."""

import html
import itertools
import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbconvert.filters import markdown2html

from book.making import tables

SCRIPT = "<script>alert('x')</script>"


@pytest.fixture
def shown(monkeypatch):
    pages = []
    monkeypatch.setattr(tables, "display", lambda output: pages.append(output.data))
    return pages


def test_the_same_table_gives_the_same_page(shown):
    for value in (2.5, 2.5, 3.5):
        tables.show_table(pd.DataFrame({"proxy": ["OMPQ"], "top1": [value]}))
    assert shown[0] == shown[1] != shown[2]


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame({"proxy": [SCRIPT]}),
        pd.DataFrame({SCRIPT: [1.0]}),
        pd.DataFrame({("a", SCRIPT): [1], ("a", "b"): [2]}),
        pd.DataFrame({"mixed": [SCRIPT, 1, None]}),
        pd.DataFrame({"words": [f"some words {SCRIPT}"]}).astype("category"),
        pd.DataFrame({"texts": pd.Series([SCRIPT], dtype=object)}),
        pd.DataFrame({"a": [[SCRIPT]]}),
    ],
    ids=["cell", "column", "two levels", "mixed", "category", "objects", "list"],
)
def test_a_table_holds_no_html_of_its_content(table, shown):
    tables.show_table(table)
    assert "<script" not in shown[0]
    assert "&lt;script" in shown[0]


def test_a_table_escapes_once_and_rounds_numbers_among_texts(shown):
    table = pd.DataFrame({"a": ["x & y", 1.23456, None, ["x & y"]], "n": pd.array([7, None, 1, 2], dtype="Int64")})
    before = table.copy(deep=True)
    tables.show_table(table)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown[0])
    assert cells == ["x &amp; y", "7", "1.23", "–", "–", "1", "[&#39;x &amp; y&#39;]", "2"]
    pd.testing.assert_frame_equal(table, before)


def test_a_source_with_fences_of_its_own_stays_one_block(shown):
    def shows_how() -> str:
        """Return nothing.

        ```python
        shows_how()
        ```
        """
        return SCRIPT

    tables.show_source(shows_how)
    page = markdown2html(shown[0])
    assert page.count("<pre") == 1
    assert "<script" not in page


@given(st.text(alphabet="ab`*_<>&[]()#$|!\\\\ ~{}.-+", max_size=30))
def test_plain_text_reads_as_it_was_written(text):
    text = " ".join(f"x{text}x".split())
    page = markdown2html(tables.plain(text)).strip()
    assert page.startswith("<p>")
    assert page.count("<") == 2  # the paragraph, and nothing in it
    assert html.unescape(page.removeprefix("<p>").removesuffix("</p>")) == text


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30), st.integers(0, 5))
def test_a_fenced_text_is_shown_whole(text, ticks):
    fence, *lines = tables.fenced("`" * ticks + text, "bash").splitlines()
    assert fence == "`" * (len(fence) - 4) + "bash"
    assert lines[-1] == fence.removesuffix("bash")
    longest = max((len(list(run)) for tick, run in itertools.groupby("`" * ticks + text) if tick == "`"), default=0)
    assert len(lines[-1]) > longest
