"""Quantization-aware training: LSQ's gradients, what is exported is what was trained, interruptions cost nothing."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from book.studies.networks import build_network, load_folded
from emq_lib.core import training
from emq_lib.core.errors import CorruptArtefactError, InvalidParameterError, TrainingDivergedError
from emq_lib.core.models import predict, top1
from emq_lib.core.networks import QuantizedLayer
from emq_lib.core.quantizers import ActivationRange, quantize
from emq_lib.quantization import qat

SHORT = qat.QatRecipe(epochs=2, batch_size=64, crop_padding=1, flip=False, precision="float32")


def _layer(bits=3):
    generator = torch.Generator().manual_seed(5)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    x = torch.randn(2, 3, 6, 6, generator=generator).relu()
    return layer, qat.LearnedLayer(layer, quantize(layer.weight, bits), ActivationRange(0.01, 0, 8)), x


def test_the_start_is_rounding_to_nearest():
    layer, learned, x = _layer()
    torch.testing.assert_close(learned.rounded(), quantize(layer.weight, 3).dequantize())
    plain = QuantizedLayer(layer, {3: learned.start}, learned.seen)
    torch.testing.assert_close(learned(x), plain(x), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_lsq():
    """Against the formulas of the paper: through to the weight inside the range, and to the step as it says."""
    _, learned, _ = _layer(bits=2)
    upstream = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(6))
    (learned.rounded() * upstream).sum().backward()
    weight, channel = learned.layer.weight.detach(), (-1, 1, 1, 1)
    step, zero = learned.start.scale.view(channel), learned.start.zero_point.float().view(channel)
    codes = (weight / step).round() + zero
    inside = (codes >= 0) & (codes <= 3)
    torch.testing.assert_close(learned.layer.weight.grad, torch.where(inside, upstream, 0.0))
    share = torch.where(inside, codes - zero - weight / step, codes.clamp(0, 3) - zero)
    expected = (share * upstream).sum(dim=(1, 2, 3)) * learned.start.scale  # of the logarithm
    torch.testing.assert_close(learned.log_weight_steps.grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("distillation", [0.0, 0.5, 1.0])
def test_what_is_returned_is_what_was_trained(study, profile, data, distillation):
    model = load_folded(profile, "cpu")
    before = copy.deepcopy(model.state_dict())
    network, layers = build_network(profile, data)
    generator = torch.Generator().manual_seed(0)
    found = qat.train_quantized(
        model,
        layers,
        (2,) * 6,
        data.train,
        network.activation_ranges,
        generator=generator,
        recipe=dataclasses.replace(SHORT, distillation=distillation),
    )
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    rtn, trained = (top1(predict(n, data.test), data.test.labels) for n in (network.select((2,) * 6), found))
    assert trained > rtn + 20
    assert {name: layer.bits for name, layer in found.layers.items()} == network.bank.widths((2,) * 6)
    assert all(int(layer.weight.codes.max()) < 2**layer.bits for layer in found.layers.values())


@pytest.mark.slow
def test_without_labels_the_float_network_is_enough(study, profile, data):
    network, layers = build_network(profile, data)
    wrong = dataclasses.replace(data.train, labels=torch.zeros_like(data.train.labels))
    found = [
        qat.train_quantized(
            load_folded(profile, "cpu"),
            layers,
            (2,) * 6,
            images,
            network.activation_ranges,
            generator=torch.Generator().manual_seed(0),
            recipe=dataclasses.replace(SHORT, epochs=1, distillation=1.0),
        )
        for images in (wrong, data.train)
    ]
    assert torch.equal(*(predict(network, data.test) for network in found))


@pytest.mark.slow
def test_interrupted_and_resumed_gives_the_same_network(study, profile, data, tmp_path, monkeypatch):
    network, layers = build_network(profile, data)
    images, resume, run, epochs = data.train[:256], tmp_path / "qat.resume", training.train_epoch, []

    def train(resume=None, distillation=0.5):
        return qat.train_quantized(
            load_folded(profile, "cpu"),
            layers,
            (2,) * 6,
            images,
            network.activation_ranges,
            generator=torch.Generator().manual_seed(0),
            recipe=dataclasses.replace(SHORT, distillation=distillation),
            resume=resume,
        )

    def stops(*args, **kwargs):
        if epochs:
            raise KeyboardInterrupt
        epochs.append(1)
        run(*args, **kwargs)

    whole = train()
    monkeypatch.setattr(qat, "train_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        train(resume)
    monkeypatch.setattr(qat, "train_epoch", run)
    with pytest.raises(CorruptArtefactError, match="belongs to another training"):
        train(resume, distillation=0.25)
    resumed = train(resume)
    assert torch.equal(predict(whole, data.test), predict(resumed, data.test))
    again = train(resume)  # nothing is left to train: whoever stores the network removes the file
    assert torch.equal(predict(again, data.test), predict(whole, data.test))


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(InvalidParameterError, match="distillation must lie from 0 to 1"):
        qat.QatRecipe(distillation=2.0)


@pytest.mark.slow
def test_a_training_that_diverges_says_so(study, profile, data):
    network, layers = build_network(profile, data)
    with pytest.raises(TrainingDivergedError, match="max_lr below 1e"):
        qat.train_quantized(
            load_folded(profile, "cpu"),
            layers,
            (2,) * 6,
            data.train,
            network.activation_ranges,
            generator=torch.Generator().manual_seed(0),
            recipe=dataclasses.replace(SHORT, max_lr=1e30),
        )
