"""Configurations as text, and the names of their slots."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from emq_lib.core.checks import bit_width
from emq_lib.core.errors import InvalidBitsError


def bits_text(config: Sequence[int]) -> str:
    """Return a configuration as text, one digit per slot.

    Raises:
        InvalidBitsError: a width that is no whole number from 1 to 8.

    >>> bits_text([2, 4, 3])
    '243'
    """
    return "".join(str(bit_width(bits, "a configuration")) for bits in config)


def parse_bits(text: str) -> tuple[int, ...]:
    """Undo :func:`bits_text`.

    Raises:
        InvalidBitsError: it is no text of digits from 1 to 8.

    >>> parse_bits("243")
    (2, 4, 3)
    """
    if not (isinstance(text, str) and re.fullmatch("[1-8]+", text)):
        raise InvalidBitsError(f"a configuration is one digit from 1 to 8 per slot, as '243'; got {text!r:.60}.")
    return tuple(map(int, text))


def slot_names(layers: pd.DataFrame) -> pd.Index:
    """Return a name for every slot of a layer table: that of its first layer; others may share its width."""
    return pd.Index(layers.query("searchable").drop_duplicates("slot").sort_values("slot")["name"])
