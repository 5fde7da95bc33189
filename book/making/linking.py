"""Sphinx extension: the first use of each word and symbol on a page links to its definition in ``notation.md``."""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

DEFINITIONS = "book/notation"
SYMBOL = "symbol-"  # ids of symbols begin with this
_LEFT_ALONE = (nodes.reference, nodes.target, nodes.literal, nodes.caption, nodes.title, nodes.table, nodes.raw)


def collect_symbols(app: Sphinx, doctree: nodes.document) -> None:
    """Remember the symbols that the page of definitions marks, by their LaTeX."""
    if app.env.docname == DEFINITIONS:
        spans = [span for span in doctree.findall(nodes.inline) if span["ids"] and span["ids"][0].startswith(SYMBOL)]
        app.env.emq_symbols = {span.astext(): span["ids"][0] for span in spans}


def link_first_uses(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Link the first use of each word and symbol in a page's paragraphs."""
    if docname == DEFINITIONS or not docname.startswith("book/"):
        return
    glossary = app.env.get_domain("std")._terms
    words = {word: label for word, (page, label) in glossary.items() if page == DEFINITIONS}
    symbols = dict(app.env.emq_symbols)
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if _within(paragraph, _LEFT_ALONE):
            continue
        for node in list(paragraph.findall(lambda node: isinstance(node, nodes.Text | nodes.math))):
            if isinstance(node, nodes.math):
                found = next((symbol for symbol in symbols if _uses(node.astext(), symbol)), None)
                if found and not _within(node, _LEFT_ALONE):
                    node.replace_self(_link(app, docname, symbols.pop(found), node.deepcopy()))
            elif not _within(node, (*_LEFT_ALONE, nodes.math)):
                _link_words(app, docname, node, words)


def _link_words(app: Sphinx, docname: str, text: nodes.Text, words: dict[str, str]) -> None:
    """Link the first use of each of `words` in a text, and take those that were found out of `words`."""
    pieces, rest = [], text.astext()
    while words:
        longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        found = re.search(rf"(?<![\w@-])({longest_first})(?:s)?(?![\w@-])", rest, flags=re.IGNORECASE)
        if not found:
            break
        label = words.pop(found[1].lower())
        pieces += [nodes.Text(rest[: found.start()]), _link(app, docname, label, nodes.Text(found[0]))]
        rest = rest[found.end() :]
    if pieces:
        text.parent.replace(text, [*pieces, nodes.Text(rest)])


def _uses(formula: str, symbol: str) -> bool:
    r"""Return whether a formula contains a symbol as a symbol of its own.

    >>> _uses(r"L \times |B|", "L"), _uses("E_b", "E"), _uses(r"\rho@20", r"\rho")
    (True, False, True)
    """
    return re.search(rf"(?<![A-Za-z\\]){re.escape(symbol)}(?![A-Za-z_'\[])", formula) is not None


def _within(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    """Return whether a node or one that holds it is of these kinds."""
    while node is not None:
        if isinstance(node, kinds):
            return True
        node = node.parent
    return False


def _link(app: Sphinx, docname: str, label: str, content: nodes.Node) -> nodes.reference:
    """Return a quiet link to a definition."""
    link = make_refnode(app.builder, docname, DEFINITIONS, label, content)
    link["classes"].append("defined")
    link["reftitle"] = f"What {content.astext()} means"  # formulas have no other name that a screen reader could say
    return link


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("doctree-read", collect_symbols)
    app.connect("doctree-resolved", link_first_uses)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
