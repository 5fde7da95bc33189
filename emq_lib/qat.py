"""Quantization-aware training: weights learned while they are rounded, with learned steps (LSQ; Esser et al. 2020).

Forward, every weight and every layer's input is rounded; backward, rounding passes gradients straight through, and each
step gets the gradient of its rounding. Explained in chapter 05.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.artefacts import to_json
from emq_lib.block_reconstruction import learned_step
from emq_lib.datasets import Split
from emq_lib.errors import InvalidParameterError, TrainingDivergedError
from emq_lib.profiles import TrainingRecipe
from emq_lib.quantizers import ActivationRange, QuantizedNetwork, QuantizedWeight, WeightBank, quantize
from emq_lib.training import label_loss, run_epochs, train_epoch

TEMPERATURE = 2.0  # of the softmax whose outputs are distilled


@dataclasses.dataclass(frozen=True)
class QatRecipe(TrainingRecipe):
    """How a network is trained while it is quantized: a :class:`TrainingRecipe` from a trained start, so slower.

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
            InvalidParameterError: it lies outside 0 to 1.
        """
        if not 0 <= self.distillation <= 1:
            raise InvalidParameterError(f"distillation is a share from 0 to 1, got {self.distillation}.")


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
        self.weight_steps = nn.Parameter(start.scale.clone())
        self.input_step = nn.Parameter(torch.tensor([seen.scale], device=start.scale.device))
        self._round_input = learned_step(seen, self.input_step)

    def rounded(self) -> torch.Tensor:
        """Return the rounded weight, in its shape; gradients reach the weight and the steps."""
        top, weight = 2**self.start.bits - 1, self.layer.weight
        gain = (weight[0].numel() * top) ** -0.5  # LSQ's scale of the gradient of a step
        zero_point = self.start.zero_point.float()
        return torch._fake_quantize_learnable_per_channel_affine(weight, self.weight_steps, zero_point, 0, 0, top, gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        (x,) = self._round_input(self, (x.float(),))
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.rounded(), self.layer.bias)
        how = (self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups)
        return F.conv2d(x, self.rounded(), self.layer.bias, *how)

    @torch.no_grad()
    def hardened(self) -> tuple[QuantizedWeight, ActivationRange]:
        """Return the rounded weight as codes, and the range of the input."""
        scale, start = self.weight_steps.detach().clone(), self.start
        channel = (-1,) + (1,) * (self.layer.weight.ndim - 1)
        codes = (self.layer.weight / scale.view(channel)).round() + start.zero_point.view(channel)
        weight = QuantizedWeight(codes.clamp(0, 2**start.bits - 1).to(torch.uint8), scale, start.zero_point, start.bits)
        return weight, dataclasses.replace(self.seen, scale=self.input_step.item())


def train_quantized(
    model: torch.fx.GraphModule,
    bits: Mapping[str, int],
    ranges: Mapping[str, ActivationRange],
    images: Split,
    *,
    generator: torch.Generator,
    recipe: QatRecipe,
    resume: pathlib.Path | None = None,
) -> QuantizedNetwork:
    """Train a network at its bits, starting from rounding to nearest, and return the quantized network.

    Args:
        model: network with folded batch norm; it is not changed. Folding stays, so learning rates must be small.
        bits: layer name -> width, of all layers that are quantized.
        ranges: layer name -> range of its input.
        images: training images with labels.
        generator: source of the order of images and of augmentation, on the CPU.
        recipe: how it is trained.
        resume: file that takes the state after every epoch: an interrupted training goes on from there.

    Raises:
        TrainingDivergedError: a step fell to zero or below, or is not finite; a smaller learning rate helps.
        CorruptArtefactError: the resume file is unreadable or belongs to another training.
    """
    teacher, student = copy.deepcopy(model).eval().requires_grad_(False), copy.deepcopy(model).eval()
    layers = {}
    for name, width in bits.items():
        layer = student.get_submodule(name)
        layers[name] = LearnedLayer(layer, quantize(layer.weight, width), ranges[name])
        student.set_submodule(name, layers[name])
    decayed = [layer.layer.weight for layer in layers.values()]
    known = {id(weight) for weight in decayed}
    rest = [parameter for parameter in student.parameters() if id(parameter) not in known]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=recipe.max_lr, momentum=recipe.momentum, nesterov=True)
    steps = recipe.epochs * -(-len(images) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.max_lr, total_steps=steps, cycle_momentum=False)

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
        for name, layer in layers.items():
            smallest = min(layer.weight_steps.min().item(), layer.input_step.item())
            if not smallest > 0:
                raise TrainingDivergedError(
                    f"A step of layer {name!r} is {smallest:.3g}: the training diverged. Start again with a max_lr "
                    f"below {recipe.max_lr:g}."
                )
        return 0.0

    parts = {"student": student, "optimizer": optimizer, "schedule": schedule}
    start = hashlib.blake2b(b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()))
    identity = to_json([dict(bits), dataclasses.asdict(recipe), len(images), start.hexdigest()])
    run_epochs(epoch, recipe.epochs, parts, generator=generator, identity=identity, resume=resume)
    hardened = {name: layer.hardened() for name, layer in layers.items()}
    for name, layer in layers.items():
        student.set_submodule(name, layer.layer)
    weights = {(name, width): hardened[name][0] for name, width in bits.items()}
    bank = WeightBank(tuple(sorted(set(bits.values()))), tuple(bits), tuple(range(len(bits))), (), weights)
    final = QuantizedNetwork(student, bank, {name: found for name, (_, found) in hardened.items()})
    return final.select(tuple(bits.values()))


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence of softened outputs from the wanted ones (Hinton et al. 2015).

    Args:
        logits: shape (N, classes).
        wanted: logits of the teacher, likewise.
    """
    found, target = (F.log_softmax(values / TEMPERATURE, dim=1) for values in (logits, wanted))
    return TEMPERATURE**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)
