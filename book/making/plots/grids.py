"""Grids of coloured cells: layers against layers, methods or configurations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from book.making.palette import shades


def plot_interactions(effects: np.ndarray, marks: np.ndarray, *, names: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw the interaction of every pair of layers as a coloured square, with dots on the marked pairs.

    Args:
        effects: points of top-1, shape (S, S), symmetric.
        marks: bool, shape (S, S).
        names: of the S layers.
        ax: axes to draw on.
    """
    reach, diagonal = np.abs(effects).max(), np.eye(len(effects), dtype=bool)
    table = pd.DataFrame(effects, index=names, columns=names)
    bar = {"shrink": 0.8, "label": "interaction (points of top-1)"}
    ax = sns.heatmap(table, mask=diagonal, cmap="RdBu", vmin=-reach, vmax=reach, square=True, cbar_kws=bar, ax=ax)
    rows, columns = np.nonzero(marks)
    seen = {"color": "#333333", "markersize": 3, "markeredgecolor": "white", "markeredgewidth": 0.4}  # on any cell
    ax.plot(columns + 0.5, rows + 0.5, "o", **seen)
    _name_ticks(ax, names, names, sizes=(7, 7))
    return ax


def plot_sensitivity(shares: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how much each layer matters to each method as shaded squares; a line sets the last row apart.

    Args:
        shares: one row per method, one column per layer, values from 0 to 1.
        ax: axes to draw on.
    """
    bar = {"shrink": 0.8, "label": "share of the row's largest"}
    ax = sns.heatmap(shares.astype(float), cmap="Blues", vmin=0, vmax=1, cbar_kws=bar, ax=ax)
    ax.axhline(len(shares) - 1, color="#808080", linewidth=1)
    _name_ticks(ax, shares.columns, shares.index, sizes=(6.5, 8))
    return ax


def plot_heatmap(bits: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw configurations as rows of coloured cells, the width written into each.

    Args:
        bits: one row per configuration, one column per layer.
        ax: axes to draw on.
    """
    widths = np.unique(bits)
    places = pd.DataFrame(np.searchsorted(widths, bits.to_numpy()), index=bits.index, columns=bits.columns)
    written = {"annot": bits.to_numpy(), "fmt": "d", "annot_kws": {"fontsize": 7}}
    ax = sns.heatmap(places, cmap=ListedColormap(shades(len(widths))), cbar=False, ax=ax, **written)
    _name_ticks(ax, bits.columns, bits.index, sizes=(7, 8))
    return ax


def _name_ticks(ax: Axes, columns: Sequence[str], rows: Sequence[str], *, sizes: tuple[float, float]) -> None:
    """Name every column and every row, at these sizes of letters."""
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=60, ha="right", fontsize=sizes[0])
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0, fontsize=sizes[1])
    ax.set(xlabel="", ylabel="")
    ax.grid(visible=False)
