"""Searches that are killed, again and again, end with the files of undisturbed ones."""

import functools

import pytest
from killing import check_kills
from searching import DIGITS

from book.studies import evolution, methods


def search_once(workers: int = 1) -> None:
    """Search by one method alone."""
    methods.METHODS = {methods.EVOLUTION: methods.METHODS[methods.EVOLUTION]}
    evolution.build_evolution(DIGITS, workers=workers)


@pytest.mark.slow
def test_a_killed_search_is_finished_by_the_same_call(searchable_root, tmp_path):
    calm = check_kills(search_once, searchable_root, tmp_path)
    assert calm.steps > 50


@pytest.mark.slow
def test_workers_of_a_killed_search_end_and_the_next_one_finishes(searchable_root, tmp_path):
    calm = check_kills(functools.partial(search_once, 2), searchable_root, tmp_path, kills=4, seed=1)
    assert calm.seconds > 0
