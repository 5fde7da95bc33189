"""Tables and sources as chapters show them."""

from __future__ import annotations

import hashlib
import html
import inspect
import math
import re
import textwrap
from numbers import Number

import pandas as pd
from IPython.display import HTML, Markdown, display


def show_source(*functions: object) -> None:
    """Show the library's source of functions or classes in place."""
    display(Markdown(source_block(*functions)))


def source_block(*functions: object) -> str:
    """Return the source of functions or classes as one block of markdown."""
    source = "\n\n".join(textwrap.dedent(inspect.getsource(function)).rstrip() for function in functions)
    return fenced(source, "python")


def fenced(text: str, language: str) -> str:
    r"""Return a text as a block of markdown that shows it as it is, whatever it holds.

    >>> fenced("make pages", "bash")
    '```bash\nmake pages\n```'
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def plain(text: str) -> str:
    r"""Return a text so that markdown shows it as it is.

    >>> plain("<b>2*3*4</b>")
    '&lt;b&gt;2\\*3\\*4&lt;/b&gt;'
    """
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", html.escape(text, quote=False))


def show_table(table: pd.DataFrame, *, decimals: int = 2) -> None:
    """Show a table without its index, numbers rounded, texts as they are: nothing in them is taken for HTML."""
    table = table.rename(columns=lambda name: f"{name:g}" if isinstance(name, float) else name)
    others = table.select_dtypes("object")  # lists and the like: a style escapes texts alone
    table[others.columns] = others.map(
        lambda value: value if isinstance(value, Number) else str(value), na_action="ignore"
    )
    texts = [name for name in table.columns if table[name].astype(str).str.contains(" [a-zA-Z]").any()]
    prose = {"text-align": "left", "white-space": "normal", "min-width": "16em"}
    uuid = hashlib.blake2b(table.to_csv().encode(), digest_size=4).hexdigest()  # the same table, the same page
    style = table.style.set_uuid(uuid).format(precision=decimals, na_rep="–", escape="html").hide(axis="index")
    style.format_index(escape="html", axis="columns")
    headings = {name: [{"selector": "th", "props": [("text-align", "left")]}] for name in texts}
    style.set_properties(subset=texts, **prose).set_table_styles(headings, overwrite=False)
    display(HTML(style.to_html()))


def with_interval(table: pd.DataFrame, value: str, lo: str, hi: str, *, decimals: int = 2) -> list[str]:
    """Return a table's estimates as texts "value [lo, hi]"; a dash where there is none."""
    return [
        "–" if math.isnan(row[0]) else "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*row, d=decimals)
        for row in table[[value, lo, hi]].to_numpy()
    ]
