"""The training loop behind the checkpoints."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import math
import multiprocessing
import pathlib
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from emq_lib.core.datasets import ImageData, Split
from emq_lib.core.errors import CorruptArtefactError, InvalidParameterError, TrainingDivergedError
from emq_lib.core.files import write_bytes
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import TrainingRecipe
from emq_lib.core.sources import code_hash

_UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
_UNREADABLE += (pickle.UnpicklingError,)


class Stateful(Protocol):
    """What has a state that can be saved and restored: a network, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """Take a state."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training gives.

    Attributes:
        model: the network of the best epoch, in evaluation mode.
        epoch: the one that it is from, counted from 1; 0: it was not trained here.
        validation_top1: percent of the validation images, by epoch.
        seconds: wall time.
    """

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
        InvalidParameterError: another kind of argument, or no images.
        CorruptArtefactError: the resume file is unreadable, or belongs to another training: other images, another
            start, seed or recipe.
        DiskFullError, UnwritablePathError: the resume file cannot be written.
        TrainingDivergedError: a weight is not finite; a smaller learning rate helps.
    """
    _check(recipe, data, generator)
    steps, model = -(-len(data.train) // recipe.batch_size), model.to(data.train.images.device)
    images = [tensor for split in (data.train, data.validation) for tensor in vars(split).values()]
    seen = tensors_digest(generator.get_state(), *images)
    identity = repr((recipe, seen, state_digest(model), code_hash("emq_lib.core.training:train")))
    best = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe.weight_decay), lr=recipe.max_lr, momentum=recipe.momentum, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.max_lr, total_steps=recipe.epochs * steps, cycle_momentum=False
    )

    def epoch(history: Sequence[float]) -> float:
        train_epoch(model.train(), data.train, recipe, optimizer, schedule, loss=label_loss, generator=generator)
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise TrainingDivergedError(
                f"The weights hold NaN or infinity: the training diverged. Start again with a max_lr below "
                f"{recipe.max_lr:g}."
            )
        found = top1(predict(model.eval(), data.validation), data.validation.labels)
        if found >= max(history, default=0.0):
            best.load_state_dict(model.state_dict())
        return found

    parts = {"model": model, "best": best, "optimizer": optimizer, "schedule": schedule}
    history, seconds = run_epochs(epoch, recipe.epochs, parts, generator=generator, identity=identity, resume=resume)
    chosen = len(history) - history[::-1].index(max(history))
    return TrainingResult(best.eval(), chosen, tuple(history), seconds)


def _check(recipe: TrainingRecipe, data: ImageData, generator: torch.Generator) -> None:
    """Check the arguments of :func:`train`. Raises InvalidParameterError as said there."""
    for value, kind in ((recipe, TrainingRecipe), (data, ImageData), (generator, torch.Generator)):
        if not isinstance(value, kind):
            raise InvalidParameterError(f"Training needs a {kind.__name__}, got {value!r:.60}.")
    if generator.device.type != "cpu":
        raise InvalidParameterError(f"The generator must be on the CPU, not on {generator.device}.")
    if not len(data.train) or not len(data.validation):
        raise InvalidParameterError(
            f"{len(data.train)} training and {len(data.validation)} validation images: give some."
        )


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
        DiskFullError, UnwritablePathError: the resume file cannot be written.
    """
    results, seconds = [], 0.0
    if resume is not None and resume.exists():
        results, seconds = _resumed(resume, identity, epochs, parts, generator=generator)
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
    """Return a hash of a network's parameters and buffers, and of their names."""
    state = model.state_dict()
    return hashlib.blake2b((repr(list(state)) + tensors_digest(*state.values())).encode(), digest_size=12).hexdigest()


def tensors_digest(*tensors: torch.Tensor) -> str:
    """Return a hash of types, shapes and values."""
    digest = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _resumed(
    path: pathlib.Path,
    identity: str,
    epochs: int,
    parts: Mapping[str, Stateful],
    *,
    generator: torch.Generator,
) -> tuple[list[float], float]:
    """Restore the state of an interrupted training. Returns the results of its epochs and the seconds they took.

    Raises:
        CorruptArtefactError: the file is unreadable, is none of a training, or belongs to another one.
    """
    again = "Delete it to train from the start."
    try:
        state = torch.load(io.BytesIO(path.read_bytes()), weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        raise CorruptArtefactError(f"{path} cannot be read ({str(error):.200}). {again}") from error
    needed = {"identity", "generator", "results", "seconds", *parts}
    if not isinstance(state, dict) or not needed <= set(state):
        raise CorruptArtefactError(f"{path} is no state of a training. {again}")
    if state["identity"] != identity:
        raise CorruptArtefactError(
            f"{path} belongs to another training: other images, another start, seed or recipe. {again}"
        )
    try:
        results, seconds = [float(result) for result in state["results"]], float(state["seconds"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
    except _UNREADABLE as error:
        raise CorruptArtefactError(f"{path} is no state of this training ({str(error):.200}). {again}") from error
    if len(results) > epochs or not all(map(math.isfinite, (*results, seconds))):
        raise CorruptArtefactError(f"{path} has {len(results)} results of {epochs} epochs, or no numbers. {again}")
    return results, seconds


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
