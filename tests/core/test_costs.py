"""Cost tables against sums written out by hand."""

import numpy as np
import pandas as pd
import pytest

from emq_lib.core import costs
from emq_lib.core.errors import ConfigLengthError, InvalidBitsError

LAYERS = pd.DataFrame(
    {
        "name": ["stem", "a", "b"],
        "parameters": [27, 30, 13],
        "channels": [4, 2, 1],
        "biases": [4, 2, 0],
        "macs": [270, 300, 13],
        "searchable": [False, True, True],
        "slot": [-1, 0, 1],
        "pinned_bits": [8, 0, 0],
    }
)


def test_size_counts_packed_weights_scales_zero_points_and_biases():
    # stem: 27 bytes of weights, 4 * 5 of scales and zero points, 16 of biases; a at 3 bits: ceil(90 / 8) = 12, 10, 8;
    # b at 2 bits: ceil(26 / 8) = 4, 5, 0.
    total = costs.size_cost(LAYERS, (2, 3)).total([[3, 2]], (2, 3))
    assert total.tolist() == [27 + 20 + 16 + 12 + 10 + 8 + 4 + 5]


def test_bops_multiply_macs_by_both_widths():
    total = costs.bops_cost(LAYERS, (2, 3), activation_bits=8).total([[3, 2]], (2, 3))
    assert total.tolist() == [8 * (270 * 8 + 300 * 3 + 13 * 2)]


def test_average_bits_weigh_layers_by_their_weights():
    cost = costs.average_bits_cost(LAYERS, (2, 3))
    np.testing.assert_allclose(cost.total([[2, 2], [3, 3], [3, 2]], (2, 3)), [2, 3, (30 * 3 + 13 * 2) / 43])


def test_bad_configurations_are_named():
    table = costs.size_cost(LAYERS, (2, 3))
    with pytest.raises(ConfigLengthError, match="needs 2 bit widths"):
        table.total([[2, 2, 2]], (2, 3))
    with pytest.raises(InvalidBitsError, match="Configuration 1 has 4 bits in slot 0"):
        table.total([[2, 2], [4, 2]], (2, 3))
