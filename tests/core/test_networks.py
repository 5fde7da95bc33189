"""Quantized networks: pieces and whole give the bits of a plain computation, and write to nobody's tensor."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from emq_lib.bench import engine
from emq_lib.core import graphs
from emq_lib.core.datasets import Split
from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.networks import QuantizedLayer
from emq_lib.core.quantizers import ActivationRange, quantize
from tests.networks import REGISTERED, networks, pictures, quantized, registered


def _layers(model):
    return [
        name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear, QuantizedLayer))
    ]


def _run(pieces, x):
    """Return the inputs of all pieces and the logits, after checking that none was written to."""
    outputs = [x]
    for piece, _ in pieces:
        outputs.append(piece(outputs[-1]))
    kept = [output.clone() for output in outputs]
    for (piece, _), before, after in zip(pieces, outputs, outputs[1:], strict=False):
        assert torch.equal(piece(before), after)
    assert all(torch.equal(one, other) for one, other in zip(outputs, kept, strict=True))
    return outputs


def _truth(model, network, x):
    """Compute what `network` should, from the float network: sums of integers in float64, where they are exact too."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        for part, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, part, nn.Identity())
            elif isinstance(child, (nn.Conv2d, nn.Linear)):
                full_name = f"{name}.{part}".lstrip(".")
                folded = network.layers[full_name]
                setattr(module, part, _ExactLayer(child, folded.weight, folded.activation_range, folded.bias))
    return plain(x.clone())


class _ExactLayer(nn.Module):
    def __init__(self, layer, weight, seen, bias):
        super().__init__()
        self.layer, self.weight, self.seen = layer, weight, seen
        self.bias, self.channel = bias.flatten(), (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)

    def forward(self, x):
        lowest, highest = -self.seen.zero_point, 2**self.seen.bits - 1 - self.seen.zero_point
        codes = (x * (1 / self.seen.scale)).round().clamp(lowest, highest).double()
        integers = (self.weight.codes.double().flatten(1) - self.weight.zero_point[:, None].double()).view_as(
            self.weight.codes
        )
        exact = copy.deepcopy(self.layer).double()
        exact.weight.data, exact.bias = integers, None
        sums = exact(codes)
        scale = self.seen.scale * self.weight.scale
        return sums.float() * scale.view(self.channel) + self.bias.view(self.channel)


@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_model_runs_in_pieces_without_writing(name):
    model, x = registered(name)
    with torch.inference_mode():
        folded = graphs.fold_batchnorm(model)
        truth, pieces = folded(x), graphs.segments(folded, _layers(folded))
        assert [layer for _, held in pieces for layer in held] == _layers_in_order(folded, x)
        assert torch.equal(_run(pieces, x)[-1], truth)


def _layers_in_order(folded, x):
    return list(graphs.describe_layers(folded, x[:1], pinned={}, tied={})["name"])


@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_model_is_quantized_to_the_bit(name):
    model, x = registered(name)
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=generator)
    channels = torch.ones(x.shape[1])
    split = Split(images, torch.tensor([0, 1]), 0.5 * channels, 0.25 * channels)
    x = split.inputs()
    with torch.inference_mode():
        network = quantized(model, x, choices=(2, 4))
        rng = random.Random(3)
        config = [rng.choice((2, 4)) for _ in range(network.bank.slot_count)]
        network.select(config)
        inputs = x.clone()
        truth = _truth(model, network, x)
        assert torch.equal(network(inputs), truth)
        assert torch.equal(_run(network.pieces, inputs)[-1], truth)
        assert torch.equal(network(inputs), truth)  # the pieces share the layers of the whole
        assert torch.equal(inputs, x)
    ((measured,),) = engine.measure(network, split, [config])
    assert measured.correct.tolist() == (truth.argmax(dim=1) == split.labels).tolist()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(model=networks())
def test_random_networks_in_pieces_are_the_network(model):
    x = pictures(3)
    with torch.inference_mode():
        folded = graphs.fold_batchnorm(model)
        pieces = graphs.segments(folded, _layers(folded))
        assert sorted(layer for _, held in pieces for layer in held) == sorted(_layers(folded))
        assert torch.equal(_run(pieces, x)[-1], folded(x))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(model=networks())
def test_random_networks_are_quantized_to_the_bit(model):
    x = pictures(3)
    with torch.inference_mode():
        network = quantized(model, x, choices=(3,))
        truth = _truth(model, network, x)
        assert torch.equal(network(x), truth)
        assert torch.equal(_run(network.pieces, x)[-1], truth)
        assert torch.equal(x, pictures(3))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(model=networks())
def test_macs_of_random_networks_are_those_of_a_count(model):
    """The truths: PyTorch's own counter, and one weight's uses after another for the convolutions."""
    x = pictures(1)
    table = graphs.describe_layers(graphs.fold_batchnorm(model), x, pinned={}, tied={}).set_index("name")
    uses = {}

    def count(name):
        def hook(module, _inputs, output):
            per_output = module.weight[0].numel()
            uses[name] = sum(per_output for _ in range(output[0].numel()))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in table.index]
    with FlopCounterMode(display=False) as counter:
        model(x.clone())
    for handle in handles:
        handle.remove()
    aten = torch.ops.aten
    counted = counter.get_flop_counts()["Global"]
    assert 2 * table["macs"].sum() == sum(counted.get(op, 0) for op in (aten.convolution, aten.addmm, aten.mm))
    assert table["macs"].to_dict() == uses


@pytest.mark.parametrize("how", [{"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}, {"padding": "valid"}])
def test_a_layer_of_an_unfolded_network_with_other_padding_is_refused(how):
    layer = nn.Conv2d(3, 4, 3, **how)
    with pytest.raises(UnsupportedModelError, match="numbers of zeros; take it from a folded"):
        QuantizedLayer(layer, {3: quantize(layer.weight, 3)}, ActivationRange(0.1, 0, 8))
