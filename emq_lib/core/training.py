"""The training loop behind the checkpoints."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from emq_lib.core.datasets import ImageData, Split
from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.files import atomic_path
from emq_lib.core.models import build_model, predict, top1
from emq_lib.core.profiles import Profile, TrainingRecipe


class Stateful(Protocol):
    """What has a state that can be saved and restored: a network, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Take a state."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained network, the epoch it is from (counted from 1), validation top-1 by epoch, and the wall time."""

    model: nn.Module
    epoch: int
    validation_top1: tuple[float, ...]
    seconds: float


def train(profile: Profile, data: ImageData, *, resume: pathlib.Path | None = None) -> TrainingResult:
    """Train the profile's network and return the weights of the epoch that is best on the validation images.

    The test images are not looked at. Explained in chapter 01.

    Args:
        profile: names the network, the recipe and the seed.
        data: the splits; `train` is learned from, `validation` chooses the epoch.
        resume: file that takes the state after every epoch. If it exists, training goes on from there; it is removed
            when training is complete.

    Raises:
        CorruptArtefactError: the resume file is unreadable or belongs to another profile.
    """
    recipe, steps = profile.training, -(-len(data.train) // profile.training.batch_size)
    model, generator = build_model(profile).to(data.train.images.device), profile.generator("training")
    best = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe.weight_decay), lr=recipe.max_lr, momentum=recipe.momentum, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.max_lr, total_steps=recipe.epochs * steps, cycle_momentum=False
    )

    def epoch(history: Sequence[float]) -> float:
        train_epoch(model.train(), data.train, recipe, optimizer, schedule, loss=label_loss, generator=generator)
        found = top1(predict(model.eval(), data.validation), data.validation.labels)
        if found >= max(history, default=0.0):
            best.load_state_dict(model.state_dict())
        return found

    parts = {"model": model, "best": best, "optimizer": optimizer, "schedule": schedule}
    history, seconds = run_epochs(
        epoch, recipe.epochs, parts, generator=generator, identity=_identity(profile), resume=resume
    )
    chosen = len(history) - history[::-1].index(max(history))
    return TrainingResult(best.eval(), chosen, tuple(history), seconds)


def run_epochs(
    epoch: Callable[[Sequence[float]], float],
    epochs: int,
    parts: Mapping[str, Stateful],
    *,
    generator: torch.Generator,
    identity: str,
    resume: pathlib.Path | None,
) -> tuple[list[float], float]:
    """Run epochs of training that may be interrupted.

    Args:
        epoch: the results of the epochs before -> the result of one more.
        epochs: how many there are to be.
        parts: name -> what changes: networks, optimizer, schedule.
        generator: source of randomness.
        identity: everything that the training depends on, as text.
        resume: file that takes the state after every epoch. If it exists, training goes on from there; it is removed
            when training is complete.

    Returns:
        the results of all epochs, and the wall time in seconds, earlier runs included.

    Raises:
        CorruptArtefactError: the resume file is unreadable or belongs to another training.
    """
    results, seconds = [], 0.0
    if resume is not None and resume.exists():
        state = _load_resume(resume, identity)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        results, seconds = state["results"], state["seconds"]
    among_others = multiprocessing.parent_process() is not None  # whose bars would be mixed up
    for _ in tqdm(range(len(results), epochs), initial=len(results), total=epochs, desc="epochs", disable=among_others):
        started = time.perf_counter()
        results.append(epoch(results))
        seconds += time.perf_counter() - started
        if resume is not None:
            facts = {"identity": identity, "generator": generator.get_state(), "results": results, "seconds": seconds}
            with atomic_path(resume) as path:
                torch.save({name: part.state_dict() for name, part in parts.items()} | facts, path)
    if resume is not None:
        resume.unlink(missing_ok=True)
    return results, seconds


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay weights; leave batch norms and biases alone."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _identity(profile: Profile) -> str:
    """Everything in the profile that training depends on."""
    return repr((profile.dataset, profile.model, profile.training, profile.seed, profile.validation_images))


def _load_resume(path: pathlib.Path, identity: str) -> dict:
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise CorruptArtefactError(f"{path} cannot be read ({error}). Delete it to train from the start.") from error
    if state.get("identity") != identity:
        raise CorruptArtefactError(f"{path} belongs to another training. Delete it to start afresh.")
    return state


def label_loss(_inputs: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits (N, classes) and labels (N,)."""
    return F.cross_entropy(logits, labels)


def train_epoch(
    model: nn.Module,
    split: Split,
    recipe: TrainingRecipe,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    generator: torch.Generator,
) -> None:
    """Pass once over the training images in random order, augmented.

    Args:
        model: the network, in the mode it is to be trained in.
        split: the images.
        recipe: batch size, augmentation and precision.
        optimizer: steps after every batch.
        schedule: steps after every batch.
        loss: inputs, float32 logits and labels of a batch -> what is minimized.
        generator: source of the order and of augmentation, on the CPU.
    """
    device = split.images.device
    low_precision = recipe.precision == "bfloat16"
    for indices in torch.randperm(len(split), generator=generator).split(recipe.batch_size):
        batch = augment(split[indices.to(device)], padding=recipe.crop_padding, flip=recipe.flip, generator=generator)
        context = torch.autocast(device.type, torch.bfloat16) if low_precision else contextlib.nullcontext()
        inputs = batch.inputs()
        with context:
            found = loss(inputs, model(inputs).float(), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        optimizer.step()
        schedule.step()


def augment(split: Split, *, padding: int, flip: bool, generator: torch.Generator) -> Split:
    """Return randomly shifted (zero padding, then crop) and mirrored copies of a batch of images.

    Args:
        split: the batch; its labels are kept.
        padding: largest shift in pixels.
        flip: whether half of the images are mirrored.
        generator: source of randomness, on the CPU.
    """
    images = split.images
    count, _, height, width = images.shape
    rows, columns = (
        torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)[:, :, None]
        + torch.arange(max(height, width), device=images.device)
    ).unbind()
    columns = columns[:, :width]
    if flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    index = torch.arange(count, device=images.device)[:, None, None]
    shifted = padded[index, rows[:, :height, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return Split(shifted, split.labels, split.mean, split.std)
