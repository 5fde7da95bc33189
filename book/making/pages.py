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


def configure(config: dict) -> dict:
    """Return ``_config.yml`` as Sphinx gets it: with the buttons that need the repository's address, or without it.

    >>> sorted(configure({"repository": {"url": ""}, "html": {}}))
    ['html']
    """
    if not config["repository"]["url"]:
        return {key: value for key, value in config.items() if key != "repository"}
    buttons = dict.fromkeys(("use_repository_button", "use_edit_page_button", "use_issues_button"), True)
    launch = {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"}
    return config | {"html": config["html"] | buttons, "launch_buttons": {"notebook_interface": "jupyterlab"} | launch}


def first_cell(address: str) -> str:
    """Return code that fetches the book and its pinned environment where they are missing, and else does nothing."""
    return f"""\
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("emq_lib") is None:
    subprocess.run(["git", "clone", "--quiet", "{address}", "emq"], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "-r", "emq/requirements.lock"], check=True)
    subprocess.run([*install, "--editable", "emq"], check=True)
    sys.path.insert(0, os.path.abspath("emq"))
    os.chdir("emq/book")"""


def find_browser() -> str | None:
    """Return the path of a Chromium on this machine, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def add_downloads(html: pathlib.Path, notebooks: pathlib.Path, *, names: Sequence[str], title: str) -> None:
    """Add the book as a PDF and its notebooks as a zip; without a browser there is no PDF, and no link to one.

    Args:
        html: folder of the pages.
        notebooks: folder of the executed notebooks.
        names: pages in the order of the book, without ending.
        title: title of the PDF.
    """
    with zipfile.ZipFile(html / ZIP_NAME, "w") as archive:  # the same bytes for the same notebooks
        for path in (notebooks / f"{name}.ipynb" for name in names):
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(f"emq-notebooks/{path.name}"), path.read_bytes(), zipfile.ZIP_DEFLATED)
    printed = [html / "book" / f"{name}.html" for name in names]
    if browser := find_browser():
        print_pdf(printed, html / PDF_NAME, browser=browser, title=title)
    else:
        first = printed[0]
        first.write_text(re.sub(rf'<a [^>]*href="[^"]*{PDF_NAME}"[^>]*>.*?</a>\s*', "", first.read_text()))


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
