"""Statistics against brute force: one image at a time, a dense Hessian, plain forward passes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.func import functional_call, hessian

from emq_lib import layer_statistics as ls
from emq_lib.artefacts import record, save_tensors
from emq_lib.errors import CorruptArtefactError
from emq_lib.quantizers import fake_quantize

NAME = "layer1.0.conv1"


@pytest.fixture
def network(study, profile):
    model, layers = ls._load_folded(profile)
    return model, list(layers.loc[layers["searchable"], "name"])


def test_moments_agree_with_one_image_at_a_time(network, data):
    model, names = network
    images = data.calibration[:7]
    weights = [model.get_submodule(name).weight for name in names]
    single = [
        torch.autograd.grad(F.cross_entropy(model(images[i : i + 1].inputs()), images.labels[i : i + 1]), weights)
        for i in range(7)
    ]
    first, second = ls.gradient_moments(model, names, images, batch_size=3)
    for layer in range(len(names)):
        stack = torch.stack([gradients[layer].flatten(1) for gradients in single])
        torch.testing.assert_close(first[layer], stack.mean(dim=0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(second[layer], stack.square().mean(dim=0), rtol=1e-4, atol=1e-9)


def test_trace_is_that_of_the_dense_hessian(network, data):
    model, _ = network
    images = data.calibration[:5]
    weight = model.get_submodule(NAME).weight.detach()

    def loss(weight):
        return F.cross_entropy(functional_call(model, {f"{NAME}.weight": weight}, (images.inputs(),)), images.labels)

    dense = hessian(loss)(weight).reshape(weight.numel(), weight.numel())
    trace, error = ls.hessian_traces(model, [NAME], images, batch_size=2)
    assert trace[0] == pytest.approx(dense.trace().item(), rel=1e-3)
    assert error[0] > 0


def test_standard_error_of_the_trace_is_that_of_the_mean(network, data):
    model, _ = network
    per_image = [ls.hessian_traces(model, [NAME], data.calibration[i : i + 1])[0][0] for i in range(6)]
    trace, error = ls.hessian_traces(model, [NAME], data.calibration[:6])
    assert trace[0] == pytest.approx(np.mean(per_image), rel=1e-5)
    assert error[0] == pytest.approx(np.std(per_image, ddof=1) / 6**0.5, rel=1e-5)


def test_synflow_sums_agree_across_layers_in_a_chain():
    """Without biases and branches every layer's sum of W * dR/dW is R itself (Tanaka et al. 2020, theorem 1)."""
    chain = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3, bias=False), torch.nn.Flatten()
    )
    scores = ls.synflow_scores(chain, ["0", "2"], (1, 8, 8))
    positive = {key: value.abs().double() for key, value in chain.state_dict().items()}
    total = functional_call(chain, positive, (torch.ones(1, 1, 8, 8, dtype=torch.float64),)).sum().item()
    np.testing.assert_allclose(scores, [total, total])


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
    found = ls.output_errors(model, {NAME: [quantized - layer.weight.detach()]}, images, batch_size=16)
    assert found[0, 0] == pytest.approx(truth.item(), rel=1e-4)


def test_one_layer_kl_agrees_with_plain_passes_and_restores_the_weights(network, data):
    model, names = network
    images = data.calibration[:50]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = {name: [fake_quantize(model.get_submodule(name).weight.detach(), 2)] for name in names}
    found = ls.one_layer_kl(model, quantized, images, batch_size=20)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.inference_mode():
        p = model(images.inputs()).double().softmax(dim=1)
        for row, name in enumerate(names):
            weights = {f"{name}.weight": quantized[name][0]}
            q = functional_call(model, weights, (images.inputs(),)).double().softmax(dim=1)
            truth = (p * (p.log() - q.log())).sum(dim=1).mean().item()
            assert found[row, 0] == pytest.approx(truth, rel=1e-4, abs=1e-9)


def test_activation_samples_are_inputs_of_the_layer(network, data):
    model, names = network
    samples = ls.activation_samples(model, names, data.calibration)
    assert [sample.shape[0] for sample in samples] == [8, 8, 8, 16, 16, 32]
    assert all(sample.shape[1] == ls.ACTIVATION_POSITIONS for sample in samples)
    assert all((sample >= 0).all() for sample in samples)  # every searchable layer comes after a ReLU


def test_loaded_errors_are_those_of_the_quantizer(study, profile, network):
    statistics, (model, names) = ls.load_statistics(profile), network
    weight = model.get_submodule(names[2]).weight.detach()
    truth = (fake_quantize(weight, 3) - weight).flatten(1)
    torch.testing.assert_close(statistics.errors[2][1], truth)
    assert set(statistics.seconds) == {"errors", "gradients", "activations", "trace", "synflow", "output_error", "kl"}


def test_statistics_of_another_checkpoint_are_refused(own_study, profile):
    path = own_study / "statistics.safetensors"
    save_tensors(profile, path.name, load_file(str(path)), {"seconds": {}, "checkpoint": "other"})
    record(profile, path.name, command="test", seconds=0.0)
    with pytest.raises(CorruptArtefactError, match="another checkpoint"):
        ls.load_statistics(profile)
