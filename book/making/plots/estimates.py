"""Estimates with the intervals that were computed for them, which seaborn would compute anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from book.making.palette import COLOURS


def plot_forest(
    table: pd.DataFrame,
    *,
    bands: Mapping[str, tuple[float, float]] | None = None,
    others: pd.Series | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw estimates with their intervals, one row each, the largest on top.

    Args:
        table: columns proxy, rho100, lo, hi.
        bands: label -> (lo, hi) drawn as vertical bands (noise ceiling, oracle).
        others: proxy -> a second value, drawn as a hollow dot.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    ordered = table.sort_values("rho100").reset_index(drop=True)
    for label, (lo, hi) in (bands or {}).items():
        colour = COLOURS.get(label, "#999999")
        ax.axvspan(lo, hi, color=colour, alpha=0.25)
        ax.annotate(
            label, (lo, -0.9), xytext=(-4, 0), textcoords="offset points", ha="right", va="center", color=colour
        )
    for row in ordered.itertuples():
        colour = COLOURS.get(row.proxy, "#999999")
        ax.plot([row.lo, row.hi], [row.Index, row.Index], color=colour, linewidth=2)
        ax.plot(row.rho100, row.Index, "o", color=colour)
        if others is not None:
            ax.plot(others[row.proxy], row.Index, "o", color=colour, fillstyle="none", markersize=5)
    ax.set_yticks(range(len(ordered)), ordered["proxy"])
    ax.set(xlabel="Spearman's rho on the held-out configurations", ylim=(-1.5, len(ordered) - 0.5))
    return ax


def plot_forests(
    tables: Mapping[str, pd.DataFrame], *, bands: Mapping[str, tuple[float, float]], order: Sequence[str]
) -> Figure:
    """Draw the estimates of several studies side by side, one panel each, the same rows in all.

    Args:
        tables: study -> columns proxy, rho100, lo, hi.
        bands: study -> (lo, hi) of its noise ceiling, drawn as a vertical band.
        order: the rows, from top to bottom.
    """
    figure, axes = plt.subplots(1, len(tables), figsize=(6.5, 1 + 0.19 * len(order)), sharey=True, squeeze=False)
    for (study, table), ax in zip(tables.items(), axes[0], strict=True):
        ax.axvspan(*bands[study], color=COLOURS["noise ceiling"], alpha=0.25)
        for place, row in enumerate(table.set_index("proxy").reindex(order[::-1]).itertuples()):
            colour = COLOURS.get(row.Index, "#999999")
            ax.plot([row.lo, row.hi], [place, place], color=colour, linewidth=1.6)
            ax.plot(row.rho100, place, "o", color=colour, markersize=3.5)
        ax.set_title(study, fontsize=8)
        ax.set(xlim=(min(-0.3, table["lo"].min()), 1.02), xlabel="rho")
    axes[0][0].set_yticks(range(len(order)), order[::-1], fontsize=7.5)
    return figure


def plot_quality(table: pd.DataFrame, *, labelled: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw rho against seconds on a logarithmic axis, one point per proxy, with its interval.

    Args:
        table: columns proxy, seconds, rho100, lo, hi.
        labelled: the proxies whose names are written beside their points.
        ax: axes to draw on.
    """
    from adjustText import adjust_text

    ax, texts = ax or plt.gca(), []
    ax.set_xscale("log")
    for row in table.itertuples():
        colour, x = COLOURS.get(row.proxy, "#b0b0b0"), max(row.seconds, 1e-3)
        ax.plot([x, x], [row.lo, row.hi], color=colour, linewidth=1)
        ax.plot(x, row.rho100, "o", color=colour, markersize=5)
        if row.proxy in labelled:
            texts.append(ax.text(x, row.rho100, row.proxy, fontsize=7.5, color=colour))
    ax.set(xlabel="seconds", ylabel="rho on the held-out half")
    ax.margins(x=0.15)
    points = (table["seconds"].clip(lower=1e-3).to_numpy(), table["rho100"].to_numpy())
    adjust_text(texts, *points, ax=ax, arrowprops={"arrowstyle": "-", "color": "#808080", "linewidth": 0.6})
    return ax
