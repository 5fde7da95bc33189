"""Where the repository is, which pages it has, and what stands in one place alone."""

from __future__ import annotations

import pathlib

import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PRINTED = "cifar10-resnet20"  # the study that the text of the book speaks of


def page_names() -> list[str]:
    """Return all pages of ``_toc.yml`` in order, without folder and ending, e.g. "intro"."""
    toc = yaml.safe_load((REPOSITORY / "_toc.yml").read_text())
    files = [
        entry["file"] for part in toc["parts"] for entry in part["chapters"]
    ]
    return [file.removeprefix("book/") for file in (toc["root"], *files)]


def chapter_names() -> list[str]:
    """Return the pages that are notebooks, in the order of the book, e.g. "01_bench"."""
    book = REPOSITORY / "book"
    return [name for name in page_names() if (book / f"{name}.py").is_file()]


def repository_address() -> str:
    """Return the repository's public address, which stands in ``_config.yml`` alone; empty while there is none."""
    config = yaml.safe_load((REPOSITORY / "_config.yml").read_text())
    return config["repository"]["url"]
