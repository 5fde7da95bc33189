"""Executed chapters as pages that work from the file system, with the book as a PDF and its notebooks as a zip.

Building pages executes nothing, and this module and what it imports load nothing that computes.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence

import yaml

from book.making.pdf import find_browser, print_pdf
from book.places import REPOSITORY, chapter_names, page_names
from emq_lib.core.errors import EMQError

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

# Run from the repository, so that Sphinx finds the book's extensions where the book is not installed.
_JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"

# What MathJax's one file loads on demand; the rest of its folder is other builds of the same.
_MATHJAX = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions")


class PagesError(EMQError, RuntimeError):
    """The pages could not be built."""


def copy_notebooks(build: pathlib.Path) -> None:
    """Put the notebooks of ``book/``, with the outputs they have, where `build_pages` expects executed ones."""
    target = build / "source" / "book"
    target.mkdir(parents=True, exist_ok=True)
    for name in chapter_names():
        shutil.copy(REPOSITORY / "book" / f"{name}.ipynb", target)


def build_pages(build: pathlib.Path, html: pathlib.Path) -> pathlib.Path:
    """Build the HTML of executed chapters with every warning an error; return the path of its first page.

    Args:
        build: folder of this build; its source/book holds the executed chapters.
        html: folder that the pages go to; what it held is gone.

    Raises:
        PagesError: Sphinx warned or failed.
    """
    source = build / "source"
    ignored = shutil.ignore_patterns("*.ipynb", "*.py", "__pycache__", ".ipynb_checkpoints")
    shutil.copytree(REPOSITORY / "book", source / "book", dirs_exist_ok=True, ignore=ignored)
    shutil.copy(REPOSITORY / "_toc.yml", source)
    config = yaml.safe_load((REPOSITORY / "_config.yml").read_text())
    (source / "_config.yml").write_text(yaml.safe_dump(configure(config)))
    shutil.rmtree(build / "pages", ignore_errors=True)
    options = ["--warningiserror", "--keep-going", "--nitpick", "--all", "--path-output", str(build / "pages")]
    command = [sys.executable, "-c", _JUPYTER_BOOK, "build", str(source), *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PagesError(f"The pages were not built:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    shutil.rmtree(html, ignore_errors=True)
    shutil.copytree(build / "pages" / "_build" / "html", html)
    work_offline(html)
    add_downloads(html, source / "book", names=page_names(), title=config["title"])
    return html / "index.html"


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
