"""Networks, weights, banks and checkpoints that do not fit are refused by name; nothing is changed."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from emq_lib.core import graphs, models, quantizers
from emq_lib.core.bank import WeightBank, build_weight_bank
from emq_lib.core.datasets import Inputs
from emq_lib.core.errors import (
    ConfigLengthError,
    CorruptArtefactError,
    InvalidBitsError,
    InvalidParameterError,
    UnsupportedModelError,
)
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.quantizers import ActivationRange
from tests.networks import RandomNetwork, pictures, quantized

NO_WIDTHS = [0, 9, -1, 2.5, True, "3", None, float("nan"), [3], 1j, 10**400]
NO_COUNTS = [0, -1, 2.5, True, "3", None, float("nan"), [3]]
WEIGHT = torch.ones(4, 3)


@pytest.fixture
def network():
    return RandomNetwork([("residual", "relu in place")], 0, normalizes_in_place=False)


@pytest.fixture
def folded(network):
    return graphs.fold_batchnorm(network)


@pytest.fixture
def layers(folded):
    return graphs.describe_layers(folded, pictures(1), pinned={}, tied={})


@pytest.mark.parametrize("bits", NO_WIDTHS)
def test_widths_that_are_none_are_refused(bits, folded, layers):
    with pytest.raises(InvalidBitsError):
        quantizers.quantize(WEIGHT, bits)
    with pytest.raises(InvalidBitsError):
        quantizers.choose_activation_ranges(folded, layers, Inputs(pictures(2)), bits=bits)
    with pytest.raises(InvalidBitsError):
        ActivationRange(0.1, 0, bits)
    with pytest.raises(InvalidBitsError):
        build_weight_bank(folded, layers, (bits,))


@pytest.mark.parametrize("choices", [(), (3, 2), (2, 2), None, 3, "23", (2, 2.5)])
def test_choices_that_are_none_are_refused(choices, folded, layers):
    with pytest.raises(InvalidBitsError, match="choices"):
        build_weight_bank(folded, layers, choices)


@pytest.mark.parametrize(
    "weight",
    [None, [[1.0]], np.ones((2, 2)), torch.ones(3), torch.tensor(1.0), torch.ones(2, 2).long(), torch.ones(0, 3)]
    + [torch.full((2, 2), value) for value in (float("nan"), float("inf"))],
)
def test_weights_that_are_none_are_refused(weight):
    with pytest.raises(UnsupportedModelError, match="weight"):
        quantizers.quantize(weight, 3)


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [(value, 0) for value in (0, -0.1, float("nan"), float("inf"), "0.1", None, True)]
    + [(0.1, value) for value in (-1, 256, 2.5, None, "0", float("nan"))],
)
def test_ranges_that_are_none_are_refused(scale, zero_point):
    with pytest.raises(InvalidParameterError):
        ActivationRange(scale, zero_point, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["stem", "blocks.0.conv2", "fc"])
def test_weights_that_are_not_finite_name_their_layer(name, value, folded, layers):
    folded.get_submodule(name).weight.data.view(-1)[3] = value
    with pytest.raises(UnsupportedModelError, match=rf"\['{name}'\] hold NaN or infinity"):
        build_weight_bank(folded, layers, (2, 3))


@pytest.mark.parametrize("batch_size", NO_COUNTS)
def test_batch_sizes_that_are_none_are_refused(batch_size, folded, layers):
    with pytest.raises(InvalidParameterError, match="batch_size must be a whole number"):
        models.predict(folded, Inputs(pictures(2)), batch_size=batch_size)
    with pytest.raises(InvalidParameterError, match="batch_size must be a whole number"):
        quantizers.choose_activation_ranges(folded, layers, Inputs(pictures(2)), bits=8, batch_size=batch_size)


def test_nothing_to_predict_is_refused(folded, layers):
    with pytest.raises(InvalidParameterError, match="no images"):
        models.predict(folded, Inputs(pictures(0)))
    with pytest.raises(InvalidParameterError, match="no images"):
        quantizers.choose_activation_ranges(folded, layers, Inputs(pictures(0)), bits=8)


@pytest.mark.parametrize(
    ("logits", "labels"), [((0, 5), (0,)), ((3, 5), (2,)), ((3,), (3,)), ((3, 5), (3, 1)), ((3, 5, 2), (3,))]
)
def test_top1_of_other_shapes_is_refused(logits, labels):
    with pytest.raises(InvalidParameterError, match="top-1 takes logits"):
        models.top1(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize("name", [["fc", "nowhere"], ["act"]])
def test_a_layer_table_of_another_network_is_named(name, folded, layers):
    folded.act = nn.ReLU()
    other = pd.concat([layers.head(1)] * len(name)).assign(name=name, slot=range(len(name)))
    with pytest.raises(UnsupportedModelError, match=rf"\['{name[-1]}'\]"):
        build_weight_bank(folded, other, (2, 3))
    with pytest.raises(UnsupportedModelError, match=name[-1]):
        quantizers.choose_activation_ranges(folded, other, Inputs(pictures(2)), bits=8)
    assert not any(module._forward_pre_hooks for module in folded.modules())


def test_a_layer_without_weight_or_range_is_named(folded, layers):
    bank = build_weight_bank(folded, layers, (3,))
    ranges = quantizers.choose_activation_ranges(folded, layers, Inputs(pictures(2)), bits=8)
    with pytest.raises(UnsupportedModelError, match=r"\['fc'\] have either"):
        QuantizedNetwork(folded, bank, {name: seen for name, seen in ranges.items() if name != "fc"})
    with pytest.raises(UnsupportedModelError, match=r"\['tail'\] have either"):
        QuantizedNetwork(folded, bank, ranges | {"tail": ActivationRange(0.1, 0, 8)})
    QuantizedNetwork(folded, bank, ranges)
    with pytest.raises(UnsupportedModelError, match=r"no float layers \['stem', "):
        QuantizedNetwork(folded, bank, ranges)


def test_a_bank_of_nothing_is_refused():
    with pytest.raises(UnsupportedModelError, match="no layer to quantize"):
        WeightBank.of({})


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ([3], ConfigLengthError),
        ([[3] * 4] * 2, ConfigLengthError),
        ([[3] * 4], ConfigLengthError),
        (3, ConfigLengthError),
    ]
    + [([3, 3, 3, 4], InvalidBitsError), ([3, 3, 3, 2.5], InvalidBitsError), ("3333", InvalidBitsError)]
    + [(None, InvalidBitsError), ([3, 3, 3, float("nan")], InvalidBitsError), ([True] * 4, InvalidBitsError)],
)
def test_configurations_that_are_none_leave_the_selected_one(config, error, network):
    quantized_network = quantized(network, pictures(2), choices=(2, 3)).select((2, 3, 2, 3))
    with pytest.raises(error):
        quantized_network.select(config)
    assert [layer.bits for layer in quantized_network.layers.values()] == [2, 3, 2, 3]


@pytest.mark.parametrize("name", ["resnet-9000", "", None, ["resnet8"], 3])
def test_an_unknown_network_is_named(name):
    with pytest.raises(InvalidParameterError, match="unknown model .*known models: .*resnet20"):
        models.build_model(name, seed=0)


@pytest.mark.parametrize("seed", [-1, 2.5, None, "0", True, float("nan")])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(InvalidParameterError, match="seed must be a whole number"):
        models.build_model("resnet8", seed=seed)


@pytest.mark.parametrize(
    ("name", "build"), [("", nn.Linear), (None, nn.Linear), (3, nn.Linear), ("mine", None), ("mine", 3)]
)
def test_only_functions_are_registered_under_names(name, build):
    before = dict(models.MODELS)
    with pytest.raises(InvalidParameterError, match="register_model"):
        models.register_model(name, build)
    assert before == models.MODELS


STATE = RandomNetwork([("plain", "relu")], 0, normalizes_in_place=False).state_dict()
FOREIGN = {
    "empty": b"",
    "text": b"no tensors",
    "cut": save(STATE)[:300],
    "cut at the end": save(STATE)[:-10],
    "longer": save(STATE) + b"more",
    "other tensors": save({"weight": torch.zeros(2)}),
    "one is missing": save({name: tensor for name, tensor in STATE.items() if name != "fc.bias"}),
    "one is new": save(STATE | {"more": torch.zeros(2)}),
    "another shape": save(STATE | {"fc.bias": torch.zeros(6)}),
    "NaN": save(STATE | {"fc.bias": torch.full((5,), float("nan"))}),
    "infinity": save(STATE | {"fc.bias": torch.full((5,), float("inf"))}),
}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(FOREIGN[content])
    model = RandomNetwork([("plain", "relu")], 1, normalizes_in_place=False)
    with pytest.raises(CorruptArtefactError, match=r"model\.safetensors is not a checkpoint of RandomNetwork"):
        models.load_weights(model, path)
    assert path.read_bytes() == FOREIGN[content]


@pytest.mark.parametrize("kind", ["absent", "folder"])
def test_a_checkpoint_that_is_no_file_is_named(kind, tmp_path):
    path = tmp_path if kind == "folder" else tmp_path / "nowhere.safetensors"
    with pytest.raises(CorruptArtefactError, match="is not a checkpoint"):
        models.load_weights(nn.Linear(2, 2), path)


def test_a_checkpoint_comes_back(tmp_path):
    save_file(STATE, str(tmp_path / "model.safetensors"))
    model = RandomNetwork([("plain", "relu")], 1, normalizes_in_place=False).train()
    loaded = models.load_weights(model, tmp_path / "model.safetensors")
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(
    ("pinned", "tied", "message"),
    [
        ({"nowhere": 8}, {}, r"\['nowhere'\] are to be pinned"),
        ({}, {"nowhere": "fc"}, r"\['nowhere'\] are to be pinned"),
    ]
    + [({}, {"fc": "nowhere"}, "nowhere"), ({"stem": 8}, {"fc": "stem"}, r"tied to \['stem'\]")]
    + [({"fc": 8}, {"fc": "stem"}, r"\['fc'\] are to be pinned and tied")]
    + [({}, {"fc": "stem", "stem": "fc"}, "tied to"), ({}, {"fc": "fc"}, "tied to")],
)
def test_pinned_and_tied_layers_that_cannot_be_are_named(pinned, tied, message, folded):
    before = copy.deepcopy(folded.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        graphs.describe_layers(folded, pictures(1), pinned=pinned, tied=tied)
    assert all(torch.equal(before[name], tensor) for name, tensor in folded.state_dict().items())
