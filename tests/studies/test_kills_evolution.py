"""Searches that are killed, again and again, end with the files of undisturbed ones."""

import functools

import pytest
from killing import KILLS, check_kills
from searching import DIGITS

from book.studies import evolution, methods


def search_once(structures: tuple[str, ...], workers: int) -> None:
    """Search by plain evolution and its control alone."""
    methods.METHODS = {methods.EVOLUTION: methods.METHODS[methods.EVOLUTION]}
    methods.STRUCTURES = structures
    evolution.build_evolution(DIGITS, workers=workers)


@pytest.mark.slow
def test_a_killed_search_is_finished_by_the_same_call(searchable_root, tmp_path):
    calm = check_kills(functools.partial(search_once, ("branched",), 1), searchable_root, tmp_path)
    assert calm.steps > 30


@pytest.mark.slow
def test_workers_of_a_killed_search_end_and_the_next_one_finishes(searchable_root, tmp_path):
    job = functools.partial(search_once, ("sequential", "branched"), 2)
    check_kills(job, searchable_root, tmp_path, kills=max(2, KILLS // 6), seed=1)
