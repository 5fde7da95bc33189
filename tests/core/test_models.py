"""Networks: folding and cutting leave the function alone; layer table; named errors."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from book.studies.networks import fresh_model, layer_table
from emq_lib.core import graphs
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.profiles import get_profile

RESNET20 = get_profile("cifar10-resnet20")


@pytest.fixture(scope="module")
def resnet20():
    """A ResNet-20 whose batch norms have seen something, so that folding has work to do."""
    model = fresh_model(RESNET20)
    generator = torch.Generator().manual_seed(0)
    model.train()(torch.randn(8, 3, 32, 32, generator=generator))
    return model.eval()


def test_folding_keeps_the_function(resnet20):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    folded = graphs.fold_batchnorm(resnet20)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), resnet20(x), rtol=1e-4, atol=1e-5)


def test_macs_agree_with_torchs_own_counter(resnet20):
    layers = layer_table(graphs.fold_batchnorm(resnet20), RESNET20)
    with FlopCounterMode(display=False) as counter:
        resnet20(torch.zeros(1, 3, 32, 32))
    assert 2 * layers["macs"].sum() == counter.get_total_flops()


def test_resnet20_has_the_published_number_of_weights(resnet20):
    assert sum(p.numel() for p in resnet20.parameters()) == 269_722  # 0.27 M, He et al. 2016, table 6
    layers = layer_table(graphs.fold_batchnorm(resnet20), RESNET20)
    assert list(layers["searchable"]) == [False] + [True] * 18 + [False]
    assert list(layers.loc[layers["searchable"], "slot"]) == list(range(18))


def test_pieces_in_a_row_are_the_network(resnet20):
    folded = graphs.fold_batchnorm(resnet20)
    names = list(layer_table(folded, RESNET20)["name"])
    pieces = graphs.segments(folded, names)
    assert [name for _, held in pieces for name in held] == names
    assert len(pieces) == 11  # stem, nine blocks, classifier
    x = y = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for piece, _ in pieces:
        y = piece(y)
    assert torch.equal(y, folded(x))


@pytest.mark.parametrize(
    ("name", "layers", "slots", "weights"),
    [
        ("cifar10-resnet20", 20, 18, 269_722),
        ("cifar10-resnet18", 21, 18, 2_797_610),
        ("cifar10-mobilenetv2", 53, 51, 700_490),
        ("cifar10-vit-tiny", 26, 24, 810_890),
    ],
)
def test_every_network_has_the_layers_that_its_study_speaks_of(name, layers, slots, weights):
    profile = get_profile(name)
    model = fresh_model(profile)
    assert sum(p.numel() for p in model.parameters()) == weights
    table = layer_table(graphs.fold_batchnorm(model), profile)
    assert len(table) == layers
    assert table["slot"].max() + 1 == slots


def test_tied_layers_follow_their_blocks_second_convolution():
    profile = get_profile("cifar10-resnet18")
    table = layer_table(graphs.fold_batchnorm(fresh_model(profile)), profile).set_index("name")
    paper = ["conv1"] + [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)] + ["fc"]
    assert [table.loc[name, "slot"] for name in paper] == list(range(18))
    assert [table.loc[f"layer{s}.0.downsample.0", "slot"] for s in (2, 3, 4)] == [6, 10, 14]


def test_a_tie_to_a_pinned_layer_is_refused(resnet20):
    with pytest.raises(UnsupportedModelError, match=r"tied to \['conv1'\]"):
        layer_table(resnet20, dataclasses.replace(RESNET20, tied=(("layer1.0.conv1", "conv1"),)))


def test_two_layers_with_one_weight_are_named(resnet20):
    model = fresh_model(RESNET20)
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    with pytest.raises(UnsupportedModelError, match=r"'layer1\.0\.conv1', 'layer1\.1\.conv1'\] share one weight"):
        layer_table(model, RESNET20)


def test_same_seed_same_weights():
    first, second = (fresh_model(RESNET20).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_layer_that_runs_twice_is_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x)).mean(dim=(2, 3))

    with pytest.raises(UnsupportedModelError, match=r"\['conv'\] run more than once"):
        layer_table(Twice(), dataclasses.replace(RESNET20, pinned=()))


def test_an_unknown_pinned_layer_is_named(resnet20):
    with pytest.raises(UnsupportedModelError, match=r"profile 'cifar10-resnet20': \['stem'\] are to be pinned"):
        layer_table(resnet20, dataclasses.replace(RESNET20, pinned=(("stem", 8),)))


def test_an_unknown_model_is_named():
    with pytest.raises(InvalidParameterError, match="known models: .*resnet20"):
        fresh_model(dataclasses.replace(RESNET20, model="resnet-9000"))
