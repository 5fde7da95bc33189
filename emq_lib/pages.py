"""What Sphinx leaves to do: pages that work from the file system, the whole book as a PDF, and a zip of notebooks."""

from __future__ import annotations

import pathlib
import re
import shutil
import tempfile
import urllib.parse
import zipfile
from collections.abc import Sequence

import pypdf
from playwright.sync_api import sync_playwright
from pypdf.generic import ArrayObject, DictionaryObject, Fit, NameObject

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_OPTIONS = ("--no-sandbox",)  # pages are the book's own, and containers run as root
PDF_NAME, ZIP_NAME = "emq-rebuilt.pdf", "emq-notebooks.zip"

# What the theme writes into every page although it cannot work from a file, or not without a network.
_UNWANTED = tuple(
    re.compile(pattern)
    for pattern in (
        r'<link rel="preload" as="font"[^>]*>\s*',  # fetched across origins; the style sheets load the same fonts
        r"<script>const THEBE_JS_URL[^<]*</script>\s*",  # twice, which is an error
        r'<script[^>]*src="[^"]*sphinx-thebe\.js[^"]*"></script>\s*',
        r'(?<=<div) role="list"(?= class="citation-list">)',  # its children are not list items
    )
)
# What MathJax's one file loads on demand; the rest of its folder is other builds of the same.
_MATHJAX = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions")


def work_offline(html: pathlib.Path) -> None:
    """Take out of built pages what fails without a server or a network, and files that no page asks for."""
    for page in html.rglob("*.html"):
        text = page.read_text()
        for pattern in _UNWANTED:
            text = pattern.sub("", text)
        page.write_text(text)
    static = html / "_static"
    for path in sorted((static / "mathjax").rglob("*"), reverse=True):
        name = path.relative_to(static / "mathjax").as_posix()
        if path.is_file() and not name.startswith(_MATHJAX):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for path in (*static.rglob("*.map"), static / "sphinx-thebe.js"):
        path.unlink(missing_ok=True)
    shutil.rmtree(static / "locales", ignore_errors=True)


def find_browser() -> str | None:
    """Return the path of a Chromium on this machine, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def pack_notebooks(folder: pathlib.Path, names: Sequence[str], target: pathlib.Path) -> None:
    """Write the notebooks `names` of `folder` into one zip, the same bytes for the same notebooks."""
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(f"emq-notebooks/{name}.ipynb")
            archive.writestr(entry, (folder / f"{name}.ipynb").read_bytes(), zipfile.ZIP_DEFLATED)


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
