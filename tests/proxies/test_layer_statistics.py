"""Statistics against brute force: plain forward passes with weights replaced."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from book.studies import proxies
from book.studies.networks import layer_table, load_folded
from emq_lib.core.quantizers import fake_quantize
from emq_lib.proxies import layer_statistics, measuring, passes

NAME = "layer1.0.conv1"


@pytest.fixture
def network(study, profile):
    model = load_folded(profile, "cpu")
    layers = layer_table(model, profile)
    return model, list(layers.loc[layers["searchable"], "name"])


def test_output_error_is_that_of_the_layers_output(network, data):
    model, _ = network
    layer, seen = model.get_submodule(NAME), {}
    handle = layer.register_forward_hook(lambda _m, args, out: seen.update(x=args[0].detach(), y=out.detach()))
    images = data.calibration[:40]
    model(images.inputs())
    handle.remove()
    quantized = fake_quantize(layer.weight, 2)
    changed = F.conv2d(seen["x"], quantized, layer.bias, padding=1)
    bias = layer.bias.detach().view(1, -1, 1, 1)
    truth = (changed - seen["y"]).square().sum() / (seen["y"] - bias).square().sum()
    found = measuring.output_errors(model, {NAME: [quantized - layer.weight.detach()]}, images, batch_size=16)
    assert found[0, 0] == pytest.approx(truth.item(), rel=1e-4)


def _options(model, names):
    """Two slots, the first of two layers, at two widths each."""
    members = [names[:2], names[3:4]]
    held = [name for slot in members for name in slot]
    return members, {
        name: [fake_quantize(model.get_submodule(name).weight.detach(), bits) for bits in (2, 3)] for name in held
    }


def _logits(model, quantized, images, chosen):
    """Run the network plainly with (layer, choice) pairs quantized."""
    weights = {f"{name}.weight": quantized[name][choice] for name, choice in chosen}
    with torch.inference_mode():
        return functional_call(model, weights, (images.inputs(),)).double()


def test_logits_of_one_slot_agree_with_plain_passes_and_weights_are_restored(network, data):
    model, names = network
    images, (members, quantized) = data.calibration[:50], _options(model, names)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain, logits = passes.one_slot_logits(model, members, quantized, images, batch_size=20)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(plain, _logits(model, quantized, images, []), rtol=1e-4, atol=1e-5)
    for slot, choice in ((0, 0), (0, 1), (1, 0)):
        truth = _logits(model, quantized, images, [(name, choice) for name in members[slot]])
        torch.testing.assert_close(logits[slot, choice], truth, rtol=1e-4, atol=1e-5)
    kl, loss = passes.divergences(plain, logits), passes.loss_gains(plain, logits, images.labels)
    p, q = plain.softmax(dim=1), logits[1, 0].softmax(dim=1)
    assert kl[1, 0] == pytest.approx((p * (p / q).log()).sum(dim=1).mean().item(), rel=1e-6)
    gain = F.cross_entropy(logits[1, 0], images.labels) - F.cross_entropy(plain, images.labels)
    assert loss[1, 0] == pytest.approx(gain.item(), rel=1e-6)


def test_pair_losses_agree_with_plain_passes(network, data):
    model, names = network
    images, (members, quantized) = data.calibration[:30], _options(model, names)

    def loss(*options):
        chosen = [(name, choice) for slot, choice in options for name in members[slot]]
        return F.cross_entropy(_logits(model, quantized, images, chosen), images.labels).item()

    options = [(0, 0), (0, 1), (1, 0), (1, 1)]
    truth = np.zeros((4, 4))
    for i, one in enumerate(options):
        for j, two in enumerate(options):
            if i == j:
                truth[i, j] = loss(one) - loss()
            elif one[0] != two[0]:
                truth[i, j] = loss(one, two) - loss(one) - loss(two) + loss()
    np.testing.assert_allclose(passes.pair_losses(model, members, quantized, images), truth, atol=1e-5)


def test_logit_products_are_the_second_derivative_of_the_divergence():
    """For small changes of the logits the divergence is half the product of the change with itself."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    changes = 1e-3 * torch.randn(2, 1, 40, 5, generator=generator, dtype=torch.float64)
    products = passes.logit_products(plain, plain + changes)
    for weights in ((1, 0), (0, 1), (1, 1), (2, -1)):
        together = plain + weights[0] * changes[0, 0] + weights[1] * changes[1, 0]
        p = plain.softmax(dim=1)
        divergence = (p * (p.log() - together.log_softmax(dim=1))).sum(dim=1).mean().item()
        assert np.array(weights) @ products @ weights / 2 == pytest.approx(divergence, rel=1e-2)


def test_activation_samples_are_inputs_of_the_layer(network, data):
    model, names = network
    samples = measuring.activation_samples(model, names, data.calibration)
    assert [sample.shape[0] for sample in samples] == [8, 8, 8, 16, 16, 32]
    assert all(sample.numel() == layer_statistics.SAMPLE for sample in samples)
    assert all((sample >= 0).all() for sample in samples)  # every searchable layer comes after a ReLU


def test_a_sample_takes_the_same_columns_of_every_statistic():
    columns = layer_statistics.sampled_columns(32, 288)
    assert len(columns) == len(set(columns)) == layer_statistics.SAMPLE // 32
    x = torch.arange(3.0 * 32 * 288).view(3, 32, 288)
    torch.testing.assert_close(layer_statistics.sampled(x), x[:, :, columns])
    torch.testing.assert_close(layer_statistics.sampled(x[0]), x[0][:, columns])
    torch.testing.assert_close(layer_statistics.sampled(x[0, :8]), x[0, :8])  # small layers are kept whole
    assert len(layer_statistics.sampled_columns(10_000, 7)) == 1


def test_loaded_errors_are_those_of_the_quantizer(study, profile, network):
    statistics, (model, names) = proxies.load_statistics(profile), network
    weight = model.get_submodule(names[2]).weight.detach()
    truth = (fake_quantize(weight, 3) - weight).flatten(1)
    torch.testing.assert_close(statistics.errors[2][1], truth)
    assert statistics.kl.shape == statistics.loss.shape == statistics.output_error.shape == (6, 3)
    assert statistics.pair_losses.shape == statistics.logit_products.shape == (18, 18)


def test_layers_that_share_a_slot_are_added_up(study, profile):
    statistics = dataclasses.replace(proxies.load_statistics(profile), slots=np.array([0, 1, 1, 2, 3, 4]))
    table = np.arange(12.0).reshape(6, 2)
    assert statistics.slot_count == 5
    np.testing.assert_array_equal(statistics.per_slot(table), [[0, 1], [6, 8], [6, 7], [8, 9], [10, 11]])
