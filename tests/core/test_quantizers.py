"""Quantizers against torch's own fake-quantize operator, brute force, and their defining properties."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from book.studies.networks import build_network, fresh_model, layer_table, load_checkpoint
from emq_lib.core import networks, quantizers
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.costs import size_cost
from emq_lib.core.errors import ConfigLengthError, InvalidBitsError, UnsupportedModelError
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.profiles import get_profile


def _weight(seed, shape=(6, 5, 3, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_agrees_with_torchs_fake_quantize(bits):
    weight = _weight(bits)
    scale, zero_point = quantizers.choose_qparams(weight, bits)
    truth = torch.fake_quantize_per_channel_affine(weight, scale, zero_point.int(), 0, 0, 2**bits - 1)
    torch.testing.assert_close(quantizers.fake_quantize(weight, bits), truth, rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(1, 8), seed=st.integers(0, 10_000), shift=st.floats(-3, 3))
def test_codes_fit_and_zero_is_exact(bits, seed, shift):
    weight = _weight(seed, (4, 9)) + shift
    weight[:, 0] = 0
    quantized = quantizers.quantize(weight, bits)
    assert int(quantized.codes.max()) < 2**bits
    assert (quantized.dequantize()[:, 0] == 0).all()
    assert len(np.unique(quantized.codes[0])) <= 2**bits


def test_range_search_finds_the_best_of_its_grid():
    weight, bits = _weight(3, (1, 200)), 3
    errors = []
    for step in range(quantizers.SHRINKS):
        low, high = (edge.item() * (1 - step / 100) for edge in weight.aminmax())
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale)
        codes = (weight / scale).round().add(zero).clamp(0, 2**bits - 1)
        errors.append((((codes - zero) * scale - weight) ** 2).sum().item())
    found = (quantizers.fake_quantize(weight, bits) - weight).square().sum().item()
    assert found == pytest.approx(min(errors), rel=1e-5)
    assert found < errors[0]


def test_error_falls_with_bits():
    weight = _weight(4)
    errors = [(quantizers.fake_quantize(weight, bits) - weight).square().sum() for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)


def test_scaling_a_channel_scales_its_quantized_weight():
    weight, factors = _weight(5), torch.tensor([0.5, 1, 2, 4, 8, 0.25]).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        quantizers.fake_quantize(weight * factors, 3), quantizers.fake_quantize(weight, 3) * factors
    )


def test_constant_and_zero_channels_survive():
    weight = torch.stack([torch.zeros(9), torch.full((9,), 0.7), torch.full((9,), -0.7)])
    torch.testing.assert_close(quantizers.fake_quantize(weight, 2), weight, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_outside_one_to_eight_are_refused(bits):
    with pytest.raises(InvalidBitsError, match="1 to 8"):
        quantizers.quantize(_weight(0), bits)


def test_selecting_from_the_bank_is_quantizing_afresh(study, profile, data):
    network, layers = build_network(profile, data)
    config = (2, 3, 4, 4, 3, 2)
    network.select(config)
    float_model = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
    widths = dict(zip(network.bank.searchable, config, strict=True)) | dict(profile.pinned)
    for name in layers["name"]:
        truth = quantizers.fake_quantize(float_model.get_submodule(name).weight, widths[name])
        assert torch.equal(network.layers[name].weight.dequantize(), truth)


def test_bad_configurations_are_refused(study, profile, data):
    network, _ = build_network(profile, data)
    with pytest.raises(ConfigLengthError, match="needs 6 bit widths"):
        network.select((2, 3))
    with pytest.raises(InvalidBitsError, match="5 bits in slot 1"):
        network.select((2, 5, 2, 2, 2, 2))


def test_activation_ranges_cover_what_calibration_shows(study, profile, data):
    model = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
    layers = layer_table(model, profile)
    ranges = quantizers.choose_activation_ranges(model, layers, data.calibration, bits=8)
    inputs = data.calibration.inputs()
    rounded = ranges["conv1"].fake_quantize(inputs)
    assert (rounded - inputs).abs().max() <= ranges["conv1"].scale * 0.51 + 1e-6
    assert all(r.zero_point == 0 for name, r in ranges.items() if name not in ("conv1",))  # inputs after a ReLU


def test_non_finite_activations_name_the_layer(study, profile, data):
    model = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
    layers = layer_table(model, profile)
    model.get_submodule("layer1.0.conv1").weight.data.fill_(torch.inf)
    with pytest.raises(UnsupportedModelError, match=r"layer1\.0\.conv2"):
        quantizers.choose_activation_ranges(model, layers, data.calibration, bits=8)


@pytest.mark.parametrize(("low", "high"), [(0.0, 3.7), (-2.4, 2.7)])
def test_activation_rounding_is_torchs_fake_quantize(low, high):
    x = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(6)) * (high - low) * 1.2 + low
    scale, zero = quantizers._affine(torch.tensor(low), torch.tensor(high), 8)
    found = quantizers.ActivationRange(scale.item(), int(zero), 8).fake_quantize(x)
    assert torch.equal(found, torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero), 0, 255))


@pytest.mark.parametrize("zero_point", [0, 117])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 16, 3, 2, 1), (5, 8, 9, 9)),
        (nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), (5, 12, 9, 9)),
        (nn.Conv2d(16, 8, 1), (5, 16, 9, 9)),
        (nn.Linear(16, 10), (5, 16)),
    ],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantized_layer_computes_exact_sums(layer, shape, zero_point, bits):
    """The truth is summed in float64, where products of these integers are exact too."""
    activation_range = quantizers.ActivationRange(0.03, zero_point, 8)
    weight = quantizers.quantize(layer.weight, bits)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        found = networks.QuantizedLayer(layer, {bits: weight}, activation_range)(x)
        codes = (x * (1 / 0.03)).round().clamp(-zero_point, 255 - zero_point)
        exact = copy.deepcopy(layer).double()
        exact.weight.data, exact.bias = weight.integers().double(), None
        channel = (-1, 1, 1) if len(shape) == 4 else (-1,)
        truth = exact(codes.double()).float() * (0.03 * weight.scale).view(channel)
        truth += 0 if layer.bias is None else layer.bias.view(channel)
    assert torch.equal(found, truth)


def test_tied_layers_take_the_bits_of_their_slot():
    profile = dataclasses.replace(get_profile("digits-resnet8"), tied=(("layer2.0.conv1", "layer1.0.conv2"),))
    model = fold_batchnorm(fresh_model(profile))
    layers = layer_table(model, profile)
    bank = build_weight_bank(model, layers, profile.choices)
    assert bank.slot_count == 5
    widths = bank.widths((2, 3, 4, 2, 3))
    assert widths["layer2.0.conv1"] == widths["layer1.0.conv2"] == 3
    assert [widths[name] for name in ("layer1.0.conv1", "layer2.0.conv2", "layer3.0.conv2")] == [2, 4, 3]
    assert size_cost(layers, profile.choices).table.shape == (5, 3)
