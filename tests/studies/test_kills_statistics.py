"""Trainings and measurements of statistics that are killed, again and again, end with the files of undisturbed ones."""

import dataclasses
import functools
import shutil

import pytest
import torch
from killing import KILLS, check_kills

from book.studies.checkpoints import build_checkpoint
from book.studies.files import STATISTICS
from book.studies.images import load_dataset
from book.studies.proxies import build_statistics
from emq_lib.core.profiles import Profile


def train_briefly(profile: Profile) -> None:
    torch.set_num_threads(1)
    training = dataclasses.replace(profile.training, epochs=3)
    build_checkpoint(dataclasses.replace(profile, training=training), load_dataset(profile))


def measure_briefly(profile: Profile) -> None:
    torch.set_num_threads(1)
    build_statistics(profile, load_dataset(profile).calibration)


@pytest.mark.slow
def test_a_killed_training_of_a_checkpoint_is_finished_by_the_same_call(tmp_path, profile):
    start, scratch = tmp_path / "start", tmp_path / "scratch"
    (start / profile.name).mkdir(parents=True)
    scratch.mkdir()
    calm = check_kills(functools.partial(train_briefly, profile), start, scratch)
    assert calm.steps > 5


@pytest.mark.slow
def test_a_killed_measurement_of_statistics_is_finished_by_the_same_call(built_study, tmp_path, profile):
    start, scratch = tmp_path / "start", tmp_path / "scratch"
    shutil.copytree(built_study, start)
    (start / profile.name / STATISTICS).unlink()
    scratch.mkdir()
    calm = check_kills(functools.partial(measure_briefly, profile), start, scratch, kills=KILLS // 2)
    assert calm.steps > 5
