"""Learned rounding against every rounding there is, error feedback written out, and single steps tried one by one."""

import itertools

import pytest
import torch
from torch import nn

from book.studies.networks import layer_table, load_folded
from emq_lib.core import graphs
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.datasets import Inputs
from emq_lib.core.errors import InvalidBitsError, InvalidParameterError, UnsupportedModelError
from emq_lib.core.models import predict
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.quantizers import choose_activation_ranges, fake_quantize, quantize
from emq_lib.quantization import learned, sequential
from emq_lib.quantization.adaround import _patches, second_moments
from emq_lib.quantization.learned import build_learned_bank, learn_weight
from emq_lib.quantization.moments import patches, sampled_moments
from emq_lib.quantization.sequential import round_in_order


def problem(seed, channels=4, inputs=9, groups=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 400, inputs, generator=generator) @ torch.randn(groups, inputs, inputs, generator=generator)
    moments = x.relu().mT @ x.relu() / x.shape[1]
    return torch.randn(channels * groups, inputs, generator=generator), moments.double()


def damped(moments):
    inputs = moments.shape[-1]
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    return moments + learned.DAMPING * mean[:, None, None] * torch.eye(inputs, dtype=torch.float64)


def errors_of(weights, target, moments):
    """Return E (M + damping) E' of every channel, one after another."""
    of_group = len(target) // len(moments)
    rows = (weights.double() - target.double()).flatten(1)
    return torch.stack([row @ damped(moments)[i // of_group] @ row for i, row in enumerate(rows)])


def exactly(grid, codes):
    """Return what codes stand for, in double precision."""
    return (codes.double() - grid.zero_point[:, None].double()) * grid.scale[:, None].double()


def test_close_to_the_best_of_all_levels():
    """Of all 4^6 roundings of a channel, each with the scale that suits it best."""
    gaps, every = [], torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float64)
    for seed in range(6):
        weight, moments = problem(seed, channels=5, inputs=6)
        nearest, (found,) = quantize(weight, 2), learn_weight(weight, (2,), moments)
        for channel, row in enumerate(weight.double()):
            levels = every - nearest.zero_point[channel].double()
            seen = levels @ damped(moments)[0]
            scale = (seen @ row / (seen * levels).sum(dim=1)).nan_to_num(1.0).clamp(min=1e-9)
            error = levels * scale[:, None] - row
            best = ((error @ damped(moments)[0]) * error).sum(dim=1).min()
            ours, worst = (errors_of(q.dequantize(), weight, moments)[channel] for q in (found, nearest))
            assert best <= ours * (1 + 1e-5)
            gaps.append(((ours - best) / (worst - best)).item())
    assert sum(gaps) / len(gaps) < 0.1


@pytest.mark.parametrize(("groups", "bits"), [(1, 2), (1, 3), (3, 4), (1, 8), (2, 1)])
def test_no_step_of_a_single_weight_is_left_and_none_is_worse_than_nearest(groups, bits):
    weight, moments = problem(11, channels=4, inputs=18, groups=groups)
    nearest, (found,) = quantize(weight, bits), learn_weight(weight, (bits,), moments)
    before, after = (errors_of(exactly(q, q.codes), weight, moments) for q in (nearest, found))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum()
    assert found.codes.max() <= 2**bits - 1
    assert torch.equal(found.zero_point, nearest.zero_point)
    assert (found.scale > 0).all()
    for place in range(18):
        for level in range(2**bits):
            codes = found.codes.clone()
            codes[:, place] = level
            assert (errors_of(exactly(found, codes), weight, moments) >= after * (1 - 1e-6) - 1e-12).all()


def test_error_feedback_is_that_of_the_inverse_of_what_is_left():
    """OBQ's step, whose inverse is computed anew for the inputs that are not rounded yet."""
    weight, moments = problem(5, channels=3, inputs=12)
    nearest = quantize(weight, 3)
    scale, low = nearest.scale[None].double(), -nearest.zero_point[None].double()
    found = learned._feedback(weight[None].double(), scale, low, low + 7, damped(moments))
    left, truth = weight.double().clone(), torch.zeros(3, 12, dtype=torch.float64)
    waiting = damped(moments)[0].diagonal().argsort(descending=True, stable=True).tolist()
    while waiting:
        first, rest = waiting[0], torch.tensor(waiting)
        inverse = torch.linalg.inv(damped(moments)[0][rest][:, rest])
        truth[:, first] = torch.minimum(torch.maximum((left[:, first] / scale[0]).round(), low[0]), low[0] + 7)
        error = left[:, first] - truth[:, first] * scale[0]
        left[:, rest] -= error[:, None] / inverse[0, 0] * inverse[0]
        waiting.pop(0)
    assert torch.equal(found[0], truth)


def test_widths_together_are_widths_alone_and_groups_are_layers_of_their_own():
    weight, moments = problem(7, channels=4, inputs=10, groups=3)
    together = learn_weight(weight, (2, 3, 4), moments)
    for found, bits in zip(together, (2, 3, 4), strict=True):
        (alone,) = learn_weight(weight, (bits,), moments)
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.scale, alone.scale)
        parts = [learn_weight(weight[4 * g : 4 * g + 4], (bits,), moments[g : g + 1])[0] for g in range(3)]
        assert torch.equal(found.codes, torch.cat([part.codes for part in parts]))


def test_uncorrelated_inputs_leave_the_scale_alone_to_learn():
    """With a diagonal second moment no error makes up for another: levels are the nearest on the scale found."""
    weight, _ = problem(12)
    (found,) = learn_weight(weight, (3,), torch.eye(9, dtype=torch.float64)[None])
    zero = found.zero_point[:, None].float()
    levels = (weight / found.scale[:, None]).round().add(zero).clamp(0, 7)
    assert torch.equal(found.codes.float(), levels)
    worst = (fake_quantize(weight, 3) - weight).square().sum()
    assert (found.dequantize() - weight).square().sum() <= worst


@pytest.mark.parametrize("weight", [torch.zeros(3, 9), torch.full((3, 9), 1e-9), torch.full((3, 9), 1e6)])
@pytest.mark.parametrize("power", [0.0, 1e-20, 1e20])
def test_layers_that_are_zero_or_see_nothing_are_rounded_too(weight, power):
    for found in learn_weight(weight, (1, 2, 8), problem(1)[1] * power):
        assert found.dequantize().isfinite().all()
        assert (found.scale > 0).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(6, 12, (3, 2), padding=(2, 1), dilation=(2, 1), groups=3),
        nn.Conv2d(6, 6, 3, groups=6, stride=(1, 2)),
        nn.Linear(9, 5),
    ],
)
def test_scattered_patches_are_some_of_all(layer):
    x = torch.randn(3, 6, 9, 9, generator=torch.Generator().manual_seed(2))
    every, some = _patches(layer, x), patches(layer, x, 5)
    total = every.shape[-1] // 3
    assert some.shape == (*every.shape[:2], 15)
    for image in range(3):
        of_image = every[..., total * image : total * (image + 1)].flatten(0, 1)
        places = [
            (of_image == column[:, None]).all(dim=0).nonzero() for column in some.flatten(0, 1).mT[5 * image :][:5]
        ]
        assert len({int(place[0]) for place in places}) == 5
    assert torch.equal(patches(layer, x, total), every)


