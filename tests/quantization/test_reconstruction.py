"""AdaRound against the convolution itself, every possible rounding, rounding to nearest, and whole blocks in order."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from book.studies.networks import build_network, layer_table, load_checkpoint
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.datasets import Split
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.models import predict, top1
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.quantizers import choose_activation_ranges, quantize
from emq_lib.quantization import adaround as adaround_module
from emq_lib.quantization import brecq
from emq_lib.quantization.adaround import adaround, build_adaround_bank, output_error, second_moments
from emq_lib.quantization.brecq import LAPTOP, WEIGHTS_ONLY


def _images(channels, count=6):
    generator = torch.Generator().manual_seed(8)
    images = torch.randint(0, 256, (count, channels, 9, 9), dtype=torch.uint8, generator=generator)
    return Split(images, torch.zeros(count, dtype=torch.int64), torch.full((channels,), 0.4), torch.ones(channels))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(6, 12, 3, padding=2, dilation=2, groups=3),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Sequential(nn.Flatten(), nn.Linear(6 * 81, 5)),
    ],
)
def test_the_quadratic_form_is_the_squared_change_of_the_output(layer):
    split, name = _images(6), "1" if isinstance(layer, nn.Sequential) else ""
    moments = second_moments(layer, [name], split, batch_size=4)[name]
    weight = layer.get_submodule(name).weight
    error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        before = layer(split.inputs())
        weight += error
        change = (layer(split.inputs()) - before).double()
    truth = change.square().sum() / (change.numel() / len(error))
    found = output_error(error.double().flatten(1).view(len(moments), -1, moments.shape[-1]), moments)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=0.0)


def _problem(seed, channels=4, inputs=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(channels, inputs, generator=generator), (x.relu().mT @ x.relu() / len(x))[None]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_best_of_all_roundings(seed):
    weight, moments = _problem(seed, channels=1)
    nearest = quantize(weight, 2)
    scale, zero = nearest.scale[:, None], nearest.zero_point.float()[:, None]
    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9)))
    codes = ((weight / scale).floor() + zero + ups).clamp(0, 3)
    errors = (codes - zero) * scale - weight
    every = ((errors @ moments[0]) * errors).sum(dim=1)
    rounded = (adaround(weight, 2, moments), nearest)
    found, worst = (output_error((q.dequantize() - weight)[None], moments) for q in rounded)
    assert every.min() <= found * (1 + 1e-5)
    assert found <= every.min() + 0.25 * (worst - every.min()) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_never_worse_than_rounding_to_nearest_and_one_step_away(bits):
    weight, moments = _problem(11, channels=8, inputs=18)
    nearest, found = quantize(weight, bits), adaround(weight, bits, moments)
    errors = [output_error((q.dequantize() - weight)[None], moments) for q in (found, nearest)]
    assert errors[0] <= errors[1]
    assert torch.equal(found.scale, nearest.scale)
    assert torch.equal(found.zero_point, nearest.zero_point)
    assert (found.codes.int() - nearest.codes.int()).abs().max() <= 1
    assert found.codes.max() <= 2**bits - 1
    assert torch.equal(found.codes, adaround(weight, bits, moments).codes)


def test_uncorrelated_inputs_leave_nothing_to_gain():
    """With a diagonal second moment every weight is on its own, and the nearest level is the best."""
    weight, _ = _problem(12)
    assert torch.equal(adaround(weight, 3, torch.eye(9)[None]).codes, quantize(weight, 3).codes)


@pytest.mark.slow
def test_the_bank_lifts_low_bits(own_study, profile, data, monkeypatch):
    monkeypatch.setattr(adaround_module, "ITERATIONS", 200)
    accuracy = {}
    for quantizer in ("rtn", "adaround"):
        network, _ = build_network(dataclasses.replace(profile, quantizer=quantizer), data)
        accuracy[quantizer] = top1(predict(network.select((2,) * 6), data.test), data.test.labels)
    assert accuracy["adaround"] > accuracy["rtn"] + 5


@pytest.mark.slow
def test_block_after_block_beats_the_bank_on_blocks_and_leaves_the_network_alone(study, profile, data):
    model = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
    layers = layer_table(model, profile)
    ranges = choose_activation_ranges(model, layers, data.calibration, bits=8)
    before = predict(model, data.test)

    def found(seed):
        generator = torch.Generator().manual_seed(seed)
        return brecq.reconstruct_in_order(
            model, layers, (2,) * 6, data.calibration, ranges, generator=generator, settings=WEIGHTS_ONLY
        )

    first, second = found(0), found(0)
    assert torch.equal(predict(model, data.test), before)
    assert torch.equal(predict(first, data.test), predict(second, data.test))
    nearest = QuantizedNetwork(copy.deepcopy(model), build_weight_bank(model, layers, (2,)), ranges)
    bank = QuantizedNetwork(copy.deepcopy(model), build_adaround_bank(model, layers, (2,), data.calibration), ranges)
    change = {
        name: (predict(network.select((2,) * 6), data.calibration) - predict(model, data.calibration)).square().mean()
        for name, network in (("nearest", nearest), ("bank", bank), ("blocks", first))
    }
    assert change["blocks"] < change["bank"] < change["nearest"]
    for name, layer in first.layers.items():
        nearest_codes = nearest.layers[name].weight.codes.int()
        assert (layer.weight.codes.int() - nearest_codes).abs().max() <= 1
    assert torch.equal(first.layers["conv1"].weight.codes, nearest.layers["conv1"].weight.codes)


@pytest.mark.slow
def test_learned_steps_of_activations_change_logits_less_than_the_ranges_seen(study, profile, data):
    model = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
    layers, images = layer_table(model, profile), data.calibration
    ranges = choose_activation_ranges(model, layers, images, bits=3)
    exact, lost, steps = predict(model, images), {}, {}
    for settings in (WEIGHTS_ONLY, LAPTOP):
        generator = torch.Generator().manual_seed(0)
        network = brecq.reconstruct_in_order(
            model, layers, (4,) * 6, images, ranges, generator=generator, settings=settings
        )
        lost[settings] = (predict(network, images) - exact).square().mean().item()
        steps[settings] = {name: layer.activation_range.scale for name, layer in network.layers.items()}
    assert lost[LAPTOP] < 0.9 * lost[WEIGHTS_ONLY]
    assert steps[WEIGHTS_ONLY] == {name: seen.scale for name, seen in ranges.items()}
    assert all(steps[LAPTOP][name] > 0 for name in ranges)
