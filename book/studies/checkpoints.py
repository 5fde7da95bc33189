"""The checkpoint of a study: trained or fetched once, then stored."""

from __future__ import annotations

import pathlib

from book.studies.files import MODEL
from book.studies.networks import fresh_model, load_pretrained
from book.studies.study import save_tensors, sole_writer
from emq_lib.core.datasets import ImageData
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import Profile
from emq_lib.core.training import TrainingResult, train

HALF_PRECISION_COST = 0.05  # points of validation top-1 that storing half precision may cost


def build_checkpoint(profile: Profile, data: ImageData) -> None:
    """Train the profile's network, or take its published weights, and store it: see :func:`store_checkpoint`.

    Interrupted at any moment, the same call goes on from the last finished epoch.
    """
    if profile.training is None:
        published = load_pretrained(profile).to(data.test.images.device)
        store_checkpoint(profile, TrainingResult(published, 0, (), 0.0), data)
    else:
        with sole_writer(profile) as folder:
            store_checkpoint(profile, train_fresh(profile, data, resume=folder / "training.resume"), data)
            (folder / "training.resume").unlink(missing_ok=True)


def train_fresh(profile: Profile, data: ImageData, *, resume: pathlib.Path | None = None) -> TrainingResult:
    """Train the profile's network from its fresh weights by its recipe: see :func:`emq_lib.core.training.train`."""
    generator = profile.generator("training")
    return train(fresh_model(profile), profile.training, data, generator=generator, resume=resume)


def store_checkpoint(profile: Profile, result: TrainingResult, data: ImageData) -> None:
    """Write ``model.safetensors``: in half precision, if that costs little on the validation images.

    What is stored is then measured once on the test images. Facts in the file: the epoch, the validation accuracy of
    every epoch, and the test accuracy.
    """
    exact = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in exact.items()}
    before = top1(predict(result.model, data.validation), data.validation.labels)
    result.model.load_state_dict(halves)
    lost = before - top1(predict(result.model, data.validation), data.validation.labels)
    stored = halves if lost < HALF_PRECISION_COST else exact
    result.model.load_state_dict(stored)
    facts = {
        "epoch": result.epoch,
        "validation_top1": result.validation_top1,
        "top1": top1(predict(result.model, data.test), data.test.labels),
        "images": data.digest,
    }
    schedule = (
        "published by torchvision"
        if profile.training is None
        else f"one-cycle schedule of {profile.training.epochs} epochs, the best on the validation images kept"
    )
    precision = "half" if stored is halves else "single"
    note = f"{schedule}; stored in {precision} precision (half costs {lost:.2f} points on the validation images)"
    save_tensors(profile, MODEL, stored, facts, seconds=result.seconds, note=note)
