"""Points: configurations and methods by what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from book.making.palette import COLOURS, PLAIN, SAMPLE_COLOURS, shades


def plot_histogram(values: np.ndarray, marks: Mapping[str, float], *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a histogram of configurations with vertical marks, e.g. the uniform configurations, from low to high."""
    ax = sns.histplot(x=values, bins=40, color=COLOURS["random"], alpha=0.6, linewidth=0, ax=ax)
    ordered = sorted(marks.items(), key=lambda mark: mark[1])
    for (label, value), colour in zip(ordered, shades(len(marks)), strict=True):
        ax.axvline(value, color=colour, linewidth=1.6, label=f"{label} ({value:.1f})")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.1, 1))
    ax.set(xlabel=xlabel, ylabel="configurations")
    return ax


def plot_scatter(
    x: np.ndarray, y: np.ndarray, *, colour: str, xlabel: str, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Draw one point per configuration."""
    ax = sns.scatterplot(x=np.asarray(x), y=np.asarray(y), s=9, color=colour, alpha=0.6, linewidth=0, ax=ax)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def plot_samples(samples: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw top-1 against packed size, one colour per sample of the bench; the uniform ones are joined by a line.

    Args:
        samples: sample -> its rows of the bench.
        ax: axes to draw on.
    """
    for name, table in samples.items():
        uniform, colour = name == "uniform", SAMPLE_COLOURS[name]
        x, y = table["size_bytes"] / 2**10, table["top1"]
        style = {"s": 36, "alpha": 1} if uniform else {"s": 9, "alpha": 0.6}
        ax = sns.scatterplot(x=x, y=y, color=colour, linewidth=0, label=f"{name} ({len(table)})", ax=ax, **style)
        if uniform:
            sns.lineplot(x=x, y=y, estimator=None, color=colour, ax=ax)
    ax.set(xlabel="packed size (KiB)", ylabel="top-1 (%)")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def plot_sizes(sizes: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the time of one configuration on one image against a network's multiply-accumulates, on logarithmic axes.

    Args:
        sizes: index profile, columns "MACs per image" and "microseconds" of one configuration on one image.
        ax: axes to draw on.
    """
    ax = sns.scatterplot(data=sizes, x="MACs per image", y="microseconds", s=36, color=PLAIN, linewidth=0, ax=ax)
    ax.set(xscale="log", yscale="log")
    for line, (name, row) in enumerate(sizes.sort_values("microseconds").iterrows()):
        place = {"xytext": (4, -12 if line % 2 else 5), "textcoords": "offset points"}
        ax.annotate(name, (row["MACs per image"], row["microseconds"]), fontsize=8, **place)
    ax.set(xlabel="multiply-accumulates for one image", ylabel="microseconds")
    ax.margins(x=0.3)
    return ax


def plot_dots(table: pd.DataFrame, *, float_top1: float, ax: Axes | None = None) -> Axes:
    """Draw one row per method, the first on top, and one symbol per budget; a dashed line is the float accuracy.

    Args:
        table: top-1 in percent, index method, one column per number of average bits; entries may be missing.
        float_top1: accuracy of the float network.
        ax: axes to draw on.
    """
    named = table.rename(columns=lambda average: f"{average:g} bits").rename_axis(index="method", columns="budget")
    dots = named.stack().rename("top1").reset_index()
    colours = dict(zip(named.columns, map(tuple, shades(table.shape[1])), strict=True))
    order = {"order": list(named.index), "hue_order": list(named.columns)}
    ax = sns.stripplot(
        dots, x="top1", y="method", hue="budget", palette=colours, jitter=False, size=5.1, zorder=3, ax=ax, **order
    )
    ax.axvline(float_top1, color="#8a8a8a", linestyle="--", linewidth=1)
    ax.set(xlabel="top-1 on all test images (%)", ylabel="")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax
