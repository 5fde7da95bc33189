"""Plots draw every number that they are given, where it belongs, in the colours of the palette."""

from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from book.making import plots
from book.making.palette import COLOURS, SAMPLE_COLOURS, shades
from emq_lib.evolution.genotypes import parse

matplotlib.use("Agg")


class Mean(NamedTuple):
    """An estimate with its interval."""

    value: float
    lo: float
    hi: float


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    settings = dict(plt.rcParams)
    yield ax
    assert dict(plt.rcParams) == settings  # the look of figures stands in emq.mplstyle alone
    plt.close(figure)


def points_of(ax):
    return np.concatenate([collection.get_offsets() for collection in ax.collections])


def labels_of(texts):
    return [text.get_text() for text in texts]


def test_a_histogram_counts_every_value_and_marks_from_low_to_high(ax):
    values = np.random.default_rng(0).normal(size=500)
    plots.plot_histogram(values, {"b": 1.0, "a": -1.0}, xlabel="x", ax=ax)
    assert sum(bar.get_height() for bar in ax.patches) == 500
    assert [line.get_xdata()[0] for line in ax.lines] == [-1.0, 1.0]
    assert labels_of(ax.get_legend().texts) == ["a (-1.0)", "b (1.0)"]


def test_a_scatter_has_one_point_for_each_configuration(ax):
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    plots.plot_scatter(pd.Series(x, index=range(5, 35)), y, colour="#123456", xlabel="a", ylabel="b", ax=ax)
    np.testing.assert_allclose(points_of(ax), np.stack([x, y], axis=1))
    assert {to_hex(colour) for colour in ax.collections[0].get_facecolors()} == {"#123456"}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")


def test_samples_have_their_colours_and_only_the_uniform_ones_are_joined(ax):
    table = pd.DataFrame({"size_bytes": [3072, 1024, 2048], "top1": [30.0, 10.0, 20.0]})
    plots.plot_samples({"random": table, "uniform": table}, ax=ax)
    assert sorted(map(tuple, points_of(ax))) == sorted([(1, 10), (2, 20), (3, 30)] * 2)
    colours = [to_hex(collection.get_facecolors()[0]) for collection in ax.collections]
    assert colours == [SAMPLE_COLOURS["random"], SAMPLE_COLOURS["uniform"]]
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xydata(), [(1, 10), (2, 20), (3, 30)])
    assert labels_of(ax.get_legend().texts) == ["random (3)", "uniform (3)"]


def test_dots_stand_in_the_row_of_their_method_the_first_on_top(ax):
    table = pd.DataFrame({2.25: [10.0, np.nan], 3.0: [30.0, 40.0]}, index=["first", "second"])
    plots.plot_dots(table, float_top1=90.0, ax=ax)
    assert sorted((x, round(y)) for x, y in points_of(ax)) == [(10, 0), (30, 0), (40, 1)]
    assert labels_of(ax.get_yticklabels()) == ["first", "second"]
    assert ax.yaxis_inverted()
    assert labels_of(ax.get_legend().texts) == ["2.25 bits", "3 bits"]
    assert [to_hex(dot.get_markerfacecolor()) for dot in ax.get_legend().legend_handles] == list(map(to_hex, shades(2)))


def test_sizes_are_named_on_logarithmic_axes(ax):
    sizes = pd.DataFrame({"MACs per image": [1e6, 1e8], "microseconds": [1.0, 50.0]}, index=["a", "b"])
    plots.plot_sizes(sizes, ax=ax)
    np.testing.assert_array_equal(points_of(ax), sizes.to_numpy())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert sorted(labels_of(ax.texts)) == ["a", "b"]


def test_effects_by_bits_are_lines_with_their_names(ax):
    effects = pd.DataFrame({2: [1.0, 2.0, 0.5], 3: [3.0, 4.0, 3.5]}, index=["a", "b", "c"])
    plots.plot_by_bits(effects, ax=ax)
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines], effects.T)
    assert labels_of(ax.texts) == ["2 bits", "3 bits"]
    assert labels_of(ax.get_xticklabels()) == ["a", "b", "c"]


def test_curves_are_steps_one_line_for_each_run(ax):
    x = np.array([0, 10, 20])
    runs = {"evolution": [(x, x + 1.0), (x, x + 2.0)], "random search": [(x, x + 3.0)]}
    plots.plot_curves(runs, xlabel="x", ylabel="y", ax=ax)
    lines = [line for line in ax.lines if len(line.get_xdata())]
    found = sorted((to_hex(line.get_color()), *line.get_ydata()) for line in lines)
    assert found == sorted((COLOURS[name], *y) for name, family in runs.items() for _, y in family)
    assert {line.get_drawstyle() for line in lines} == {"steps-post"}
    assert labels_of(ax.get_legend().texts) == list(runs)