def test_a_bank_of_all_patches_is_that_of_a_sample_as_large(data, study, profile):
    model, layers = _digits(profile)
    few = data.calibration[:16]
    names = list(layers["name"])
    every, sampled = second_moments(model, names, few), sampled_moments(model, names, few)
    for name in names:
        torch.testing.assert_close(every[name], sampled[name], rtol=1e-4, atol=1e-4 * every[name].abs().max().item())


def _digits(profile):
    model = load_folded(profile, "cpu")
    return model, layer_table(model, profile)


@pytest.mark.slow
def test_each_way_is_more_accurate_than_the_one_before_at_two_bits(study, data, profile):
    found = {}
    for name in ("nearest", "learned", "in order"):
        model, layers = _digits(profile)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        ranges = choose_activation_ranges(model, layers, data.calibration, bits=8)
        if name == "in order":
            network = round_in_order(model, layers, (2,) * 6, data.calibration, ranges)
            assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        else:
            build = build_weight_bank if name == "nearest" else build_learned_bank
            more = () if name == "nearest" else (data.calibration,)
            network = QuantizedNetwork(model, build(model, layers, (2,), *more), ranges).select((2,) * 6)
        exact = predict(_digits(profile)[0], data.test)
        found[name] = (predict(network, data.test) - exact).square().mean().item()
    assert found["in order"] < found["learned"] < found["nearest"] / 2


def test_what_a_layer_is_rounded_towards_has_the_least_error(monkeypatch):
    """The derivative of ||W x - T x^||^2 + ridge ||T - W||^2, by autograd, is zero at the target."""
    generator = torch.Generator().manual_seed(4)
    layer = nn.Linear(7, 3)
    exact = torch.randn(500, 7, generator=generator)
    changed = exact + 0.3 * torch.randn(500, 7, generator=generator)
    given = {}
    monkeypatch.setattr(
        sequential, "learn_weight", lambda weight, widths, moments, target: given.update(target=target) or [None]
    )
    seen = choose_activation_ranges(nn.Sequential(layer), _one_layer(), Inputs(changed), bits=8)["0"]
    sequential._rounded(layer, 3, [(exact, changed)], seen, 500)
    target = given["target"].clone().requires_grad_()
    x, y, weight = exact.double(), seen.fake_quantize(changed).double(), layer.weight.detach().double()
    ridge = sequential.RIDGE * y.square().mean()
    loss = (x @ weight.mT - y @ target.double().mT).square().sum(dim=1).mean() + ridge * (
        target - weight
    ).square().sum()
    (slope,) = torch.autograd.grad(loss, target)
    assert slope.abs().max() < 1e-4 * weight.abs().max()


def _one_layer():
    return graphs.describe_layers(nn.Sequential(nn.Linear(7, 3)), torch.zeros(1, 7), pinned={}, tied={})


@pytest.mark.parametrize(
    "build", [build_learned_bank, lambda m, table, choices, x: round_in_order(m, table, choices, x, {})]
)
def test_bad_input_is_named(build, data, study, profile):
    model, layers = _digits(profile)
    with pytest.raises((InvalidBitsError, InvalidParameterError)):
        build(model, layers, (0, 9), data.calibration)
    with pytest.raises(InvalidParameterError, match="range|one or more"):
        build(model, layers, (2, 3), data.calibration[:0])
    with pytest.raises((UnsupportedModelError, InvalidParameterError)):
        build(nn.Sequential(nn.ReLU()), layers, (2, 3), data.calibration)
