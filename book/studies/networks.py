"""The networks of a study: fresh, trained, folded, quantized; and their layer table."""

from __future__ import annotations

import pathlib

import pandas as pd
import torch
from torch import nn

from book.studies.roundings import KeptRoundings
from book.studies.study import checked_path
from emq_lib.core import quantizers
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.datasets import ImageData
from emq_lib.core.errors import DatasetMismatchError, UnsupportedModelError
from emq_lib.core.graphs import describe_layers, fold_batchnorm
from emq_lib.core.models import INPUT_SHAPES, build_model, load_weights
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.profiles import Profile
from emq_lib.quantization import adaround


def layer_table(model: nn.Module, profile: Profile) -> pd.DataFrame:
    """Return one row per quantizable layer of a study's network: see :func:`describe_layers`.

    Args:
        model: the network, batch norm folded (so that biases are what the packed file holds).
        profile: gives the input shape, the pinned and the tied layers.

    Raises:
        UnsupportedModelError: see :func:`describe_layers`; the message names the profile.
    """
    reference = next(model.parameters())
    example = torch.zeros(1, *INPUT_SHAPES[profile.dataset], device=reference.device)
    try:
        return describe_layers(model, example, pinned=dict(profile.pinned), tied=dict(profile.tied))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"profile {profile.name!r}: {error}") from error


def load_pretrained(profile: Profile) -> nn.Module:
    """Return an ImageNet profile's network with torchvision's first published weights, which torchvision downloads."""
    from torchvision.models import get_model_weights

    model = fresh_model(profile)
    weights = get_model_weights(profile.model.removeprefix("imagenet-"))["IMAGENET1K_V1"]
    model.load_state_dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    return model.eval()


def fresh_model(profile: Profile) -> nn.Module:
    """Return the profile's network with fresh random weights, drawn from the profile's seed."""
    return build_model(profile.model, seed=profile.seed_of("init"))


def load_checkpoint(profile: Profile, path: pathlib.Path) -> nn.Module:
    """Return the profile's trained network in evaluation mode.

    Raises:
        CorruptArtefactError: the file is truncated, or holds other tensors than the network's.
    """
    return load_weights(fresh_model(profile), path)


def load_folded(profile: Profile, device: torch.device | str) -> torch.fx.GraphModule:
    """Return the study's float network with folded batch norm, from the checkpoint in the study's folder."""
    return fold_batchnorm(load_checkpoint(profile, checked_path(profile, "model.safetensors"))).to(device)


def build_network(
    profile: Profile, data: ImageData, *, folder: pathlib.Path | None = None
) -> tuple[QuantizedNetwork, pd.DataFrame]:
    """Return the study's quantized network and its layer table, from the checkpoint in the study's folder.

    Args:
        profile: the study.
        data: its images.
        folder: where learned roundings are kept, layer by layer, by who writes the study: see
            :mod:`book.studies.roundings`.

    Raises:
        DatasetMismatchError: the images have another number of classes than the network.
        UnsupportedModelError: a layer sees NaN or infinity, or cannot be quantized.
    """
    model = load_folded(profile, data.test.images.device)
    layers = layer_table(model, profile)
    if data.classes != layers["channels"].iloc[-1]:
        raise DatasetMismatchError(
            f"The images have {data.classes} classes, but the checkpoint of {profile.name!r} tells "
            f"{layers['channels'].iloc[-1]} apart. Check the class folders."
        )
    if profile.quantizer == "adaround":
        kept = None if folder is None else KeptRoundings(folder, model, data.calibration)
        bank = adaround.build_adaround_bank(model, layers, profile.choices, data.calibration, finished=kept)
    else:
        bank = build_weight_bank(model, layers, profile.choices)
    ranges = quantizers.choose_activation_ranges(model, layers, data.calibration, bits=profile.activation_bits)
    return QuantizedNetwork(model, bank, ranges), layers
