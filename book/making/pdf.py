"""The whole book as a PDF: built pages printed by a browser, with an outline and links inside."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
import urllib.parse
from collections.abc import Sequence

import pypdf
from playwright.sync_api import sync_playwright
from pypdf.generic import ArrayObject, DictionaryObject, Fit, NameObject

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_OPTIONS = ("--no-sandbox",)  # pages are the book's own, and containers run as root


def find_browser() -> str | None:
    """Return the path of a Chromium on this machine, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def print_pdf(pages: Sequence[pathlib.Path], target: pathlib.Path, *, browser: str, title: str) -> None:
    """Print built pages, in this order, into one PDF with an outline; links between pages become links inside it.

    Args:
        pages: the HTML files.
        target: the PDF.
        browser: path of a Chromium.
        title: title of the PDF.
    """
    book = pypdf.PdfWriter()
    firsts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=BROWSER_OPTIONS)
        for index, page in enumerate(pages):
            printed = pathlib.Path(folder) / f"{index}.pdf"
            firsts[page.resolve().as_uri()] = len(book.pages)
            sheet = chromium.new_page(color_scheme="light")
            sheet.goto(page.resolve().as_uri())
            sheet.wait_for_load_state("networkidle")
            sheet.evaluate("window.MathJax?.startup?.promise.then(() => null)")
            sheet.add_style_tag(content=f":root {{ counter-reset: page {len(book.pages)} }}")
            sheet.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true })")
            heading = sheet.title().split(" — ")[0]
            sheet.pdf(path=printed, format="A4", tagged=True, prefer_css_page_size=True)
            sheet.close()
            book.append(printed, outline_item=heading, import_outline=False)
        chromium.close()
    _link_inside(book, firsts)
    book.add_metadata({"/Title": title})
    book.compress_identical_objects()
    book.write(target)


def _link_inside(book: pypdf.PdfWriter, firsts: dict[str, int]) -> None:
    """Turn links to the files of printed pages into links to where they begin in the PDF; drop other links to files."""
    for page in book.pages:
        kept = ArrayObject()
        for reference in page.get("/Annots", ()):
            link = reference.get_object()
            uri = link.get("/A", DictionaryObject()).get("/URI", "")
            start = firsts.get(urllib.parse.urldefrag(uri).url)
            if start is not None:
                del link[NameObject("/A")]
                destination = [book.pages[start].indirect_reference, NameObject(Fit.fit_horizontally().fit_type)]
                link[NameObject("/Dest")] = ArrayObject([*destination, page.mediabox.top])
            if start is not None or not uri.startswith("file:"):
                kept.append(reference)
        if kept:
            page[NameObject("/Annots")] = kept
        else:
            page.pop(NameObject("/Annots"), None)
