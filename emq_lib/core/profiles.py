"""Profiles: the frozen description of one study, and the registry of them.

A profile is data. Adding a study is adding one entry with :func:`register`.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from emq_lib.core.checks import bit_choices, bit_width, real_number, whole_number
from emq_lib.core.errors import InfeasibleBudgetError, InvalidBitsError, InvalidParameterError, UnknownProfileError

if TYPE_CHECKING:
    import torch

DATASETS = ("digits", "cifar10", "imagenet")
QUANTIZERS = ("rtn", "adaround")
PRECISIONS = ("float32", "bfloat16")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LEAST = {
    "seed": 0,
    "validation_images": 1,
    "calibration_images": 1,
    "bench_configs": 1,
    "stratified_configs": 0,
    "one_bit_configs": 0,
}


@dataclass(frozen=True)
class TrainingRecipe:
    """How a checkpoint is trained: SGD with Nesterov momentum under a one-cycle schedule (Smith and Topin 2019).

    Args:
        epochs: passes over the training images.
        batch_size: images per step.
        max_lr: learning rate at its highest.
        momentum: of Nesterov's method, above 0 and below 1.
        weight_decay: of weights; batch norms and biases have none.
        crop_padding: largest shift of an image in pixels.
        flip: whether half of the images are mirrored.
        precision: "float32", or "bfloat16" for mixed precision.

    Raises:
        InvalidParameterError: a value outside what is said above.
    """

    epochs: int
    batch_size: int = 128
    max_lr: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int = 4
    flip: bool = True
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        """Check every value."""
        whole_number(self.epochs, "epochs", 1)
        whole_number(self.batch_size, "batch_size", 1)
        whole_number(self.crop_padding, "crop_padding", 0)
        real_number(self.max_lr, "max_lr", 0)
        real_number(self.momentum, "momentum", 0, 1)
        real_number(self.weight_decay, "weight_decay", 0, ends=True)
        if not isinstance(self.flip, bool):
            raise InvalidParameterError(f"flip must be True or False, got {self.flip!r}.")
        if self.precision not in PRECISIONS:
            raise InvalidParameterError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}.")


@dataclass(frozen=True)
class EvolutionBudget:
    """How long the evolutionary search runs, and from how many parents.

    Args:
        population: genotypes that are kept, at least 4: two parents are drawn from the better half.
        iterations: children after the first population.
        seeds: independent searches.

    Raises:
        InvalidParameterError: a number below these, or no whole one.
    """

    population: int = 50
    iterations: int = 1_000
    seeds: int = 10

    def __post_init__(self) -> None:
        """Check every number."""
        whole_number(self.population, "the population", 4)
        whole_number(self.iterations, "the number of iterations", 0)
        whole_number(self.seeds, "the number of seeds", 1)


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

    Raises:
        InvalidBitsError: a width that is no whole number from 1 to 8, or choices that do not increase.
        InfeasibleBudgetError: a budget below the smallest choice.
        InvalidParameterError: any other impossible value; every message names profile and field.
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
        """Check every field that can be checked without images and network."""
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise InvalidParameterError(
                f"The name of a profile is a folder's too: letters, digits, '.', '_', '-'; got {self.name!r:.60}."
            )
        try:
            self._check_choices()
            self._check_numbers()
        except (InvalidBitsError, InvalidParameterError, InfeasibleBudgetError) as error:
            raise type(error)(f"profile {self.name!r}: {error}") from error

    def _check_choices(self) -> None:
        """Check what is one of several, and the bit widths."""
        for field_name, known in (("quantizer", QUANTIZERS), ("dataset", DATASETS)):
            if getattr(self, field_name) not in known:
                raise InvalidParameterError(
                    f"unknown {field_name} {getattr(self, field_name)!r:.60}; known: {', '.join(known)}."
                )
        for field_name, kind in (("model", str), ("training", TrainingRecipe | None), ("evolution", EvolutionBudget)):
            if not isinstance(getattr(self, field_name), kind):
                raise InvalidParameterError(f"{field_name} cannot be {getattr(self, field_name)!r:.60}.")
        object.__setattr__(self, "choices", bit_choices(self.choices))
        bit_width(self.activation_bits, "activation_bits")
        for name, bits in _pairs(self.pinned, "pinned"):
            bit_width(bits, f"pinned layer {name!r}")
        if not all(isinstance(target, str) for _, target in _pairs(self.tied, "tied")):
            raise InvalidParameterError(f"tied layers are pairs of names, got {self.tied!r:.60}.")

    def _check_numbers(self) -> None:
        """Check seed, counts and budgets."""
        for field_name, least in _LEAST.items():
            whole_number(getattr(self, field_name), field_name, least)
        if self.bench_images is not None:
            whole_number(self.bench_images, "bench_images", 2)
        if not isinstance(self.budgets, tuple) or not self.budgets:
            raise InvalidParameterError(
                f"budgets are one or more average bits, as (2.5, 3.0); got {self.budgets!r:.60}."
            )
        if low := [budget for budget in self.budgets if real_number(budget, "a budget") < self.choices[0]]:
            raise InfeasibleBudgetError(
                f"budgets {low} lie below the smallest choice, {self.choices[0]} bits on average."
            )

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


def _pairs(value: object, what: str) -> tuple[tuple[str, object], ...]:
    """Return pairs of a layer's name and something after checking that they are."""
    paired = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
    if not paired or not all(isinstance(name, str) for name, _ in value):
        raise InvalidParameterError(f"{what} layers are pairs, as ((layer, ...), ...); got {value!r:.60}.")
    if len(dict(value)) < len(value):
        raise InvalidParameterError(f"a layer is {what} twice: {value!r:.60}.")
    return value


_REGISTRY: dict[str, Profile] = {}


def register(profile: Profile) -> Profile:
    """Add a profile to the registry (or replace the one of the same name) and return it.

    Raises:
        InvalidParameterError: it is no profile.
    """
    if not isinstance(profile, Profile):
        raise InvalidParameterError(f"register(Profile(...)) takes a profile, got {profile!r:.60}.")
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
    if not isinstance(name, str) or name not in _REGISTRY:
        known = ", ".join(sorted(profile_names()))
        raise UnknownProfileError(
            f"Unknown profile {name!r:.60}. Known profiles: {known}. Add your own: register(Profile(...))."
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
