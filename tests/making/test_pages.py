"""Pages of the book and what is made of them: configuration, downloads, the first cell elsewhere, the mark."""

import os

import pytest

from book.making import drawings, pages
from book.places import REPOSITORY


def test_without_a_browser_there_is_no_pdf_and_no_link_to_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "find_browser", lambda: None)
    (tmp_path / "book").mkdir()
    links = f'<a href="rerun.html">Rerun</a>\n<a class="b" href="../{pages.PDF_NAME}">PDF</a>\n<a href="z.zip">zip</a>'
    (tmp_path / "book" / "intro.html").write_text(links)
    pages.add_downloads(tmp_path, tmp_path, names=["intro"], title="title")
    assert (tmp_path / "book" / "intro.html").read_text() == '<a href="rerun.html">Rerun</a>\n<a href="z.zip">zip</a>'
    assert not (tmp_path / pages.PDF_NAME).exists()


def test_an_address_brings_the_buttons_that_need_it():
    config = {"repository": {"url": "https://github.com/someone/book", "branch": "main"}, "html": {"favicon": "mark"}}
    shown = pages.configure(config)
    assert shown["repository"] == config["repository"]
    assert shown["html"] == {
        "favicon": "mark",
        "use_repository_button": True,
        "use_edit_page_button": True,
        "use_issues_button": True,
    }
    assert {"binderhub_url", "colab_url"} < set(shown["launch_buttons"])


def test_the_first_cell_does_nothing_where_the_book_is_installed(monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("something was fetched"))
    here = os.getcwd()
    exec(pages.first_cell("https://github.com/someone/book"), {})
    assert os.getcwd() == here


@pytest.mark.parametrize("name", ["favicon.svg", "logo.svg"])
def test_the_mark_is_the_one_that_code_draws(name, tmp_path):
    drawings.draw_static(tmp_path)
    assert (REPOSITORY / "book" / "_static" / name).read_text() == (tmp_path / name).read_text()
