"""Cost tables against sums written out by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emq_lib.core import configs, costs
from emq_lib.core.errors import ConfigLengthError, InvalidBitsError, InvalidParameterError, InvalidScoreError

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


NO_NUMBERS = [float("nan"), float("inf"), "3", None, 1j, [3]]


@pytest.mark.parametrize(
    ("found", "error"),
    [([[2, 2, 2]], ConfigLengthError), ([2], ConfigLengthError), ([], ConfigLengthError), (3, ConfigLengthError)]
    + [([[2, 2], [2]], ConfigLengthError), (np.full((1, 1, 2), 2), ConfigLengthError)]
    + [([[2, 2], [4, 2]], InvalidBitsError), ([2, -3], InvalidBitsError), ([2.5, 3], InvalidBitsError)]
    + [([2, value], InvalidBitsError) for value in (float("nan"), float("inf"), "3", None, 1j)]
    + [("23", InvalidBitsError), ("2x3", InvalidBitsError), (["2x3"], InvalidBitsError), (None, InvalidBitsError)]
    + [([True, True], InvalidBitsError), ({2: 3}, InvalidBitsError), (b"23", InvalidBitsError)],
)
def test_bad_configurations_are_named(found, error):
    table = costs.size_cost(LAYERS, (2, 3))
    with pytest.raises(error):
        table.total(found, (2, 3))
    with pytest.raises(error):
        costs.choice_indices(found, (2, 3), 2)


def test_the_wrong_width_is_pointed_at():
    with pytest.raises(InvalidBitsError, match="Configuration 1 has 4 bits in slot 0"):
        costs.choice_indices([[2, 2], [4, 2]], (2, 3), 2)


@pytest.mark.parametrize(
    "choices", [(3, 2), (2, 2), (), (2.5, 3), (True, 2), "23", ("2", "3"), None, 3, (0, 2), (-2, 2), (2, float("nan"))]
)
@pytest.mark.parametrize("cost", ["indices", "size", "BOPs", "average bits"])
def test_bad_choices_are_named(choices, cost):
    call = {
        "indices": lambda: costs.choice_indices([2, 2], choices, 2),
        "size": lambda: costs.size_cost(LAYERS, choices),
        "BOPs": lambda: costs.bops_cost(LAYERS, choices, activation_bits=8),
        "average bits": lambda: costs.average_bits_cost(LAYERS, choices),
    }[cost]
    with pytest.raises(InvalidBitsError, match="choices"):
        call()


@pytest.mark.parametrize(
    "table",
    [None, "table", 5.0, np.ones(2), np.ones((2, 3)), np.ones((2, 2, 2)), [[1.0, 2.0], [1.0]], np.ones((2, 2), complex)]
    + [np.full((2, 2), value) for value in (float("nan"), float("inf"), "3", None)],
)
def test_tables_that_are_none_are_named(table):
    with pytest.raises(InvalidScoreError):
        costs.gather(table, [[2, 3]], (2, 3))
    with pytest.raises(InvalidParameterError, match="The cost 'price' needs a finite table"):
        costs.CostTable("price", "units", 0.0, table).total([[2, 3]], (2, 3))


@pytest.mark.parametrize("fixed", NO_NUMBERS)
def test_a_fixed_part_that_is_no_number_is_named(fixed):
    with pytest.raises(InvalidParameterError, match="the fixed part of the cost 'price'"):
        costs.CostTable("price", "units", fixed, np.ones((2, 2))).total([[2, 3]], (2, 3))


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, True, *NO_NUMBERS])
def test_widths_that_are_none_are_named(bits):
    with pytest.raises(InvalidBitsError):
        costs.weight_bytes(10, bits)
    with pytest.raises(InvalidBitsError):
        costs.bops_cost(LAYERS, (2, 3), activation_bits=bits)
    with pytest.raises(InvalidBitsError):
        configs.bits_text([2, bits])


@pytest.mark.parametrize("count", [-1, 2.5, True, *NO_NUMBERS])
def test_numbers_of_weights_that_are_none_are_named(count):
    with pytest.raises(InvalidParameterError, match="the number of weights"):
        costs.weight_bytes(count, 3)


@pytest.mark.parametrize("text", ["", "2x3", "209", "2 3", "-2", "²3", None, 23, ["2", "3"], b"23"])
def test_texts_that_are_no_configuration_are_named(text):
    with pytest.raises(InvalidBitsError, match="one digit from 1 to 8 per slot"):
        configs.parse_bits(text)


@pytest.mark.parametrize(
    "layers",
    [None, {}, LAYERS.to_dict(), LAYERS[:0], LAYERS.drop(columns="slot"), LAYERS.drop(columns="parameters")]
    + [LAYERS.assign(parameters=value) for value in ([27, -1, 13], [27, 2.5, 13], [27, "30", 13], [27, None, 13])]
    + [LAYERS.assign(slot=value) for value in ([-1, 0, 2], [-1, 1, 2], [-1, 0, 0.5], [-1, -2, 0], [-1, 0, None])],
)
def test_tables_of_no_layers_are_named(layers):
    for call in (costs.size_cost, costs.average_bits_cost):
        with pytest.raises(InvalidParameterError, match="layer"):
            call(layers, (2, 3))


def test_nothing_to_search_has_no_average_bits():
    with pytest.raises(InvalidParameterError, match="no searchable weights"):
        costs.average_bits_cost(LAYERS[:1], (2, 3))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), choices=st.sets(st.integers(1, 8), min_size=1), slots=st.integers(1, 6))
def test_gathering_is_adding_up_by_hand(data, choices, slots):
    choices = sorted(choices)
    rows = data.draw(st.lists(st.lists(st.sampled_from(choices), min_size=slots, max_size=slots), min_size=1))
    table = np.random.default_rng(len(rows)).integers(0, 1_000, (slots, len(choices)))
    truth = [sum(int(table[slot, choices.index(bits)]) for slot, bits in enumerate(row)) for row in rows]
    assert costs.gather(table, rows, choices).tolist() == truth
    assert [configs.parse_bits(configs.bits_text(row)) for row in rows] == [tuple(row) for row in rows]
