"""Saliencies against loops over images and channels, closed forms and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from book.studies.networks import layer_table, load_checkpoint
from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.proxies import saliency

SHAPE = (1, 16, 16)


@pytest.fixture
def network(study, profile):
    model = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
    layers = layer_table(model, profile)
    return model, list(layers.loc[layers["searchable"], "name"])


def _outputs(model, name, inputs):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, out: seen.append(out.detach().double()))
    model(inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_synflow_sums_agree_across_layers_in_a_chain(activation):
    """Without biases and branches every layer's sum of W * dR/dW is R itself (Tanaka et al. 2020, theorem 1)."""
    wide = nn.Conv2d(1, 4, 3, bias=False)
    nn.init.constant_(wide.weight, 1.0)  # outputs of 9, where a ReLU6 saturates
    chain = nn.Sequential(wide, activation(), nn.Conv2d(4, 3, 3, bias=False), nn.Flatten()).eval()
    scores = saliency.synflow(chain, ["0", "2"], (1, 8, 8))
    positive = {key: value.abs().double() for key, value in chain.state_dict().items()}
    linear = nn.Sequential(chain[0], nn.Identity(), chain[2], nn.Flatten())
    total = functional_call(linear, positive, (torch.ones(1, 1, 8, 8, dtype=torch.float64),)).sum().item()
    np.testing.assert_allclose(scores, [total, total])


def test_virtual_gradients_are_finite_differences_of_the_summed_logits(network):
    model, names = network
    [found] = saliency.virtual_gradients(model, names[2:3], SHAPE)
    model = model.double()
    weight = model.get_submodule(names[2]).weight.detach().contiguous()
    ones = torch.ones(1, *SHAPE, dtype=torch.float64)
    for channel, entry in ((0, 3), (5, 40)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = weight.clone()
            moved.flatten(1)[channel, entry] += step
            ends.append(functional_call(model, {f"{names[2]}.weight": moved}, (ones,)).sum().item())
        assert found[channel, entry].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-5)


def test_channel_fisher_one_image_and_channel_at_a_time(network, data):
    model, names = network
    images, name = data.calibration[:5], names[1]
    total = 0.0
    for index in range(5):
        one = images[index : index + 1]
        kept = {}

        def keep(_module, _inputs, output, kept=kept):
            output.retain_grad()
            kept["a"] = output

        handle = model.get_submodule(name).register_forward_hook(keep)
        F.cross_entropy(model(one.inputs()), one.labels).backward()
        handle.remove()
        for channel in range(kept["a"].shape[1]):
            total += 0.5 * (kept["a"][0, channel] * kept["a"].grad[0, channel]).sum().item() ** 2 / 5
    assert saliency.channel_fisher(model, [name], images)[0] == pytest.approx(total, rel=1e-4)


def test_grasp_is_the_change_of_the_gradients_norm_along_the_weights(network, data):
    """H g is half the gradient of |g|^2, so -sum W * (H g) is a directional derivative of it."""
    model, names = network
    images = data.calibration[:16]
    model, inputs = model.double(), images.inputs().double()
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in names}

    def squared_norm(scale):
        moved = dict(weights)
        moved[f"{names[1]}.weight"] = weights[f"{names[1]}.weight"] * scale
        moved = {key: value.clone().requires_grad_() for key, value in moved.items()}
        loss = F.cross_entropy(functional_call(model, moved, (inputs,)), images.labels)
        return sum(g.square().sum().item() for g in torch.autograd.grad(loss, list(moved.values())))

    truth = -0.5 * (squared_norm(1 + 1e-6) - squared_norm(1 - 1e-6)) / 2e-6
    found = saliency.grasp(model.float(), names, images)
    assert found[1] == pytest.approx(truth, rel=1e-2)


def test_zico_from_the_gradients_of_each_minibatch(network, data):
    model, names = network
    images = data.calibration[:24]
    gradients = []
    for start in (0, 8, 16):
        batch = images[start : start + 8]
        loss = F.cross_entropy(model(batch.inputs()), batch.labels)
        gradients.append(torch.autograd.grad(loss, model.get_submodule(names[0]).weight)[0].flatten().numpy())
    g = np.array(gradients, dtype=np.float64)
    g = g[:, g.std(axis=0) > 0]
    truth = np.log((np.abs(g).mean(axis=0) / g.std(axis=0)).sum())
    assert saliency.zico(model, names, images, batch_size=8)[0] == pytest.approx(truth, rel=1e-4)
    with pytest.raises(InvalidParameterError, match="two minibatches"):
        saliency.zico(model, names, images[:10], batch_size=8)


def test_zen_of_a_linear_layer_is_the_norm_of_its_rows():
    """z is Gaussian, so a row w of the matrix answers with E|w z| = |w| sqrt(2 / pi)."""
    layer = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()
    generator = torch.Generator().manual_seed(0)
    found = saliency.zen(layer, ["1"], (1, 4, 4), images=20_000, generator=generator)
    truth = (layer[1].weight.norm(dim=1) * (2 / np.pi) ** 0.5).mean().item()
    assert found[0] == pytest.approx(truth, rel=0.02)


def test_nwot_counts_agreeing_signs(network, data):
    model, names = network
    images = data.calibration[:6]
    codes = (_outputs(model, names[0], images.inputs()) > 0).flatten(1).numpy()
    kernel = [[np.sum(one == two) for two in codes] for one in codes]
    assert saliency.nwot(model, names, images)[0] == pytest.approx(np.linalg.slogdet(np.array(kernel))[1])
    twice = images[torch.tensor([0, 1, 2, 3, 4, 5, 0, 3])]
    assert saliency.nwot(model, names, twice)[0] == pytest.approx(saliency.nwot(model, names, images)[0])


def test_cka_from_centred_gram_matrices(network, data):
    model, names = network
    images = data.calibration[:20]
    features = [_outputs(model, name, images.inputs()).flatten(1).numpy() for name in names]
    centre = np.eye(20) - 1 / 20
    grams = [centre @ x @ x.T @ centre for x in features]
    truth = [[np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)) for b in grams] for a in grams]
    np.testing.assert_allclose(saliency.linear_cka(model, names, images), truth, rtol=1e-4)
