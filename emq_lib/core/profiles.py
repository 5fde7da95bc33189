"""Profiles: the frozen description of one study, and the registry of them.

A profile is data. Adding a study is adding one entry with :func:`register`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from emq_lib.core.errors import InvalidBitsError, InvalidParameterError, UnknownProfileError

if TYPE_CHECKING:
    import torch

QUANTIZERS = ("rtn", "adaround")


@dataclass(frozen=True)
class TrainingRecipe:
    """How a checkpoint is trained: SGD with Nesterov momentum under a one-cycle schedule."""

    epochs: int
    batch_size: int = 128
    max_lr: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int = 4
    flip: bool = True
    precision: str = "bfloat16"


@dataclass(frozen=True)
class EvolutionBudget:
    """How long the evolutionary search runs, and from how many parents."""

    population: int = 50
    iterations: int = 1_000
    seeds: int = 10


@dataclass(frozen=True)
class Profile:
    """One study: a network, its images, the bits it may use, and what is spent on it.

    Args:
        name: key in the registry and folder under ``data/``.
        dataset: ``"digits"``, ``"cifar10"`` or ``"imagenet"`` (see :mod:`emq_lib.core.datasets`).
        model: name of the network (see :mod:`emq_lib.core.models`).
        training: recipe of the float checkpoint; None: published weights.
        choices: bit widths that a searchable layer may take.
        pinned: (layer name, bits) of the layers outside the search.
        tied: (layer name, layer that it takes its bits from), e.g. a shortcut's convolution.
        activation_bits: width of every quantized layer's input.
        quantizer: how weights are rounded: ``"rtn"`` to nearest, ``"adaround"`` so that outputs change least.
        seed: root of every random stream of the study.
        validation_images: training images set aside to choose the epoch.
        calibration_images: training images that statistics and ranges may see.
        bench_configs: distinct random configurations in the bench, uniform ones not counted.
        stratified_configs: configurations in the bench that are spread evenly in size.
        one_bit_configs: configurations with one to three layers at 1 bit, in the bench of learned rounding only: for
            studies where it leaves no more spread than the test images have noise.
        bench_images: test images that the bench is measured on, the first ones in canonical order; None: all.
        budgets: average bits at which configurations are allocated.
        evolution: budget of the evolutionary search.
    """

    name: str
    dataset: str
    model: str
    training: TrainingRecipe | None
    choices: tuple[int, ...] = (2, 3, 4)
    pinned: tuple[tuple[str, int], ...] = (("conv1", 8), ("fc", 8))
    tied: tuple[tuple[str, str], ...] = ()
    activation_bits: int = 8
    quantizer: str = "rtn"
    seed: int = 0
    validation_images: int = 5_000
    calibration_images: int = 1_024
    bench_configs: int = 425
    stratified_configs: int = 213
    one_bit_configs: int = 0
    bench_images: int | None = None
    budgets: tuple[float, ...] = (2.25, 2.5, 2.75, 3.0, 3.5)
    evolution: EvolutionBudget = field(default_factory=EvolutionBudget)

    def __post_init__(self) -> None:
        """Check the bit widths and the quantizer.

        Raises:
            InvalidBitsError: a width outside 1 to 8, or choices that are not increasing.
            InvalidParameterError: no such quantizer.
        """
        if self.quantizer not in QUANTIZERS:
            raise InvalidParameterError(
                f"profile {self.name!r}: unknown quantizer {self.quantizer!r}; known: {', '.join(QUANTIZERS)}."
            )
        widths = (*self.choices, *(bits for _, bits in self.pinned), self.activation_bits)
        if not self.choices or any(not 1 <= bits <= 8 for bits in widths):
            raise InvalidBitsError(f"profile {self.name!r}: bit widths must lie in 1 to 8, got {widths}.")
        if list(self.choices) != sorted(set(self.choices)):
            raise InvalidBitsError(f"profile {self.name!r}: choices must increase, got {self.choices}.")

    def rng(self, stage: str) -> np.random.Generator:
        """Return the random stream of one stage, independent of every other stage's.

        >>> profile = get_profile("digits-resnet8")
        >>> bool(profile.rng("bench").random() == profile.rng("bench").random())
        True
        """
        return np.random.default_rng([self.seed, zlib.crc32(stage.encode())])

    def generator(self, stage: str) -> torch.Generator:
        """Return the same stream as a torch generator on the CPU."""
        import torch  # what only reads tables needs none

        return torch.Generator().manual_seed(self.seed_of(stage))

    def seed_of(self, stage: str) -> int:
        """Return a seed drawn from the stage's stream, for what takes no generator."""
        return int(self.rng(stage).integers(2**62))


