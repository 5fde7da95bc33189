"""Every method and every file on every registered network and on random ones: nothing passed in or kept changes."""

import copy
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from emq_lib.core import quantizers
from emq_lib.core.datasets import Split
from emq_lib.core.models import MODELS
from emq_lib.quantization import adaround, brecq
from emq_lib.quantization.choose import choose_bits
from emq_lib.quantization.packed import load_network, save_network
from emq_lib.quantization.qat import QatRecipe
from emq_lib.quantization.quantize import METHODS, quantize_model
from tests.networks import RandomNetwork, networks, pictures, registered

ONCE = QatRecipe(epochs=1, batch_size=2, crop_padding=1, precision="float32", max_lr=1e-5)
LEARNING = METHODS[1:]


@pytest.fixture(scope="module", autouse=True)
def _briefly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaround, "ITERATIONS", 1)
        patch.setattr(quantizers, "choose_qparams", functools.partial(quantizers.choose_qparams, shrinks=2))
        yield


class Watched:
    """Remembers what blocks were given and what they gave, as it was then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept, run = [], brecq._apply

        def apply(piece, weights, x):
            found = run(piece, weights, x)
            self.kept += [(tensor, tensor.clone()) for tensor in (x, found)]
            return found

        monkeypatch.setattr(brecq, "_apply", apply)

    def unchanged(self) -> bool:
        """Return whether every one of them still is as it was."""
        return all(torch.equal(tensor, before) for tensor, before in self.kept)


def _labelled(images: torch.Tensor) -> Split:
    """Return images as a split, which are learned from."""
    channels, low = images.shape[1], images.amin()
    pixels = ((images - low) / (images.amax() - low) * 255).to(torch.uint8)
    return Split(pixels, torch.arange(len(images)), torch.full((channels,), 0.5), torch.full((channels,), 0.25))


def _quantize(model: nn.Module, images: torch.Tensor, method: str):
    brief = brecq.Settings(1, 1, 2)
    how = {"settings": brief, "recipe": ONCE, "training": _labelled(images), "default": 4, "verbose": False}
    return quantize_model(model, images, method=method, **how)


def _check(model: nn.Module, images: torch.Tensor, methods, path=None) -> None:
    state, before = copy.deepcopy(model.state_dict()), images.clone()
    for method in methods:
        with pytest.MonkeyPatch.context() as patch:
            watched = Watched(patch)
            found = _quantize(model, images, method)
        assert torch.equal(images, before)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        assert watched.unchanged()
        assert bool(watched.kept) == (method == "brecq")
        logits = found(images.clone())
        assert logits.isfinite().all()
        if path is not None:
            save_network(path, found)
            assert torch.equal(load_network(path, model)(images.clone()), logits)
            assert torch.equal(found(images.clone()), logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("imagenet")])
def test_registered_networks(name, tmp_path):
    model, images = registered(name)
    _check(model, images, METHODS, tmp_path / "network.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("imagenet")])
def test_registered_networks_of_imagenet(name, tmp_path):
    model, images = registered(name)
    _check(model, images, LEARNING, tmp_path / "network.safetensors")


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=networks())
def test_random_networks(model: RandomNetwork):
    _check(model, pictures(4), METHODS)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=networks())
def test_bits_of_random_networks_are_those_of_the_same_function_without_in_place_operations(model: RandomNetwork):
    """Independent truth: a copy whose activations are out of place, and whose input is normalized beforehand."""
    images = pictures(4)
    before = images.clone()
    bits = choose_bits(model, images, average_bits=2.6)
    assert torch.equal(images, before)
    assert set(bits.values()) <= {2, 3, 4}
    again = quantize_model(model, images, bits=bits, verbose=False)
    assert again(images.clone()).isfinite().all()
