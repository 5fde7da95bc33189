"""The palette: a colour means one method throughout, and each is legible on white and on near-black."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

COLOURS = {
    "bit sum": "#999999",
    "parameter bits": "#7f7f7f",
    "BOPs": "#b3b3b3",
    "bit-SNIP": "#e69f00",
    "bit-Synflow": "#c98a00",
    "HAWQ": "#2f9ed6",
    "HAWQ-V2": "#56b4e9",
    "OMPQ": "#b58900",
    "QE": "#7a9a01",
    "EMQ": "#9c4221",
    "CLADO": "#7b3294",
    "added logit changes": "#b07cc6",
    "Fisher error": "#0072b2",
    "relative weight error": "#cc79a7",
    "relative output error": "#a6558a",
    "one-layer KL": "#66c2a5",
    "sqrt one-layer KL": "#009e73",
    "evolved": "#d55e00",
    "evolved for rho": "#f28e4b",
    "evolved for allocation": "#a8324a",
    "evolved with pairs": "#963c00",
    "transferred for rho": "#c2477f",
    "transferred with pairs": "#9c3a73",
    "additive oracle": "#8c6d1f",
    "pairwise oracle": "#7a6320",
    "noise ceiling": "#8a8a8a",
    "uniform": "#5a6e8c",
    "random": "#b0b0b0",
    "best of random": "#5b8c5a",
    "evolution": "#d55e00",
    "random search": "#b0b0b0",
}
SAMPLE_COLOURS = {
    "random": COLOURS["random"],
    "stratified": "#5b5fc7",
    "one-off": "#c9577a",
    "uniform": COLOURS["uniform"],
}
PLAIN = "#708090"  # what is no method and no sample


def shades(count: int) -> np.ndarray:
    """Return colours of an ordered quantity (bits, budgets) from few to many, shape (count, 4)."""
    return plt.get_cmap("viridis")(np.linspace(0.25, 0.72, count))
