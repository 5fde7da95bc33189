"""A bench whose measurement is killed, or finds no room, again and again, is the bench of an undisturbed run."""

import dataclasses
import functools
import json
import shutil

import pytest
from killing import KILLS, check_full_disks, check_kills

from book.studies.bench import build_bench
from book.studies.files import MODEL
from book.studies.images import load_dataset
from book.studies.study import study_folder
from emq_lib.bench import engine
from emq_lib.core.profiles import Profile


@pytest.fixture
def few(profile):
    return dataclasses.replace(profile, bench_configs=10, stratified_configs=5, bench_images=100)


def measure_in_small_blocks(profile: Profile) -> None:
    engine.BLOCK = 4
    build_bench(profile, load_dataset(profile))


@pytest.fixture
def trained(built_study, tmp_path, profile):
    """Return a folder of studies that holds the checkpoint alone."""
    folder = tmp_path / "start" / profile.name
    folder.mkdir(parents=True)
    shutil.copy(built_study / profile.name / MODEL, folder)
    manifest = json.loads((built_study / profile.name / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({MODEL: manifest[MODEL]}))
    return folder.parent


@pytest.mark.slow
def test_a_killed_bench_is_finished_by_the_same_call(trained, tmp_path, few):
    calm = check_kills(functools.partial(measure_in_small_blocks, few), trained, tmp_path)
    assert calm.steps > 10


@pytest.mark.slow
def test_a_killed_extension_is_finished_by_the_same_call(trained, tmp_path, few, monkeypatch):
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(trained))
    build_bench(dataclasses.replace(few, bench_configs=4, stratified_configs=2), load_dataset(few))
    assert (study_folder(few) / "bench.parquet").is_file()
    calm = check_kills(functools.partial(measure_in_small_blocks, few), trained, tmp_path)
    assert calm.steps > 10


@pytest.mark.slow
def test_a_bench_that_finds_no_room_is_finished_once_there_is(trained, tmp_path, few):
    check_full_disks(
        functools.partial(measure_in_small_blocks, few), trained, tmp_path, steps=KILLS // 2, rooms=(0, 2_000)
    )
