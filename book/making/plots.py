"""Plots: each draws what it is given, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from book.making.palette import COLOURS, PLAIN, SAMPLE_COLOURS, shades
from emq_lib.evolution.genotypes import Genotype, canonical


def plot_histogram(values: np.ndarray, marks: Mapping[str, float], *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a histogram of configurations with vertical marks, e.g. the uniform configurations, from low to high."""
    ax = ax or plt.gca()
    ax.hist(values, bins=40, color=COLOURS["random"], alpha=0.6)
    ordered = sorted(marks.items(), key=lambda mark: mark[1])
    for (label, value), colour in zip(ordered, shades(len(marks)), strict=True):
        ax.axvline(value, color=colour, linewidth=1.6, label=f"{label} ({value:.1f})")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.1, 1))
    ax.set(xlabel=xlabel, ylabel="configurations")
    return ax


def plot_by_bits(effects: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the mean top-1 of configurations by the bits of each layer.

    Args:
        effects: index layer names, one column per bit width.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    for (bits, column), colour in zip(effects.items(), shades(effects.shape[1]), strict=True):
        ax.plot(column.to_numpy(), marker="o", markersize=3, color=colour)
        ax.annotate(
            f"{bits} bits",
            (len(column) - 1, column.iloc[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    ax.set_xticks(range(len(effects)), effects.index, rotation=60, ha="right", fontsize=7)
    ax.set(ylabel="mean top-1 (%)")
    ax.margins(x=0.08)
    return ax


def plot_scatter(
    x: np.ndarray, y: np.ndarray, *, colour: str, xlabel: str, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Draw one point per configuration."""
    ax = ax or plt.gca()
    ax.scatter(x, y, s=9, color=colour, alpha=0.6, linewidths=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def plot_samples(samples: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw top-1 against packed size, one colour per sample of the bench; the uniform ones are joined by a line.

    Args:
        samples: sample -> its rows of the bench.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    for name, table in samples.items():
        style = "o-" if name == "uniform" else "o"
        size = 6 if name == "uniform" else 3
        ordered = table.sort_values("size_bytes")
        ax.plot(
            ordered["size_bytes"] / 2**10,
            ordered["top1"],
            style,
            markersize=size,
            color=SAMPLE_COLOURS[name],
            alpha=1 if name == "uniform" else 0.6,
            markeredgewidth=0,
            label=f"{name} ({len(table)})",
        )
    ax.set(xlabel="packed size (KiB)", ylabel="top-1 (%)")
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
        ax.annotate(
            name,
            (x[-1], y[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=line.get_color(),
        )
    ax.set(xlabel="configurations", ylabel="seconds")
    ax.margins(x=0.35)
    return ax


def plot_sizes(sizes: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the time of one configuration on one image against a network's multiply-accumulates, on logarithmic axes.

    Args:
        sizes: index profile, columns "MACs per image" and "microseconds" of one configuration on one image.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    ax.loglog(sizes["MACs per image"], sizes["microseconds"], "o", color=PLAIN)
    for line, (name, row) in enumerate(sizes.sort_values("microseconds").iterrows()):
        place = {"xytext": (4, -12 if line % 2 else 5), "textcoords": "offset points"}
        ax.annotate(name, (row["MACs per image"], row["microseconds"]), fontsize=8, **place)
    ax.set(xlabel="multiply-accumulates for one image", ylabel="microseconds")
    ax.margins(x=0.3)
    return ax


def plot_interactions(effects: np.ndarray, marks: np.ndarray, *, names: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw the interaction of every pair of layers as a coloured square, with dots on the marked pairs.

    Args:
        effects: points of top-1, shape (S, S), symmetric.
        marks: bool, shape (S, S).
        names: of the S layers.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    shown = np.where(np.eye(len(effects), dtype=bool), np.nan, effects)
    reach = np.abs(effects).max()
    image = ax.imshow(shown, cmap="RdBu", vmin=-reach, vmax=reach)
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="interaction (points of top-1)")
    rows, columns = np.nonzero(marks)
    ax.plot(columns, rows, "o", color="#333333", markersize=2.5)
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.grid(visible=False)
    return ax


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


def plot_sensitivity(shares: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how much each layer matters to each method as shaded squares.

    Args:
        shares: one row per method, one column per layer, values from 0 to 1.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    image = ax.imshow(shares.to_numpy(dtype=float), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="share of the row's largest")
    ax.axhline(len(shares) - 1.5, color="#808080", linewidth=1)
    ax.set_xticks(range(shares.shape[1]), shares.columns, rotation=60, ha="right", fontsize=6.5)
    ax.set_yticks(range(len(shares)), shares.index, fontsize=8)
    ax.grid(visible=False)
    return ax


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
    ax = ax or plt.gca()
    for label, family in curves.items():
        colour = COLOURS.get(label, "#999999")
        for index, (x, y) in enumerate(family):
            ax.step(x, y, where="post", color=colour, alpha=0.6, linewidth=1.2, label=label if index == 0 else None)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def plot_genotype(genotype: Genotype, *, ax: Axes | None = None) -> Axes:
    """Draw a genotype as boxes from its inputs on the left to the sum over layers on the right."""
    ax = ax or plt.gca()
    short = canonical(genotype)
    columns = []
    if short.structure == "dag":
        columns = [list(short.inputs), *([", ".join(chain)] for chain in short.chains), ["mean of the nodes"]]
    else:
        longest = max(len(chain) for chain in short.chains[: len(short.inputs)])
        columns = [list(short.inputs)]
        for step in range(longest):
            columns.append([dict(enumerate(chain)).get(step, "") for chain in short.chains[: len(short.inputs)]])
        rest = [short.binary, *short.chains[2]] if short.structure == "branched" else []
        columns += [[name] for name in rest if name != "no_op"]
    columns.append([f"{short.aggregation} over layers"])
    for x, names in enumerate(columns):
        for y, name in zip(np.linspace(0.5, -0.5, len(names)) if len(names) > 1 else [0.0], names, strict=True):
            box = {"boxstyle": "round,pad=0.4", "facecolor": "none", "edgecolor": COLOURS["evolved"]}
            if name not in ("", "no_op"):
                ax.text(x, y, name, ha="center", va="center", fontsize=8, bbox=box)
            if x:
                before = columns[x - 1]
                places = np.linspace(0.5, -0.5, len(before)) if len(before) > 1 else [0.0]
                for start in places if len(names) == 1 else [y]:
                    source = before[list(places).index(start)]
                    ends = [0 if shown in ("", "no_op") else 4 + 2.6 * len(shown) for shown in (source, name)]
                    line = {"arrowstyle": "-", "color": "#999999", "shrinkA": ends[0], "shrinkB": ends[1]}
                    ax.annotate("", (x, y), (x - 1, start), arrowprops=line)
    ax.set(xlim=(-0.4, len(columns) - 0.4), ylim=(-1, 1))
    ax.axis("off")
    return ax


def plot_front(points: pd.DataFrame, *, x: str, ax: Axes | None = None) -> Axes:
    """Draw measured top-1 against a cost, one line per method.

    Args:
        points: columns proxy, top1 and the cost column named by `x`.
        x: name of the cost column.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    for name, group in points.groupby("proxy", sort=False):
        ordered, colour = group.sort_values(x), COLOURS.get(name, "#999999")
        ax.plot(ordered[x], ordered["top1"], marker="o", markersize=4, color=colour, label=name)
    ax.set(ylabel="top-1 on all test images (%)")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
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


def plot_heatmap(bits: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw configurations as rows of coloured cells, the width written into each.

    Args:
        bits: one row per configuration, one column per layer.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    widths = np.unique(bits)
    places = np.searchsorted(widths, bits.to_numpy())
    ax.imshow(places, cmap=ListedColormap(shades(len(widths))), aspect="auto")
    for row, column in np.ndindex(bits.shape):
        value = bits.iat[row, column]
        ax.text(
            column,
            row,
            str(value),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if value < widths[-1] else "black",
        )
    ax.set_xticks(range(bits.shape[1]), bits.columns, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(bits.shape[0]), bits.index, fontsize=8)
    ax.grid(visible=False)
    return ax


def plot_dots(table: pd.DataFrame, *, float_top1: float, ax: Axes | None = None) -> Axes:
    """Draw one row per method, the first on top, and one symbol per budget; a dashed line is the float accuracy.

    Args:
        table: top-1 in percent, index method, one column per number of average bits; entries may be missing.
        float_top1: accuracy of the float network.
        ax: axes to draw on.
    """
    ax = ax or plt.gca()
    ordered = table[::-1]
    for (average, column), shade in zip(ordered.items(), shades(table.shape[1]), strict=True):
        ax.scatter(column, range(len(column)), color=shade, s=26, label=f"{average:g} bits", zorder=3)
    ax.axvline(float_top1, color="#8a8a8a", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(ordered)), ordered.index)
    ax.set(xlabel="top-1 on all test images (%)")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax
