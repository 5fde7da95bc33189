"""All statistics of a network: in one go, on a GPU, from given streams alone, resumed, refused."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from emq_lib.core.datasets import Split
from emq_lib.core.errors import CorruptArtefactError, InvalidBitsError, InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import describe_layers, fold_batchnorm
from emq_lib.core.models import CifarResNet
from emq_lib.proxies import curvature, measuring, saliency
from emq_lib.proxies.handmade import PROXIES, score_table
from emq_lib.proxies.layer_statistics import assemble_statistics
from emq_lib.proxies.measuring import measure_statistics
from emq_lib.proxies.released import ReleasedStatistics, measure_released
from tests.devices import is_on_gpu, on_gpu, pretended_gpu
from tests.networks import RandomNetwork, networks
from tests.proxies.truth import Truth

CHOICES = (2, 3)
BLOCKS = [("residual", "relu in place"), ("depthwise", "relu6 in place")]


def _streams(_name):
    return torch.Generator().manual_seed(11)


def _images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.arange(count) % 5, mean=torch.full((3,), 0.5), std=torch.full((3,), 0.3))


def _network(blocks):
    model = fold_batchnorm(RandomNetwork(blocks, 1, normalizes_in_place=False))
    tied = {"blocks.0.conv2": "blocks.0.conv1"} if blocks is BLOCKS else {}
    return model, describe_layers(model, torch.zeros(1, 3, 8, 8), pinned={"stem": 8, "fc": 8}, tied=tied)


SMOOTH = [("attention", "gelu"), ("grouped", "gelu")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(BLOCKS, id="piecewise linear"),
        pytest.param(SMOOTH, id="smooth", marks=pytest.mark.slow),  # products with the Hessian
    ],
)
def network(request):
    return _network(request.param)


def _measure(model, layers, images, **kwargs):
    shortcuts = ("blocks.0.conv2",)
    released = measure_released(model, layers, images, choices=CHOICES, shortcuts=shortcuts, streams=_streams)
    return measure_statistics(model, layers, images, choices=CHOICES, released=released, streams=_streams, **kwargs)


@pytest.fixture(scope="module")
def images():
    return _images(66)


@pytest.fixture(scope="module")
def measured(network, images):
    return _measure(*network, images)


def _released(model, layers, images):
    return measure_released(model, layers, images, choices=CHOICES, shortcuts=(), streams=_streams)


def test_every_proxy_has_what_it_reads(network, measured):
    statistics = assemble_statistics(*network, measured[0], CHOICES, measured[1])
    for name, entry in PROXIES.items():
        assert np.isfinite(score_table(name, statistics)).all()
        assert all(statistics.seconds[key] >= 0 for key in entry.reads)


def test_measuring_changes_no_argument_and_draws_from_no_global_stream(network, images, measured):
    """With other global streams, and with those streams looked at before and after, the bytes are the same."""
    model, layers = network
    before, table = copy.deepcopy(model.state_dict()), layers.copy()
    pixels, labels = images.images.clone(), images.labels.clone()
    with torch.random.fork_rng():
        torch.manual_seed(987)
        np.random.seed(987)  # noqa: NPY002
        streams = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        again, _ = _measure(model, layers, images)
        assert torch.equal(torch.get_rng_state(), streams[0])
        assert np.array_equal(np.random.get_state()[1], streams[1])  # noqa: NPY002
    assert again.keys() == measured[0].keys()
    assert all(torch.equal(again[key], value) for key, value in measured[0].items())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(images.images, pixels)
    assert torch.equal(images.labels, labels)
    assert layers.equals(table)


@pytest.mark.slow
def test_a_gpu_computes_the_same_from_beginning_to_end(network, images, measured):
    model, layers = network
    with pretended_gpu():
        found, _ = _measure(on_gpu(model), layers, on_gpu(images))
        assert not any(map(is_on_gpu, found.values()))
        statistics = assemble_statistics(on_gpu(model), layers, found, CHOICES, {})
        assert not any(map(is_on_gpu, (*statistics.weights, *statistics.errors)))
        score_table("HAWQ-V2", statistics)
    assert all(torch.equal(found[key], value) for key, value in measured[0].items())


def test_a_pretended_gpu_has_the_rules_of_a_real_one():
    x = on_gpu(torch.ones(2, 3))
    with pretended_gpu():
        assert x.device.type == (x + 1).device.type == x.new_zeros(2).device.type == "cuda"
        assert (x * torch.tensor(2.0)).is_cuda
        assert x[torch.tensor([0])].is_cuda
        assert x.cpu().device.type == torch.ones_like(x).cpu().device.type == "cpu"
        assert torch.ones(2).to(x.device).is_cuda
        assert torch.ones(2).to(x).is_cuda
        assert torch.autograd.grad((x.requires_grad_() * 2).sum(), x)[0].is_cuda
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: x.numpy(force=False),
            lambda: torch.ones(3)[on_gpu(torch.tensor([0]))],
            lambda: torch.randn(3, generator=torch.Generator(), device=x.device),
            lambda: torch.stack([x[0], torch.ones(3)]),
        ):
            with pytest.raises((RuntimeError, TypeError), match=r"cuda"):
                wrong()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_computes_nearly_the_same(network, images, measured):
    model, layers = network
    found, _ = _measure(copy.deepcopy(model).cuda(), layers, images.to("cuda"))
    for key, value in measured[0].items():
        torch.testing.assert_close(found[key], value, rtol=2e-2, atol=1e-3 * value.double().abs().max().item())


@pytest.mark.slow
def test_what_is_finished_is_not_measured_again(images, monkeypatch):
    model, layers = _network(BLOCKS)
    released, whole, finished = _released(model, layers, images), {}, {}
    settings = {"choices": CHOICES, "released": released, "streams": _streams}
    truth, _ = measure_statistics(model, layers, images, **settings, finished=whole)

    def fails(*_args):
        raise UnsupportedModelError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "pair_losses", fails)
        with pytest.raises(UnsupportedModelError, match="stopped"):
            measure_statistics(model, layers, images, **settings, finished=finished)
    assert set(whole) - set(finished) == {"pair_losses"}
    for name in ("gradient_moments", "hessian_traces", "top_eigenvalues"):
        monkeypatch.setattr(curvature, name, fails)
    found, seconds = measure_statistics(model, layers, images, **settings, finished=finished)
    assert all(torch.equal(found[key], value) for key, value in truth.items())
    assert seconds["trace"] == finished["trace"].seconds


def test_synflow_of_deep_networks_is_finite_where_float32_is_not():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fold_batchnorm(CifarResNet(56, width=4).eval())
    names = ["layer1.0.conv1", "layer3.8.conv2"]
    found = saliency.positive_gradients(model, names, (3, 8, 8))
    assert max(g.max().item() for g in found) > torch.finfo(torch.float32).max
    np.testing.assert_allclose(
        saliency.synflow(model, names, (3, 8, 8)),
        [(model.get_submodule(n).weight.flatten(1) * g).abs().sum().item() for n, g in zip(names, found, strict=True)],
    )
    with torch.no_grad():
        model.get_submodule(names[0]).weight.mul_(1e30)
        for stage in (1, 2, 3):
            for block in range(9):
                model.get_submodule(f"layer{stage}.{block}.conv2").weight.mul_(1e10)
    with pytest.raises(UnsupportedModelError, match="too large for double precision"):
        saliency.synflow(model, names, (3, 8, 8))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(model=networks())
@example(model=RandomNetwork([("plain", "relu"), ("preactivated", "relu in place")], 0, False))
def test_random_networks_as_they_stand(model):
    """In-place activations, shortcuts and normalizations, not traced: gradients are those of plain autograd."""
    images = _images(3)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    pixels, truth = images.images.clone(), Truth(model, names, images, in_place=True)
    try:
        assert truth.gradients
    except RuntimeError:  # an operation in place on what autograd has kept, as in ReLU(x).relu_()
        for statistic in (functools.partial(curvature.gradient_moments, batch_size=2), saliency.channel_products):
            with pytest.raises(UnsupportedModelError, match="take what fold_batchnorm returns"):
                statistic(model, names, images)
        assert torch.equal(images.images, pixels)
        return
    first, second = curvature.gradient_moments(model, names, images, batch_size=2)
    assert torch.equal(images.images, pixels)
    for layer, gradients in enumerate(truth.gradients):
        scale = gradients.abs().max().item()
        torch.testing.assert_close(first[layer], gradients.mean(dim=0), rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(second[layer], gradients.square().mean(dim=0), rtol=1e-3, atol=1e-4 * scale**2)
    for found, product in zip(saliency.channel_products(model, names, images), truth.products, strict=True):
        torch.testing.assert_close(found, product, rtol=1e-3, atol=1e-4 * product.abs().max().item() + 1e-9)


@pytest.mark.parametrize("part", ["eigenvalue", "similarity", "pair_losses"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parts_that_are_not_finite_are_named(part, value, images, monkeypatch):
    model, layers = _network(BLOCKS)
    names = list(layers.loc[layers["searchable"], "name"])
    broken = np.ones(len(names))
    broken[1] = value
    monkeypatch.setitem(measuring._PARTS, part, lambda _visit: {part: broken})
    cheap = {key: measuring.Part({}, 0.0) for key in measuring._PARTS if key != part}
    settings = {"choices": CHOICES, "released": _any_released(), "streams": _streams}
    with pytest.raises(UnsupportedModelError, match=rf"{part} is NaN or infinite at '{names[1]}'"):
        measure_statistics(model, layers, images, **settings, finished=cheap)


def _any_released():
    one = np.ones(1)
    arrays = {field.name: one for field in dataclasses.fields(ReleasedStatistics)}
    return ReleasedStatistics(**arrays | {"seconds": 0.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: Split(s.images, torch.zeros_like(s.labels), s.mean, s.std), "of one class"),
        (lambda s: Split(s.images, s.labels + 1, s.mean, s.std), "label 5 is none of the network's 5 classes"),
        (lambda s: s[:40], "two minibatches of 32 images, got 40"),
        (lambda s: s.to("meta"), "the network is on cpu, the images on meta"),
    ],
)
def test_images_that_say_nothing_are_named(change, message, images):
    model, layers = _network(BLOCKS)
    settings = {"choices": CHOICES, "released": _any_released(), "streams": _streams}
    with pytest.raises(InvalidParameterError, match=message):
        measure_statistics(model, layers, change(images), **settings)


@pytest.mark.parametrize("choices", [(2, 9), (0, 2), (2.5, 3), ("2", 3), (True, 2)])
def test_widths_that_are_none(choices, images):
    model, layers = _network(BLOCKS)
    with pytest.raises(InvalidBitsError):
        measure_statistics(model, layers, images, choices=choices, released=_any_released(), streams=_streams)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("trace"), "lack 'trace'"),
        (lambda s: s.pop("saliency ZiCo"), "lack 'saliency ZiCo'"),
        (lambda s: s.pop("released snip"), "lack 'released snip'"),
        (lambda s: s.pop("gradients/blocks.0.conv1"), "lack 'gradients/blocks.0.conv1'"),
        (lambda s: s.update({"trace": s["trace"][:-1]}), "'trace' has shape"),
        (lambda s: s.update({"kl": s["kl"].T}), "'kl' has shape"),
        (lambda s: s.update({"pair_losses": s["pair_losses"][:2]}), "'pair_losses' has shape"),
        (lambda s: s.update({"activations/blocks.0.conv1": torch.ones(3)}), "'activations/blocks.0.conv1' has shape"),
        (lambda s: s.update({"loss": s["loss"] * torch.nan}), "'loss' holds NaN"),
        (lambda s: s["curvature/blocks.1.conv1"].fill_(torch.inf), "'curvature/blocks.1.conv1' holds NaN"),
    ],
)
def test_stored_statistics_that_were_altered_are_named(change, message, stored):
    model, layers = _network(BLOCKS)
    altered = {key: value.clone() for key, value in stored.items()}
    change(altered)
    with pytest.raises(CorruptArtefactError, match=message):
        assemble_statistics(model, layers, altered, CHOICES, {})


@pytest.fixture(scope="module")
def stored(images):
    return _measure(*_network(BLOCKS), images)[0]


def test_released_statistics_leave_the_network_as_it_is(images):
    model, layers = _network(BLOCKS)
    before = copy.deepcopy(model.state_dict())
    one, two = (_released(model, layers, images) for _ in range(2))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for field in dataclasses.fields(ReleasedStatistics):
        if field.name != "seconds":
            assert np.array_equal(getattr(one, field.name), getattr(two, field.name))
