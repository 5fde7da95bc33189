"""Checkpoints: the same training gives the same file, the digits are learned, halving precision costs little."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from book.studies import checkpoints
from book.studies.networks import fresh_model, load_checkpoint
from book.studies.study import read_facts
from emq_lib.core import training
from emq_lib.core.models import predict, top1


@pytest.fixture
def short(profile):
    return dataclasses.replace(profile, training=dataclasses.replace(profile.training, epochs=2))


@pytest.mark.slow
def test_the_same_training_gives_the_same_file(short, data, tmp_path, monkeypatch):
    contents = []
    for name in ("first", "second"):
        monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path / name))
        checkpoints.build_checkpoint(short, data)
        contents.append((tmp_path / name / short.name / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_the_digits_are_learned_and_the_card_says_so(study, profile):
    facts = read_facts(profile, "model.safetensors")
    assert facts["top1"] > 95
    history = facts["validation_top1"]
    assert history[facts["epoch"] - 1] == max(history)


@pytest.mark.parametrize(("limit", "dtype"), [(0.05, torch.float16), (-100, torch.float32)])
def test_half_precision_is_stored_where_it_costs_little(profile, data, tmp_path, monkeypatch, limit, dtype):
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path))
    monkeypatch.setattr(checkpoints, "HALF_PRECISION_COST", limit)
    model = fresh_model(profile).eval()
    checkpoints.store_checkpoint(profile, training.TrainingResult(model, 1, (10.0,), 0.0), data)
    path = tmp_path / profile.name / "model.safetensors"
    assert load_file(path)["conv1.weight"].dtype == dtype
    stored = load_checkpoint(profile, path)
    assert read_facts(profile, path.name)["top1"] == top1(predict(stored, data.test), data.test.labels)
