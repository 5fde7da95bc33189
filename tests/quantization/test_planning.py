"""Plans: patterns give widths, and what cannot be done is named."""

import pytest
import torch
from torch import nn

from emq_lib.core.errors import InvalidBitsError, InvalidParameterError, UnsupportedModelError
from emq_lib.quantization.planning import plan_bits


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.odd = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.spare = nn.Linear(3, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.up(self.odd(torch.relu(self.layer1(torch.relu(self.stem(x))))))
        return self.fc(x.mean(dim=(2, 3)))


EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_patterns_ends_and_default_give_the_widths():
    network = Network().train()
    plan = plan_bits(network, EXAMPLE, bits={"layer1.0": 4}, default=2)
    assert plan.bits == {"stem": 8, "layer1.0": 4, "layer1.2": 2, "odd": 2, "fc": 8}
    assert list(plan.layers["rule"]) == ["ends", "layer1.0", "default", "default", "ends"]
    assert plan_bits(network, EXAMPLE, bits={"fc": 4, "layer1.*": 3}, default=2, ends=None).bits == {
        "stem": 2,
        "layer1.0": 3,
        "layer1.2": 3,
        "odd": 2,
        "fc": 4,
    }
    assert all(module.training for module in network.modules())


def test_what_stays_in_floating_point_is_named_in_the_plan():
    plan = plan_bits(Network(), EXAMPLE)
    assert dict(plan.kept).keys() == {"up", "spare"}
    text = str(plan)
    assert "left in floating point: up (ConvTranspose2d with parameters weight, bias)" in text
    weights = {"stem": 3 * 8 * 9, "layer1.0": 8 * 8 * 9, "layer1.2": 8 * 9, "odd": 8 * 8 * 9, "fc": 8}
    packed = sum(count if name in ("stem", "fc") else count * 3 // 8 for name, count in weights.items())
    assert f"weights: {packed:,} bytes packed, {4 * sum(weights.values()):,} in floating point" in text


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"bits": {"block*": 4}}, InvalidParameterError, r"match no layer: \['block\*'\]"),
        ({"bits": {"layer1.*": 4, "*.2": 3}}, InvalidParameterError, r"'layer1.2': \['layer1.\*', '\*.2'\]"),
        ({"bits": {"fc": 9}}, InvalidBitsError, "fc: bit widths"),
        ({"default": 2.5}, InvalidBitsError, "default: bit widths"),
        ({"activation_bits": 0}, InvalidBitsError, "activation_bits"),
    ],
)
def test_wrong_patterns_and_widths_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        plan_bits(Network(), EXAMPLE, **wrong)


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="no convolution or linear layer"):
        plan_bits(nn.Sequential(nn.Conv1d(3, 3, 1)), torch.zeros(1, 3, 8))
