"""Quantization-aware training: weights learned while they are rounded, with learned steps (LSQ; Esser et al. 2020).

Forward, every weight and every layer's input is rounded; backward, rounding passes gradients straight through, and each
step gets the gradient of its rounding. Steps are learned by their logarithms, so they stay positive. Explained in
chapter 05.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.bank import build_weight_bank
from emq_lib.core.checks import bit_width, real_number
from emq_lib.core.datasets import Split
from emq_lib.core.errors import TrainingDivergedError
from emq_lib.core.files import to_json
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.profiles import TrainingRecipe
from emq_lib.core.quantizers import ActivationRange, QuantizedWeight
from emq_lib.core.sources import code_hash
from emq_lib.core.training import label_loss, run_epochs, state_digest, tensors_digest, train_epoch
from emq_lib.quantization.brecq import learned_step
from emq_lib.quantization.prepare import check_generator, check_labels, check_layers

STEP_RATE = 10.0  # learning rate of the logarithms of steps, in that of the weights
TEMPERATURE = 2.0  # of the softmax whose outputs are distilled


@dataclasses.dataclass(frozen=True)
class QatRecipe(TrainingRecipe):
    """How a network is trained while it is quantized: by Adam from a trained start, so with small steps.

    Attributes:
        distillation: share of the loss that is the divergence from the float network's outputs, 0 to 1; the rest is
            the cross-entropy with the labels. At 1 labels are not used.
    """

    epochs: int = 10
    max_lr: float = 1e-3
    weight_decay: float = 1e-4
    distillation: float = 0.5

    def __post_init__(self) -> None:
        """Check the share.

        Raises:
            InvalidParameterError: it lies outside 0 to 1, or see :class:`emq_lib.core.profiles.TrainingRecipe`.
        """
        super().__post_init__()
        real_number(self.distillation, "distillation", 0, 1, ends=True)

    @classmethod
    def like(cls, recipe: TrainingRecipe, epochs: int) -> QatRecipe:
        """Return a recipe with the batches, the augmentation and the precision of the one that trained the network."""
        names = ("batch_size", "crop_padding", "flip", "precision")
        return cls(epochs=epochs, **{name: getattr(recipe, name) for name in names})


QAT = QatRecipe()


class LearnedLayer(nn.Module):
    """A convolution or a linear layer whose weight and input are rounded with steps that are learned.

    Args:
        layer: the float layer; its weight and bias are where training starts.
        start: its weight rounded to nearest: where the steps start, and the zero points, which stay.
        seen: range of its input, likewise.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, start: QuantizedWeight, seen: ActivationRange) -> None:
        super().__init__()
        self.start, self.seen, self.layer = start, seen, copy.deepcopy(layer).requires_grad_()
        self.log_weight_steps = nn.Parameter(start.scale.log())
        self.log_input_step = nn.Parameter(torch.tensor([seen.scale], device=start.scale.device).log())

    def rounded(self) -> torch.Tensor:
        """Return the rounded weight, in its shape; gradients reach the weight and the steps."""
        top, zero_point = 2**self.start.bits - 1, self.start.zero_point.float()
        return torch._fake_quantize_learnable_per_channel_affine(
            self.layer.weight, self.log_weight_steps.exp(), zero_point, 0, 0, top, 1.0
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        (x,) = learned_step(self.seen, self.log_input_step.exp())(self, (x.float(),))
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.rounded(), self.layer.bias)
        return self.layer._conv_forward(x, self.rounded(), self.layer.bias)  # pads as the layer does

    @torch.no_grad()
    def hardened(self) -> tuple[QuantizedWeight, ActivationRange]:
        """Return the rounded weight as codes, and the range of the input."""
        scale, start = self.log_weight_steps.exp(), self.start
        channel = (-1,) + (1,) * (self.layer.weight.ndim - 1)
        codes = (self.layer.weight / scale.view(channel)).round() + start.zero_point.view(channel)
        weight = QuantizedWeight(codes.clamp(0, 2**start.bits - 1).to(torch.uint8), scale, start.zero_point, start.bits)
        return weight, dataclasses.replace(self.seen, scale=self.log_input_step.exp().item())


