"""Comparisons and trainings that are killed, again and again, end with the files of undisturbed ones."""

import functools
import pathlib

import pytest
import torch
from killing import KILLS, check_kills

from book.studies import quantization
from book.studies.images import load_dataset
from book.studies.networks import load_checkpoint
from book.studies.study import checked_path, study_folder
from emq_lib.core.profiles import Profile
from emq_lib.quantization import adaround
from emq_lib.quantization.brecq import Settings
from emq_lib.quantization.packed import save_network
from emq_lib.quantization.qat import QatRecipe
from emq_lib.quantization.quantize import quantize_model


def compare_briefly(profile: Profile) -> None:
    adaround.ITERATIONS = 5
    quantization.BUDGETS, quantization.TRAINED_BUDGETS = (2.25, 3.0), (3.0,)
    quantization.build_comparison(
        profile, load_dataset(profile), settings=Settings(3, 2), seeds=1, workers=1,
        quantizers=("rtn", "adaround", "brecq", "qat"),
    )  # fmt: skip


def train_and_save(profile: Profile) -> None:
    data, folder = load_dataset(profile), study_folder(profile)
    torch.set_num_threads(1)
    network = quantize_model(
        load_checkpoint(profile, checked_path(profile, "model.safetensors")),
        data.calibration,
        method="qat",
        training=data.train[:300],
        recipe=QatRecipe(epochs=4, batch_size=64, crop_padding=1, flip=False, precision="float32"),
        resume=folder / "qat.resume",
        verbose=False,
    )
    save_network(folder / "network.packed", network)
    (folder / "qat.resume").unlink(missing_ok=True)


@pytest.mark.slow
def test_a_killed_comparison_is_finished_by_the_same_call(choices, own_study, tmp_path, profile):
    scratch = pathlib.Path(tmp_path / "scratch")
    scratch.mkdir()
    calm = check_kills(functools.partial(compare_briefly, profile), own_study.parent, scratch, kills=max(3, KILLS // 4))
    assert calm.steps > 20


@pytest.mark.slow
def test_a_killed_training_is_finished_by_the_same_call(own_study, tmp_path, profile):
    scratch = pathlib.Path(tmp_path / "scratch")
    scratch.mkdir()
    calm = check_kills(functools.partial(train_and_save, profile), own_study.parent, scratch)
    assert calm.steps > 8
