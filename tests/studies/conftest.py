"""A study that can be searched: the published digits study, whose bench is large enough."""

from __future__ import annotations

import shutil

import pytest
import searching

from book.studies import methods
from book.studies.study import study_folder


@pytest.fixture(scope="session")
def searchable_root(tmp_path_factory):
    """Folder of studies that holds checkpoint, bench and statistics of the published digits study."""
    root = tmp_path_factory.mktemp("searchable")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EMQ_STUDY_ROOT", raising=False)
        published = study_folder(searching.DIGITS)
        patch.setenv("EMQ_STUDY_ROOT", str(root))
        searching.enter_published(searching.DIGITS, published)
    return root


@pytest.fixture(scope="session")
def searched_root(searchable_root, tmp_path_factory):
    """Return the same after short searches; tests must not change it."""
    root = shutil.copytree(searchable_root, tmp_path_factory.mktemp("searched") / "studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMQ_STUDY_ROOT", str(root))
        patch.setattr(methods, "METHODS", searching.FEW_METHODS)
        searching.search_briefly()
    return root


@pytest.fixture
def searchable(searchable_root, tmp_path, monkeypatch):
    """Return the folder of a copy that a test may change; few methods search."""
    root = shutil.copytree(searchable_root, tmp_path / "studies")
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(root))
    monkeypatch.setattr(methods, "METHODS", searching.FEW_METHODS)
    return root / searching.DIGITS.name


@pytest.fixture
def searched(searched_root, tmp_path, monkeypatch):
    """Return the folder of a copy that was searched, which a test may change."""
    root = shutil.copytree(searched_root, tmp_path / "studies")
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(root))
    monkeypatch.setattr(methods, "METHODS", searching.FEW_METHODS)
    return root / searching.DIGITS.name