def train_quantized(
    model: torch.fx.GraphModule,
    layers: pd.DataFrame,
    config: Sequence[int],
    images: Split,
    ranges: Mapping[str, ActivationRange],
    *,
    generator: torch.Generator,
    recipe: QatRecipe,
    resume: pathlib.Path | None = None,
) -> QuantizedNetwork:
    """Train one configuration, starting from rounding to nearest, and return its quantized network.

    Args:
        model: network with folded batch norm; it is not changed. Folding stays, so learning rates must be small.
        layers: its layer table.
        config: bits, S of them.
        images: training images with labels; they stay as they are.
        ranges: layer name -> range of its input.
        generator: source of the order of images and of augmentation, on the CPU.
        recipe: how it is trained.
        resume: file that takes the state after every epoch: an interrupted training goes on from there. Whoever stores
            the network removes it; until then the same call returns the same network at once.

    Raises:
        TrainingDivergedError: a weight or a step is not finite; a smaller learning rate helps.
        CorruptArtefactError: the resume file is unreadable, or belongs to another training: of other images, ranges,
            weights, bits, another recipe, generator or version of the code.
        InvalidBitsError, ConfigLengthError: the configuration is none of this network's.
        InvalidParameterError: no images, or with NaN; labels outside the classes; a layer without a range; no
            generator.
        UnsupportedModelError: see :func:`emq_lib.quantization.prepare.check_layers`.
        DiskFullError, UnwritablePathError: the resume file cannot be written.
    """
    check_layers(model, layers, ranges)
    check_generator(generator)
    check_labels(model, images)
    teacher, student = copy.deepcopy(model).eval().requires_grad_(False), copy.deepcopy(model).eval()
    bank = build_weight_bank(model, layers, sorted({bit_width(bits, "config") for bits in config}))
    learned = {}
    for name, start in bank.select(config).items():
        learned[name] = LearnedLayer(student.get_submodule(name), start, ranges[name])
        student.set_submodule(name, learned[name])
    weights = [layer.layer.weight for layer in learned.values()]
    steps = [step for layer in learned.values() for step in (layer.log_weight_steps, layer.log_input_step)]
    known = {id(parameter) for parameter in (*weights, *steps)}
    rest = [parameter for parameter in student.parameters() if id(parameter) not in known]
    rates = [recipe.max_lr, recipe.max_lr, STEP_RATE * recipe.max_lr]
    decays = [recipe.weight_decay, 0.0, 0.0]
    groups = [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for parameters, rate, decay in zip((weights, rest, steps), rates, decays, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(recipe.momentum, 0.999))
    batches = recipe.epochs * -(-len(images) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=batches, cycle_momentum=False)

    def loss(inputs: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        share = recipe.distillation
        found = (1 - share) * label_loss(inputs, logits, labels)
        if share == 0:
            return found
        with torch.no_grad():
            wanted = teacher(inputs).float()
        return found + share * divergence(logits, wanted)

    def epoch(_before: object) -> float:
        train_epoch(student, images, recipe, optimizer, schedule, loss=loss, generator=generator)
        for name, layer in learned.items():
            if not all(parameter.isfinite().all() for parameter in layer.parameters()):
                raise TrainingDivergedError(
                    f"Layer {name!r} holds NaN or infinity: the training diverged. Start again with a max_lr below "
                    f"{recipe.max_lr:g}."
                )
        return 0.0

    parts = {"student": student, "optimizer": optimizer, "schedule": schedule}
    identity = _identity(model, bank.widths(config), images, ranges, generator=generator, recipe=recipe)
    run_epochs(epoch, recipe.epochs, parts, generator=generator, identity=identity, resume=resume)
    weights, found = dict(bank.weights), {}
    for name, layer in learned.items():
        weights[name, layer.start.bits], found[name] = layer.hardened()
        student.set_submodule(name, layer.layer)
    return QuantizedNetwork(student, dataclasses.replace(bank, weights=weights), found).select(config)


def _identity(
    model: nn.Module,
    widths: Mapping[str, int],
    images: Split,
    ranges: Mapping[str, ActivationRange],
    *,
    generator: torch.Generator,
    recipe: QatRecipe,
) -> str:
    """Return everything that a training depends on, as text."""
    tensors = (images.images, images.labels, images.mean, images.std, generator.get_state())
    start = [state_digest(model), hashlib.blake2b(repr(model).encode()).hexdigest()]
    inputs = {name: dataclasses.astuple(ranges[name]) for name in widths}
    code = code_hash("emq_lib.quantization.qat:train_quantized")
    return to_json([dict(widths), dataclasses.asdict(recipe), tensors_digest(*tensors), start, inputs, code])


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence of softened outputs from the wanted ones (Hinton et al. 2015).

    Args:
        logits: shape (N, classes).
        wanted: logits of the teacher, likewise.
    """
    found, target = (F.log_softmax(values / TEMPERATURE, dim=1) for values in (logits, wanted))
    return TEMPERATURE**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)
