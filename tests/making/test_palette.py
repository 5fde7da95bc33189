"""Colours: one per method, each to be seen on a white and on a dark page."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from book.making import palette

SAME = ({"evolved", "evolution"}, {"random", "random search"})  # a proxy's name and that of the search that found it


def luminance(colour):
    """Return the relative luminance as WCAG 2.1 defines it."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("ground", ["#ffffff", "#14181e"])
def test_every_colour_stands_out_from_the_page(ground):
    colours = [*palette.COLOURS.values(), *palette.SAMPLE_COLOURS.values(), palette.PLAIN]
    colours += [tuple(shade[:3]) for shade in palette.shades(5)]
    for colour in colours:
        low, high = sorted((luminance(colour), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 2, colour


def test_no_two_methods_share_a_colour():
    names = [name for name in palette.COLOURS if name not in {"evolution", "random search"}]
    assert len({palette.COLOURS[name] for name in names}) == len(names)
    assert all(len({palette.COLOURS[name] for name in pair}) == 1 for pair in SAME)
    assert palette.PLAIN not in palette.COLOURS.values()


def test_shades_run_from_dark_to_light():
    assert (np.diff([luminance(shade[:3]) for shade in palette.shades(5)]) > 0).all()