def test_fronts_keep_every_point_even_at_one_size(ax):
    table = pd.DataFrame({"proxy": ["evolved"] * 3, "KiB": [1.0, 1.0, 2.0], "top1": [10.0, 30.0, 50.0]})
    plots.plot_front(table, x="KiB", ax=ax)
    drawn = next(line for line in ax.lines if len(line.get_xdata()))
    assert sorted(map(tuple, drawn.get_xydata())) == [(1, 10), (1, 30), (2, 50)]
    assert to_hex(drawn.get_color()) == COLOURS["evolved"]


def test_interactions_leave_the_diagonal_out_and_mark_pairs(ax):
    effects, marks = np.array([[0.0, 2.0], [2.0, 0.0]]), np.array([[False, True], [False, False]])
    plots.plot_interactions(effects, marks, names=["a", "b"], ax=ax)
    cells = ax.collections[0]
    np.testing.assert_array_equal(np.ma.getmaskarray(cells.get_array()), np.eye(2, dtype=bool))
    assert cells.get_clim() == (-2, 2)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [(1.5, 0.5)])
    assert labels_of(ax.get_yticklabels()) == ["a", "b"]


def test_sensitivities_are_shades_and_the_last_row_stands_apart(ax):
    shares = pd.DataFrame([[0.0, 1.0], [1.0, 0.5], [0.2, 1.0]], index=["x", "y", "z"], columns=["a", "b"])
    plots.plot_sensitivity(shares, ax=ax)
    np.testing.assert_array_equal(ax.collections[0].get_array(), shares)
    assert ax.lines[0].get_ydata()[0] == 2


def test_a_heatmap_writes_each_width_into_its_cell(ax):
    bits = pd.DataFrame([[2, 4], [4, 2]], index=["x", "y"], columns=["a", "b"])
    plots.plot_heatmap(bits, ax=ax)
    assert labels_of(ax.texts) == ["2", "4", "4", "2"]
    np.testing.assert_array_equal(ax.collections[0].get_array(), [[0, 1], [1, 0]])


def test_a_forest_is_sorted_and_draws_the_intervals_it_is_given(ax):
    table = pd.DataFrame({"proxy": ["low", "OMPQ"], "rho100": [0.1, 0.5], "lo": [0.0, 0.4], "hi": [0.3, 0.7]})
    plots.plot_forest(table, others=pd.Series({"low": 0.2, "OMPQ": 0.6}), ax=ax)
    assert labels_of(ax.get_yticklabels()) == ["low", "OMPQ"]
    drawn = [tuple(line.get_xdata()) for line in ax.lines]
    assert drawn == [(0.0, 0.3), (0.1,), (0.2,), (0.4, 0.7), (0.5,), (0.6,)]
    assert to_hex(ax.lines[3].get_color()) == COLOURS["OMPQ"]


def test_a_genotype_is_drawn_from_its_inputs_to_the_sum_over_layers(ax):
    plots.plot_genotype(parse("sequential(W: abs, sqrt)"), ax=ax)
    shown = [text for text in ax.texts if text.get_text()]
    assert labels_of(sorted(shown, key=lambda text: text.get_position()[0])) == ["W", "abs", "sqrt", "sum over layers"]


def test_growth_is_drawn_beside_what_proportion_would_be(ax):
    run = pd.DataFrame({"configurations": [10, 100], "seconds": [1.0, 5.0]})
    plots.plot_growth({"digits": run}, ax=ax)
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines], [[1, 5], [1, 10]])


def test_quantizers_are_panels_with_the_intervals_they_are_given():
    index = pd.MultiIndex.from_tuples([(3.0, "uniform"), (2.5, "uniform")], names=["average_bits", "proxy"])
    mean = pd.Series([Mean(80.0, 79.0, 82.0), Mean(70.0, 69.0, 71.0)], index=index)
    figure = plots.plot_quantizers({"rtn": mean, "adaround": mean}, float_top1=90.0)
    assert [ax.get_title() for ax in figure.axes] == ["rtn", "adaround"]
    (bars,) = figure.axes[0].containers
    np.testing.assert_array_equal(bars.lines[0].get_xydata(), [(2.5, 70), (3.0, 80)])
    ends = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_array_equal(ends, [(69, 71), (79, 82)])
    plt.close(figure)
