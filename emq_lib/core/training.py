"""The training loop behind the checkpoints."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import multiprocessing
import pathlib
import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from emq_lib.core.datasets import ImageData, Split
from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.files import write_bytes
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import TrainingRecipe


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


def train(
    model: nn.Module,
    recipe: TrainingRecipe,
    data: ImageData,
    *,
    generator: torch.Generator,
    resume: pathlib.Path | None = None,
) -> TrainingResult:
    """Train a network and return the weights of the epoch that is best on the validation images.

    The test images are not looked at. Explained in chapter 01.

    Args:
        model: the network with the weights to start from; it is changed.
        recipe: how long, in which steps, with which augmentation.
        data: the splits; `train` is learned from, `validation` chooses the epoch.
        generator: source of the order of images and of augmentation, on the CPU.
        resume: file that takes the state after every epoch. If it exists, training goes on from there; whoever stores
            the result removes it.

    Raises:
        CorruptArtefactError: the resume file is unreadable or belongs to another profile.
    """
    steps, model = -(-len(data.train) // recipe.batch_size), model.to(data.train.images.device)
    identity = repr((recipe, generator.initial_seed(), data.digest, len(data.train), state_digest(model)))
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
    history, seconds = run_epochs(epoch, recipe.epochs, parts, generator=generator, identity=identity, resume=resume)
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
        resume: file that takes the state after every epoch. If it exists, training goes on from there; whoever stores
            the result removes it.

    Returns:
        the results of all epochs, and the wall time in seconds, earlier runs included.

    Raises:
        CorruptArtefactError: the resume file is unreadable or belongs to another training.
    """
    results, seconds = [], 0.0
    if resume is not None and resume.exists():
        state = _load_resume(resume, identity, parts)
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
            buffer = io.BytesIO()  # a full disk is then an error of the file, which is named
            torch.save({name: part.state_dict() for name, part in parts.items()} | facts, buffer)
            write_bytes(resume, buffer.getvalue())
    return results, seconds


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay weights; leave batch norms and biases alone."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def state_digest(model: nn.Module) -> str:
    """Return a hash of a network's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_resume(path: pathlib.Path, identity: str, parts: Iterable[str]) -> dict:
    """Return the state of an interrupted training.

    Raises:
        CorruptArtefactError: the file is unreadable, is none of a training, or belongs to another one.
    """
    try:
        state = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CorruptArtefactError(f"{path} cannot be read ({error}). Delete it to train from the start.") from error
    needed = {"identity", "generator", "results", "seconds", *parts}
    if not isinstance(state, dict) or not needed <= set(state):
        raise CorruptArtefactError(f"{path} is no state of a training. Delete it to train from the start.")
    if state["identity"] != identity:
        raise CorruptArtefactError(
            f"{path} belongs to another training: other images, another start, seed or recipe. Delete it to start "
            "afresh."
        )
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
