"""Genotypes as boxes and lines."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from book.making.palette import COLOURS
from emq_lib.evolution.genotypes import Genotype, canonical


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
