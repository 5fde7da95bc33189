"""Hashes of the code that decides numbers: a function with everything of this project that it reaches.

Read from the source files, without importing them. Comments, docstrings, formatting, the order of definitions and the
files that they stand in do not count, nor does the version of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import pathlib

PACKAGES = ("emq_lib", "book")
_SKIPPED = ("ctx", "kind", "type_comment", "type_params", "returns", "annotation")


def code_hash(*roots: str) -> str:
    """Return a hash of definitions and of all that they use, constants included.

    Args:
        roots: "package.module:name" of a function, class or constant, "package.module:Class.method", or
            "package.module" for a whole module.

    Raises:
        LookupError: no such module or name.

    >>> code_hash("emq_lib.core.costs:gather") == code_hash("emq_lib.core.costs:gather", "emq_lib.core.costs:selected")
    True
    """
    waiting: list[tuple[str, str]] = []
    for root in roots:
        module, _, name = root.partition(":")
        waiting += [(module, each) for each in ([name] if name else _read(module)[0])]
    found = {}
    while waiting:
        place = waiting.pop()
        if place not in found:
            found[place], reached = _described(*place)
            waiting += reached
    parts = sorted(json.dumps([name, text]) for (_, name), text in found.items())
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


@functools.cache
def _described(module: str, name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return a definition as text, and (module, name) of what it uses of this project."""
    definitions, imports = _read(module)
    nodes = _nodes(module, name)
    reached = {place for node in nodes for place in _reached(node, module, definitions, imports)}
    return json.dumps([_plain(node) for node in nodes]), tuple(sorted(reached))


@functools.cache
def _read(module: str) -> tuple[dict[str, list[ast.stmt]], dict[str, tuple[str, str]]]:
    """Return a module's definitions by name, and what its imports bind: name -> (module, name there or "")."""
    place = importlib.util.find_spec(module)
    if place is None or place.origin is None:
        raise LookupError(f"There is no module {module}.")
    definitions: dict[str, list[ast.stmt]] = {}
    imports: dict[str, tuple[str, str]] = {}
    latest: list[str] = []
    for node in ast.parse(pathlib.Path(place.origin).read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= _bound(node)
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        names = _defined(node)
        latest = names or latest  # a loop or a call that fills what stands before it belongs to that
        for name in latest:
            definitions.setdefault(name, []).append(node)
    return definitions, imports


def _nodes(module: str, name: str) -> list[ast.stmt]:
    """Return the statements that define a name of a module, or a method of a class there."""
    first, _, method = name.partition(".")
    nodes = _read(module)[0].get(first, [])
    if method:
        nodes = [inner for node in nodes for inner in getattr(node, "body", []) if _defined(inner) == [method]]
    if not nodes:
        raise LookupError(f"{module} defines no {name}.")
    return nodes


def _bound(node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str]]:
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name: (alias.name, "") for alias in node.names}
    return {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, ast.For):
        return []
    return [part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]


def _reached(
    node: ast.stmt, module: str, definitions: dict[str, list[ast.stmt]], imports: dict[str, tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return (module, name) of what a definition uses of this project."""
    local = dict(imports)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import | ast.ImportFrom):
            local |= _bound(inner)
    reached = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id in definitions:
            reached.append((module, inner.id))
        elif isinstance(inner, ast.Name) and inner.id in local:
            source, name = local[inner.id]
            if source.partition(".")[0] in PACKAGES and name in _definitions(source):
                reached.append((source, name))
        elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id in local:
            source = ".".join(filter(None, local[inner.value.id]))
            if source.partition(".")[0] in PACKAGES and inner.attr in _definitions(source):
                reached.append((source, inner.attr))
    return reached


def _definitions(module: str) -> dict[str, list[ast.stmt]]:
    try:
        return _read(module)[0]
    except (LookupError, ModuleNotFoundError):
        return {}


def _plain(value: object) -> object:
    """Return a syntax tree as nested lists without what does not count."""
    if isinstance(value, ast.AST):
        fields = [(name, part) for name, part in ast.iter_fields(value) if name not in _SKIPPED]
        body = getattr(value, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
            fields = [(name, body[1:] if name == "body" else part) for name, part in fields]
        return [type(value).__name__, *([name, _plain(part)] for name, part in fields if part not in (None, []))]
    return [_plain(part) for part in value] if isinstance(value, list) else repr(value)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
