"""Plots: each draws what it is given on the axes that it is given, and nothing else."""

from book.making.plots.curves import plot_by_bits, plot_curves, plot_front, plot_growth, plot_quantizers
from book.making.plots.estimates import plot_forest, plot_forests, plot_quality
from book.making.plots.formulas import plot_genotype
from book.making.plots.grids import plot_heatmap, plot_interactions, plot_sensitivity
from book.making.plots.points import plot_dots, plot_histogram, plot_samples, plot_scatter, plot_sizes

__all__ = [
    "plot_by_bits",
    "plot_curves",
    "plot_dots",
    "plot_forest",
    "plot_forests",
    "plot_front",
    "plot_genotype",
    "plot_growth",
    "plot_heatmap",
    "plot_histogram",
    "plot_interactions",
    "plot_quality",
    "plot_quantizers",
    "plot_samples",
    "plot_scatter",
    "plot_sensitivity",
    "plot_sizes",
]
