"""Training: resumed equals uninterrupted, augmentation moves pixels as it says, the digits are learned."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from book.studies import checkpoints
from book.studies.networks import fresh_model, load_checkpoint
from book.studies.study import read_facts
from emq_lib.core import training
from emq_lib.core.datasets import Split
from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.models import predict, top1


@pytest.fixture
def short(profile):
    return dataclasses.replace(profile, training=dataclasses.replace(profile.training, epochs=3))


def test_interrupted_and_resumed_gives_the_same_weights(short, data, tmp_path, monkeypatch):
    whole = training.train(short, data)
    resume, epochs, run = tmp_path / "training.resume", [], training.train_epoch

    def stops(*args, **kwargs):
        if epochs:
            raise KeyboardInterrupt
        epochs.append(1)
        run(*args, **kwargs)

    monkeypatch.setattr(training, "train_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        training.train(short, data, resume=resume)
    monkeypatch.setattr(training, "train_epoch", run)
    resumed = training.train(short, data, resume=resume)
    assert resumed.validation_top1 == whole.validation_top1
    assert not resume.exists()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_foreign_or_damaged_resume_file_is_refused(short, data, tmp_path):
    resume = tmp_path / "training.resume"
    torch.save({"identity": "another"}, resume)
    with pytest.raises(CorruptArtefactError, match="belongs to another"):
        training.train(short, data, resume=resume)
    resume.write_bytes(resume.read_bytes()[:100])
    with pytest.raises(CorruptArtefactError, match="cannot be read"):
        training.train(short, data, resume=resume)


def test_augmentation_shifts_mirrors_and_pads_with_zeros():
    images = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(64, 1, 5, 5)
    split = Split(images, torch.arange(64), torch.zeros(1), torch.ones(1))
    out = training.augment(split, padding=1, flip=True, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    shifts = [padded[r : r + 5, c : c + 5] for r in range(3) for c in range(3)]
    allowed = {tuple(v.flatten().tolist()) for shift in shifts for v in (shift, shift.flip(1))}
    found = {tuple(image.flatten().tolist()) for image in out.images}
    assert found <= allowed
    assert len(found) > 9
    assert torch.equal(out.labels, split.labels)


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
