"""Slides: the marked cells of an executed chapter as a reveal.js deck that needs no network.

A cell whose metadata say ``"slideshow": {"slide_type": "slide"}`` starts a slide, "-" continues it; other cells are
left out. A slide shows results, not code, unless a cell is tagged "slide-code". One that does not start with a heading
gets the heading of its section; a figure gets its caption.
"""

from __future__ import annotations

import copy
import html
import importlib.resources
import pathlib
import re
import shutil

import nbformat
from nbconvert import SlidesExporter
from nbformat import NotebookNode, v4
from pybtex.database import BibliographyData, parse_file

from book.places import REPOSITORY
from emq_lib.core.errors import EMQError

CODE = "slide-code"
SIZE = ("1280", "720")  # of a slide, in pixels
_HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
_GLUED = re.compile(r"{glue:text}`([^`:]+):?([^`]*)`")
_CITED = re.compile(r"{cite:[pt]}`([^`]+)`")


class SlidesError(EMQError, RuntimeError):
    """A chapter cannot be shown as slides."""


def has_slides(notebook: NotebookNode) -> bool:
    """Return whether any cell of a notebook is marked for a slide."""
    return any(_slide_type(cell) for cell in notebook.cells)


def make_deck(notebook: NotebookNode, works: BibliographyData) -> NotebookNode:
    """Return the marked cells of an executed notebook, every reference to a number or to a work resolved.

    Args:
        notebook: an executed chapter.
        works: what it cites.

    Raises:
        SlidesError: no cell is marked, or a slide refers to a number that the notebook did not glue.
    """
    if not has_slides(notebook):
        raise SlidesError("No cell is marked for a slide: give some the metadata slideshow={'slide_type': 'slide'}.")
    values, heading, cells = _glued_values(notebook), "", []
    for cell in notebook.cells:
        headings = _HEADING.findall(cell.source) if cell.cell_type == "markdown" else []
        if kind := _slide_type(cell):
            starts_with_heading = bool(headings) and cell.source.startswith(headings[0])
            if kind == "slide" and not starts_with_heading:
                cells.append(v4.new_markdown_cell(heading, metadata={"slideshow": {"slide_type": "slide"}}))
                kind = "-"
            cells.append(_shown(cell, kind, values, works))
        heading = headings[-1] if headings else heading
    title = _HEADING.findall(notebook.cells[0].source)[0].lstrip("# ")
    return v4.new_notebook(cells=cells, metadata={"title": title})


def export_deck(executed: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write the slides of an executed notebook, and beside them the scripts and fonts they load; return their path.

    Raises:
        SlidesError: see :func:`make_deck`.
    """
    deck = make_deck(nbformat.read(executed, as_version=4), parse_file(REPOSITORY / "book" / "references.bib"))
    exporter = SlidesExporter(
        template_file=str(REPOSITORY / "book" / "slides.html.j2"),
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        reveal_url_prefix="reveal.js",
        reveal_theme="white",
        reveal_number="c/t",
        reveal_width=SIZE[0],
        reveal_height=SIZE[1],
    )
    page, _ = exporter.from_notebook_node(deck)
    assets = {
        "reveal.js": importlib.resources.files("sphinx_revealjs") / "_static" / "revealjs",
        "mathjax": importlib.resources.files("sphinx-mathjax-offline") / "static" / "mathjax",
    }
    for name, source in assets.items():
        shutil.copytree(source, folder / name, dirs_exist_ok=True)
    path = folder / f"{executed.stem}.html"
    path.write_text(page)
    return path


def _slide_type(cell: NotebookNode) -> str:
    return cell.metadata.get("slideshow", {}).get("slide_type", "")


def _glued_values(notebook: NotebookNode) -> dict[str, float]:
    """Return what the claims of a notebook glued, by name."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    glued = [output for output in outputs if "scrapbook" in output.get("metadata", {})]
    return {
        output.metadata["scrapbook"]["name"]: float(output.data["application/papermill.record/text/plain"])
        for output in glued
    }


def _shown(cell: NotebookNode, kind: str, values: dict[str, float], works: BibliographyData) -> NotebookNode:
    """Return a cell as a slide shows it."""
    cell = copy.deepcopy(cell)
    cell.metadata["slideshow"] = {"slide_type": kind}
    if cell.cell_type == "markdown":
        cell.source = _resolved(cell.source, values, works)
        return cell
    cell.metadata["transient"] = {"remove_source": CODE not in cell.metadata.get("tags", [])}
    cell.outputs = [
        output
        for output in cell.outputs
        if "scrapbook" not in output.get("metadata", {}) and output.get("name") != "stderr"
    ]
    if figure := cell.metadata.get("mystnb"):
        (output,) = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        alt, image = (html.escape(figure["image"]["alt"]), output.data["image/png"].strip())
        caption = html.escape(_resolved(figure["figure"]["caption"], values, works))
        shown = f'<img alt="{alt}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption>'
        cell.outputs = [v4.new_output("display_data", data={"text/html": f"<figure>{shown}</figure>"})]
    return cell


def _resolved(text: str, values: dict[str, float], works: BibliographyData) -> str:
    """Return a text with glued numbers and cited works written out."""

    def number(match: re.Match) -> str:
        name, form = match.groups()
        if name not in values:
            raise SlidesError(f"A slide refers to {name!r}, which this notebook did not glue. Execute it anew.")
        return format(values[name], form)

    def work(match: re.Match) -> str:
        entry = works.entries[match[1]]
        first, *others = [" ".join(author.last_names) for author in entry.persons["author"]]
        return f"({first}{' et al.' if others else ''} {entry.fields['year']})"

    return _CITED.sub(work, _GLUED.sub(number, text))