_REGISTRY: dict[str, Profile] = {}


def register(profile: Profile) -> Profile:
    """Add a profile to the registry (or replace the one of the same name) and return it."""
    _REGISTRY[profile.name] = profile
    return profile


def profile_names() -> tuple[str, ...]:
    """Return the names of all registered profiles, in the order of registration."""
    return tuple(_REGISTRY)


def get_profile(name: str) -> Profile:
    """Return the profile of that name.

    Raises:
        UnknownProfileError: no such profile; the message lists those there are.
    """
    if name not in _REGISTRY:
        known = ", ".join(sorted(profile_names()))
        raise UnknownProfileError(
            f"Unknown profile {name!r}. Known profiles: {known}. Add your own: register(Profile(...))."
        )
    return _REGISTRY[name]


def is_published(profile: Profile) -> bool:
    """Return whether a profile has the seed of the registered one of its name, or is not registered at all."""
    return profile.name not in _REGISTRY or _REGISTRY[profile.name].seed == profile.seed


register(
    Profile(
        name="digits-resnet8",
        dataset="digits",
        model="resnet8",
        training=TrainingRecipe(epochs=12, batch_size=64, max_lr=0.2, crop_padding=1, flip=False, precision="float32"),
        validation_images=198,
        calibration_images=256,
        bench_configs=240,
        stratified_configs=120,
        one_bit_configs=120,
        evolution=EvolutionBudget(population=20, iterations=150),
    )
)
register(
    Profile(
        name="cifar10-resnet20",
        dataset="cifar10",
        model="resnet20",
        training=TrainingRecipe(epochs=40, max_lr=0.2),
        bench_configs=1_000,
        stratified_configs=500,
    )
)
register(
    Profile(
        name="cifar10-resnet18",
        dataset="cifar10",
        model="resnet18-half",
        training=TrainingRecipe(epochs=20, max_lr=0.2),
        pinned=(),
        tied=tuple((f"layer{stage}.0.downsample.0", f"layer{stage}.0.conv2") for stage in (2, 3, 4)),
        one_bit_configs=213,
        bench_images=2_000,
    )
)
register(
    Profile(
        name="cifar10-mobilenetv2",
        dataset="cifar10",
        model="mobilenetv2-half",
        training=TrainingRecipe(epochs=12, max_lr=0.2, weight_decay=1e-4),
        pinned=(("features.0.0", 8), ("classifier.1", 8)),
        one_bit_configs=213,
        bench_images=2_000,
    )
)
register(
    Profile(
        name="cifar10-vit-tiny",
        dataset="cifar10",
        model="vit-tiny",
        training=TrainingRecipe(epochs=40, max_lr=0.05, weight_decay=1e-4),
        pinned=(("patches", 8), ("head", 8)),
        one_bit_configs=213,
        bench_images=2_000,
    )
)
for _name, _first, _last in (
    ("resnet18", "conv1", "fc"),
    ("resnet50", "conv1", "fc"),
    ("mobilenet_v2", "features.0.0", "classifier.1"),
):
    register(
        Profile(
            name=f"imagenet-{_name.replace('_', '')}",
            dataset="imagenet",
            model=f"imagenet-{_name}",
            training=None,
            pinned=((_first, 8), (_last, 8)),
        )
    )
