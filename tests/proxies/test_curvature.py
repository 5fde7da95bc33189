"""Curvature against brute force: one image at a time, dense Hessians, and curvlinops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

from book.studies.networks import layer_table, load_checkpoint
from emq_lib.core.datasets import Split
from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.proxies import curvature

NAME = "layer1.0.conv1"


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def network(study, profile):
    model = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
    layers = layer_table(model, profile)
    return model, list(layers.loc[layers["searchable"], "name"])


class Attention(nn.Module):
    """A network that is not piecewise linear, with tokens in its linear layers and a grouped convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 4, 4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc1, self.fc2, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.grouped(F.gelu(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.fc2(F.gelu(self.fc1(x))).mean(dim=1))


@pytest.fixture
def smooth():
    images = torch.randint(0, 256, (6, 1, 8, 8), generator=_generator(1), dtype=torch.uint8)
    split = Split(images, torch.tensor([0, 1, 2, 0, 1, 2]), mean=torch.tensor([0.5]), std=torch.tensor([0.3]))
    return torch.fx.symbolic_trace(Attention().eval()), ["conv", "grouped", "fc1", "fc2", "head"], split


def _loss(model, name, images):
    def loss(weight):
        return F.cross_entropy(functional_call(model, {f"{name}.weight": weight}, (images.inputs(),)), images.labels)

    return loss


def _dense(model, name, images):
    weight = model.get_submodule(name).weight.detach()
    return hessian(_loss(model, name, images))(weight).reshape(weight.numel(), weight.numel()).double()


def test_moments_agree_with_one_image_at_a_time(network, data):
    _compare_moments(*network, data.calibration[:7])


def test_moments_of_grouped_and_token_layers(smooth):
    _compare_moments(*smooth)


def _compare_moments(model, names, images):
    weights = [model.get_submodule(name).weight for name in names]
    single = [
        torch.autograd.grad(F.cross_entropy(model(images[i : i + 1].inputs()), images.labels[i : i + 1]), weights)
        for i in range(len(images))
    ]
    first, second = curvature.gradient_moments(model, names, images, batch_size=3)
    for layer in range(len(names)):
        stack = torch.stack([gradients[layer].flatten(1) for gradients in single])
        torch.testing.assert_close(first[layer], stack.mean(dim=0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(second[layer], stack.square().mean(dim=0), rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_trace_is_that_of_the_dense_hessian(network, data):
    model, _ = network
    dense = _dense(model, NAME, data.calibration[:5])
    trace, error = curvature.hessian_traces(
        model, [NAME], data.calibration[:5], combinations=None, generator=_generator(), batch_size=2
    )
    assert trace[0] == pytest.approx(dense.trace().item(), rel=1e-3)
    assert error[0] > 0


@pytest.mark.slow
def test_standard_error_of_the_trace_is_that_of_the_mean(network, data):
    model, _ = network

    def traces(images):
        return curvature.hessian_traces(model, [NAME], images, combinations=None, generator=_generator())

    pairs = [traces(data.calibration[i : i + 2])[0][0] for i in (0, 2, 4)]
    trace, error = traces(data.calibration[:6])
    assert trace[0] == pytest.approx(np.mean(pairs), rel=1e-5)
    alone = [_dense(model, NAME, data.calibration[i : i + 1]).trace().item() for i in range(6)]
    assert error[0] == pytest.approx(np.std(alone, ddof=1) / 6**0.5, rel=1e-2)


@pytest.mark.slow
def test_random_combinations_of_classes_have_the_same_mean(network, data):
    model, names = network
    exact, _ = curvature.hessian_traces(model, names, data.calibration[:32], combinations=None, generator=_generator())
    generator = _generator()
    drawn, _ = curvature.hessian_traces(model, names, data.calibration[:32], combinations=200, generator=generator)
    np.testing.assert_allclose(drawn, exact, rtol=0.1)
    few, error = curvature.hessian_traces(model, names, data.calibration, generator=generator)
    all_classes, least = curvature.hessian_traces(
        model, names, data.calibration, combinations=None, generator=generator
    )
    assert (np.abs(few - all_classes) < 2 * error).all()
    assert 0.6 < np.median(error / least) < 1.6


@pytest.mark.slow
def test_networks_that_bend_get_hessian_vector_products(smooth):
    """The mean over many probes is the trace of the dense Hessian, within four of its standard errors."""
    model, names, images = smooth
    truth = np.array([_dense(model, name, images).trace().item() for name in names])
    generator = _generator()
    trace, _ = curvature.hutchinson_traces(model, names, images, probes=400, generator=generator)
    spread = [
        np.sqrt(2 * ((h := _dense(model, name, images)).square().sum() - h.diagonal().square().sum()).item() / 400)
        for name in names
    ]
    assert (np.abs(trace - truth) < 4 * np.array(spread) + 1e-6).all()
    few, error = curvature.hessian_traces(model, names, images, generator=generator, batch_size=2)
    assert np.isfinite(few).all()
    assert (error > 0).all()


def test_standard_error_of_probes_is_that_of_batch_means(smooth):
    model, names, images = smooth
    trace, error = curvature.hutchinson_traces(model, names, images, probes=3, generator=_generator(5), batch_size=2)
    generator = _generator(5)
    alone = [
        curvature.hutchinson_traces(model, names, images[i : i + 2], probes=3, generator=generator)[0]
        for i in (0, 2, 4)
    ]
    np.testing.assert_allclose(trace, np.mean(alone, axis=0), rtol=1e-5)
    np.testing.assert_allclose(error, np.std(alone, axis=0, ddof=1) / 3**0.5, rtol=1e-4)


@pytest.mark.slow
def test_traces_agree_with_curvlinops(network, data):
    from curvlinops import HessianLinearOperator

    model, names = network
    images = data.calibration[:16]
    weight = model.get_submodule(names[1]).weight
    batches = [(images.inputs(), images.labels)]
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), [weight], batches, check_deterministic=False)
    columns = operator @ torch.eye(weight.numel())
    trace, _ = curvature.hessian_traces(model, [names[1]], images, combinations=None, generator=_generator())
    assert trace[0] == pytest.approx(columns.diagonal().sum().item(), rel=1e-3)


@pytest.mark.slow
def test_top_eigenvalue_is_that_of_the_dense_hessian(network, data, monkeypatch):
    model, names = network
    images = data.calibration[:12]
    truth = [torch.linalg.eigvalsh(_dense(model, name, images))[-1].item() for name in names[:2]]
    np.testing.assert_allclose(curvature.top_eigenvalues(model, names, images, batch_size=5)[:2], truth, rtol=1e-3)
    monkeypatch.setattr(curvature, "ROW_BYTES", 1)  # one layer at a time
    np.testing.assert_allclose(curvature.top_eigenvalues(model, names[:2], images), truth, rtol=1e-3)


def test_top_eigenvalue_of_a_network_that_bends(smooth):
    model, names, images = smooth
    truth = [torch.linalg.eigvalsh(_dense(model, name, images))[-1].item() for name in names]
    np.testing.assert_allclose(curvature.top_eigenvalues(model, names, images), truth, rtol=1e-2)


def test_frozen_layers_are_named(smooth):
    model, names, images = smooth
    model.fc1.weight.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"\['fc1'\] are frozen"):
        curvature.hutchinson_traces(model, names, images, generator=_generator())
    first, _ = curvature.gradient_moments(model, names, images)  # needs no gradient of the weights themselves
    assert first[2].abs().sum() > 0


def test_blocks_without_curvature_have_trace_and_eigenvalue_zero():
    """Labels aside, constant logits leave nothing to bend; ARPACK itself has no answer for a zero matrix."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.flatten(1)) * 0

    images = _blank(4)
    for model in (Constant().eval(), torch.fx.symbolic_trace(Constant().eval())):
        assert curvature.top_eigenvalues(model, ["layer"], images) == [0.0]
        trace, _ = curvature.hessian_traces(model, ["layer"], images, generator=_generator())
        assert trace == [0.0]


def test_a_layer_of_one_weight_has_its_second_derivative():
    class One(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.conv, self.head, self.function = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(4, 3), function

        def forward(self, x):
            return self.head(self.function(self.conv(x)).flatten(1))

    generator = _generator()
    pixels = torch.randint(0, 256, (3, 1, 2, 2), generator=generator, dtype=torch.uint8)
    images = Split(pixels, torch.tensor([0, 1, 2]), mean=torch.zeros(1), std=torch.ones(1))
    for function in (F.relu, F.gelu):
        model = torch.fx.symbolic_trace(One(function).eval())
        with torch.no_grad():
            model.conv.weight.fill_(0.7)
        truth = _dense(model, "conv", images).item()
        assert curvature.top_eigenvalues(model, ["conv"], images)[0] == pytest.approx(truth, rel=1e-4)
        single = curvature.top_eigenvalues(model, ["conv"], images[:1])[0]
        assert single == pytest.approx(_dense(model, "conv", images[:1]).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "padding"), [("zeros", "same"), ("reflect", 1), ("circular", (1, 2)), ("replicate", "valid")]
)
def test_moments_of_convolutions_that_pad_otherwise(mode, padding):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        conv = nn.Conv2d(1, 4, 3, padding=padding, padding_mode=mode)
        model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    pixels = torch.randint(0, 256, (4, 1, 6, 6), generator=_generator(), dtype=torch.uint8)
    images = Split(pixels, torch.tensor([0, 1, 2, 0]), mean=torch.zeros(1), std=torch.ones(1))
    _compare_moments(model.eval(), ["0", "4"], images)


def _blank(count):
    pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    return Split(pixels, torch.arange(count) % 3, mean=torch.zeros(1), std=torch.ones(1))


def test_a_layer_without_effect_is_named():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x.flatten(1)) + 0 * self.unused(x.flatten(1)).detach()

    with pytest.raises(UnsupportedModelError, match="'unused'"):
        curvature.gradient_moments(Dead().eval(), ["used", "unused"], _blank(2))
