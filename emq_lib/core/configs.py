"""Configurations as text, and the names of their slots."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd


def bits_text(config: Sequence[int]) -> str:
    """Return a configuration as text, one digit per slot.

    >>> bits_text([2, 4, 3])
    '243'
    """
    return "".join(str(int(bits)) for bits in config)


def parse_bits(text: str) -> tuple[int, ...]:
    """Undo :func:`bits_text`."""
    return tuple(int(digit) for digit in text)


def slot_names(layers: pd.DataFrame) -> pd.Index:
    """Return a name for every slot of a layer table: that of its first layer; others may share its width."""
    return pd.Index(layers.query("searchable").drop_duplicates("slot").sort_values("slot")["name"])
