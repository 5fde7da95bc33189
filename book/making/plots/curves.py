"""Lines: what changes along layers, budgets, evaluations and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from book.making.palette import COLOURS, shades

_EVERY_POINT = {"estimator": None, "marker": "o", "markeredgewidth": 0}  # no mean, no interval of seaborn's own


def plot_by_bits(effects: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the mean top-1 of configurations by the bits of each layer.

    Args:
        effects: index layer names, one column per bit width.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    for (bits, column), colour in zip(effects.items(), shades(effects.shape[1]), strict=True):
        sns.lineplot(x=range(len(column)), y=column.to_numpy(), markersize=3, color=colour, ax=ax, **_EVERY_POINT)
        _name_line(ax, f"{bits} bits", len(column) - 1, column.iloc[-1], color=colour)
    ax.set_xticks(range(len(effects)), effects.index, rotation=60, ha="right", fontsize=7)
    ax.set(ylabel="mean top-1 (%)")
    ax.margins(x=0.08)
    return ax


def plot_curves(
    curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], *, xlabel: str, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Draw families of curves, each family in one colour.

    Args:
        curves: label -> list of (x, y), one pair per seed.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        ax: axes to draw on.
    """
    points = pd.concat(
        pd.DataFrame({"x": x, "y": y, "label": label, "run": f"{label} {index}"})
        for label, family in curves.items()
        for index, (x, y) in enumerate(family)
    )
    every_run = {"units": "run", "estimator": None, "drawstyle": "steps-post", "alpha": 0.6, "linewidth": 1.2}
    ax = sns.lineplot(points, x="x", y="y", hue="label", palette=_colours(curves), ax=ax, **every_run)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def plot_front(points: pd.DataFrame, *, x: str, ax: Axes | None = None) -> Axes:
    """Draw measured top-1 against a cost, one line per method.

    Args:
        points: columns proxy, top1 and the cost column named by `x`.
        x: name of the cost column.
        ax: axes to draw on.
    """
    colours = _colours(points["proxy"].unique())
    ax = sns.lineplot(points, x=x, y="top1", hue="proxy", palette=colours, markersize=4, ax=ax, **_EVERY_POINT)
    ax.set(ylabel="top-1 on all test images (%)")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def plot_growth(runs: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw seconds against the number of configurations, one line per study, on logarithmic axes.

    Dashed is growth in proportion from each line's first point.

    Args:
        runs: study -> columns configurations and seconds, increasing.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    for name, run in runs.items():
        x, y = run["configurations"].to_numpy(), run["seconds"].to_numpy()
        (line,) = ax.loglog(x, y, "o-", markersize=5)
        ax.loglog(x, y[0] * x / x[0], "--", color=line.get_color(), linewidth=0.8)
        _name_line(ax, name, x[-1], y[-1], color=line.get_color(), fontsize=8)
    ax.set(xlabel="configurations", ylabel="seconds")
    ax.margins(x=0.35)
    return ax


def plot_quantizers(panels: Mapping[str, pd.Series], *, float_top1: float) -> Figure:
    """Draw top-1 with intervals against average bits, one panel per quantizer and one line per method.

    Args:
        panels: quantizer -> means (with value, lo and hi), index (average_bits, proxy).
        float_top1: accuracy of the float network.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5, 3.6), sharey=True, squeeze=False)
    for (quantizer, means), ax in zip(panels.items(), axes[0], strict=True):
        for proxy, group in means.groupby(level="proxy", sort=False):
            ordered, colour = (group.droplevel("proxy").sort_index(), COLOURS[proxy])
            values = np.array([(mean.value, mean.lo, mean.hi) for mean in ordered])
            wide = proxy == "random"  # its interval spans configurations, and would hide the others
            errors = None if wide else np.abs(values[:, 1:] - values[:, :1]).T
            style = "o" if proxy == "uniform" else "o-"
            ax.errorbar(
                ordered.index, values[:, 0], errors, fmt=style, color=colour, markersize=3, linewidth=1, label=proxy
            )
        ax.axhline(float_top1, color="#8a8a8a", linestyle="--", linewidth=1)
        ax.set_title(quantizer, fontsize=8)
        ax.set_xlabel("average bits")
    axes[0][0].set_ylabel("top-1 on unseen images (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7.5)
    return figure


def _name_line(ax: Axes, name: str, x: float, y: float, **style: object) -> None:
    """Write a line's name right of its last point."""
    ax.annotate(name, (x, y), xytext=(6, 0), textcoords="offset points", va="center", **style)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Return the colours of methods; those without one of their own are grey."""
    return {name: COLOURS.get(name, "#999999") for name in names}
