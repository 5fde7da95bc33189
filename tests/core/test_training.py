"""Training: resumed equals uninterrupted, other trainings are refused, augmentation moves pixels as it says."""

import copy
import dataclasses
import pickle
import resource
import signal

import numpy as np
import pytest
import torch

from emq_lib.core import training
from emq_lib.core.datasets import ImageData, Split
from emq_lib.core.errors import CorruptArtefactError, DiskFullError, InvalidParameterError, TrainingDivergedError
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import TrainingRecipe
from tests.networks import RandomNetwork

RECIPE = TrainingRecipe(epochs=3, batch_size=16, max_lr=0.05, crop_padding=1, precision="float32")


def _data(seed=0, validation=10):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (60, 3, 10, 10), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 5, (60,), generator=generator)
    whole = Split(images, labels, torch.full((3,), 0.5), torch.full((3,), 0.25))
    train, held = whole[validation:], whole[:validation]
    return ImageData(train, held, train[:8], held, digest="0" * 64, classes=5)


def _model(seed=0):
    return RandomNetwork([("residual", "relu in place")], seed, normalizes_in_place=False)


def _train(model=None, recipe=RECIPE, data=None, *, seed=0, resume=None):
    generator = torch.Generator().manual_seed(seed)
    return training.train(model or _model(), recipe, data or _data(), generator=generator, resume=resume)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Return the resume file of a training that was stopped in its second epoch."""
    resume, epochs, run = tmp_path / "training.resume", [], training.train_epoch

    def stops(*args, **kwargs):
        if epochs:
            raise KeyboardInterrupt
        epochs.append(1)
        run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", stops)
        with pytest.raises(KeyboardInterrupt):
            _train(resume=resume)
    return resume


def test_interrupted_and_resumed_gives_the_same_weights(interrupted):
    whole, resumed = _train(), _train(resume=interrupted)
    assert resumed.validation_top1 == whole.validation_top1
    assert resumed.epoch == whole.epoch
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_an_epoch_that_is_best_is_the_one_returned():
    data = _data()
    result = _train(data=data)
    assert len(result.validation_top1) == RECIPE.epochs
    assert result.validation_top1[result.epoch - 1] == max(result.validation_top1)
    assert top1(predict(result.model, data.validation), data.validation.labels) == max(result.validation_top1)


def _other_mean():
    data = _data()
    mean = torch.full((3,), 0.4)
    return dataclasses.replace(data, train=dataclasses.replace(data.train, mean=mean))


OTHERS = {
    "images": {"data": _data(1)},
    "one label": {"data": _data(validation=9)},
    "mean": {"data": _other_mean()},
    "start": {"model": _model(1)},
    "network": {"model": RandomNetwork([("plain", "relu")], 0, normalizes_in_place=False)},
    "seed": {"seed": 1},
    **{
        name: {"recipe": dataclasses.replace(RECIPE, **{name: value})}
        for name, value in {
            "epochs": 4,
            "batch_size": 15,
            "max_lr": 0.04,
            "momentum": 0.8,
            "weight_decay": 0.0,
            "crop_padding": 2,
            "flip": False,
            "precision": "bfloat16",
        }.items()
    },
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_training_does_not_go_on_from_the_file(other, interrupted):
    before = interrupted.read_bytes()
    with pytest.raises(CorruptArtefactError, match=r"training\.resume belongs to another training"):
        _train(**OTHERS[other], resume=interrupted)
    assert interrupted.read_bytes() == before


def test_a_generator_that_has_drawn_is_another_start(interrupted):
    generator = torch.Generator().manual_seed(0)
    torch.rand(1, generator=generator)
    with pytest.raises(CorruptArtefactError, match="belongs to another training"):
        training.train(_model(), RECIPE, _data(), generator=generator, resume=interrupted)


class _Hostile:
    def __reduce__(self):
        return print, ("this ran",)


DAMAGES = {
    "empty": lambda content: b"",
    "text": lambda content: b"no state",
    "cut": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-20],
    "pickle": lambda content: pickle.dumps(_Hostile()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage, interrupted, capsys):
    interrupted.write_bytes(DAMAGES[damage](interrupted.read_bytes()))
    before = interrupted.read_bytes()
    with pytest.raises(CorruptArtefactError, match=r"training\.resume cannot be read.*Delete it"):
        _train(resume=interrupted)
    assert interrupted.read_bytes() == before
    assert "this ran" not in capsys.readouterr().out


def test_a_folder_in_its_place_is_named(tmp_path):
    with pytest.raises(CorruptArtefactError, match="cannot be read"):
        _train(resume=tmp_path)


@pytest.mark.parametrize("content", [[1, 2], None, 3, "text", {}, {"identity": "x"}, torch.zeros(3)])
def test_a_file_of_something_else_is_named(content, interrupted):
    torch.save(content, interrupted)
    with pytest.raises(CorruptArtefactError, match="is no state of a training"):
        _train(resume=interrupted)


@pytest.mark.parametrize(
    "key", ["identity", "generator", "results", "seconds", "model", "best", "optimizer", "schedule"]
)
def test_a_missing_part_is_named(key, interrupted):
    state = torch.load(interrupted, weights_only=True)
    del state[key]
    torch.save(state, interrupted)
    with pytest.raises(CorruptArtefactError, match="is no state of a training"):
        _train(resume=interrupted)


@pytest.mark.parametrize(
    ("key", "value"),
    [("generator", torch.zeros(3)), ("generator", None), ("model", {}), ("model", None), ("best", {"x": 3})]
    + [("optimizer", {}), ("optimizer", [1]), ("schedule", None), ("results", 3), ("results", ["text"])]
    + [("results", [1.0] * 9), ("results", [float("nan")]), ("seconds", "long"), ("seconds", None)]
    + [("seconds", float("inf"))],
)
def test_a_part_of_another_kind_is_named(key, value, interrupted):
    state = torch.load(interrupted, weights_only=True)
    torch.save(state | {key: value}, interrupted)
    with pytest.raises(CorruptArtefactError, match=r"training\.resume"):
        _train(resume=interrupted)


def test_a_full_disk_is_named_and_the_last_epoch_kept(interrupted):
    before, limits = interrupted.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"training\.resume"):
            _train(resume=interrupted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert interrupted.read_bytes() == before
    assert list(interrupted.parent.iterdir()) == [interrupted]
    assert len(_train(resume=interrupted).validation_top1) == RECIPE.epochs


def test_a_training_that_runs_away_is_named():
    with pytest.raises(TrainingDivergedError, match="max_lr below 1e"):
        _train(recipe=dataclasses.replace(RECIPE, max_lr=1e30))


@pytest.mark.parametrize(
    "wrong",
    [{"recipe": None}, {"recipe": {"epochs": 3}}, {"data": _data().train}, {"data": None}, {"generator": None}]
    + [{"generator": 0}, {"generator": np.random.default_rng(0)}, {"data": _data(validation=0)}]
    + [{"data": _data(validation=60)}],
)
def test_what_cannot_be_trained_with_is_refused(wrong):
    model = _model()
    before = copy.deepcopy(model.state_dict())
    given = {"recipe": RECIPE, "data": _data(), "generator": torch.Generator()} | wrong
    generator = given.pop("generator")
    with pytest.raises(InvalidParameterError):
        training.train(model, **given, generator=generator)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_training_writes_neither_to_images_nor_to_the_recipe():
    data = _data()
    before = copy.deepcopy(data)
    _train(RandomNetwork([("plain", "relu in place")], 0, normalizes_in_place=True), data=data)
    for split in ("train", "validation"):
        assert torch.equal(getattr(data, split).images, getattr(before, split).images)


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


def test_shapes_and_types_of_tensors_count():
    zeros = torch.zeros(2, 3)
    others = [zeros.T, zeros.view(6), zeros.double(), zeros.int(), zeros[:0], zeros + 1]
    assert len({training.tensors_digest(tensor) for tensor in [zeros, *others]}) == 7
    assert training.tensors_digest(torch.arange(6).view(2, 3).T) == training.tensors_digest(
        torch.tensor([[0, 3], [1, 4], [2, 5]])
    )
