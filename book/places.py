"""Where the repository is, and its public address."""

from __future__ import annotations

import pathlib

import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def repository_address() -> str:
    """Return the repository's public address, which stands in ``_config.yml`` alone; empty while there is none."""
    return yaml.safe_load((REPOSITORY / "_config.yml").read_text())[
        "repository"
    ]["url"]
