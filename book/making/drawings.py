"""The book's mark, as SVG: one column per layer, as many blocks as the layer has bits."""

from __future__ import annotations

import pathlib

from book.making.palette import COLOURS
from emq_lib.core.files import write_bytes

BITS = (4, 2, 3, 2)
TITLE = "EMQ, rebuilt"


def draw_mark(*, title: str = "") -> str:
    """Return the mark as SVG text, 32 units high, with a title at its right if one is given."""
    blocks = "".join(
        f'<rect x="{1 + 8 * layer}" y="{25 - 8 * bit}" width="6" height="6" rx="1.2"/>'
        for layer, bits in enumerate(BITS)
        for bit in range(bits)
    )
    name = f'<text x="40" y="25" font-size="21" font-weight="600" fill="#808080">{title}</text>' if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {170 if title else 32} 32" font-family="sans-serif">'
        f'<g fill="{COLOURS["evolved"]}">{blocks}</g>{name}</svg>\n'
    )


def draw_static(folder: pathlib.Path) -> None:
    """Write the favicon and the logo into `folder`."""
    for name, title in (("favicon.svg", ""), ("logo.svg", TITLE)):
        write_bytes(folder / name, draw_mark(title=title).encode())
