"""Hashes of the code that decides numbers: a function with everything of this project that it reaches.

Read from the source files, without importing them. Comments, docstrings, annotations, messages of errors, formatting,
the order of definitions and the files that they stand in do not count, nor does the version of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

PACKAGES = ("emq_lib", "book")
_SKIPPED = ("ctx", "kind", "type_comment", "type_params", "returns", "annotation", "simple")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass
class _Module:
    """What a module defines, name -> statements, and what its imports bind, name -> dotted name."""

    name: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)


def code_hash(*roots: str, neutral: Sequence[str] = ()) -> str:
    """Return a hash of definitions and of all that they use, constants included.

    What is looked up by name at run time is not seen: give the whole module of a registry that decorators fill.

    Args:
        roots: "package.module:name" of a function, class or constant, "package.module:Class.method", or
            "package.module" for a whole module.
        neutral: modules that change no number; nothing in them counts that is no root.

    Raises:
        LookupError: no such module or name.

    >>> code_hash("emq_lib.core.costs:gather") == code_hash("emq_lib.core.costs:gather", "emq_lib.core.costs:selected")
    True
    """
    parts = sorted(json.dumps([name, _described(module, name)[0]]) for module, name in reached(*roots, neutral=neutral))
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def reached(*roots: str, neutral: Sequence[str] = ()) -> set[tuple[str, str]]:
    """Return (module, name) of the definitions that :func:`code_hash` reads."""
    waiting: list[tuple[str, str]] = []
    for root in roots:
        module, _, name = root.partition(":")
        waiting += [(module, each) for each in ([name] if name else _read(module).definitions)]
    found: set[tuple[str, str]] = set()
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            waiting += [other for other in _described(*place)[1] if other[0] not in neutral]
    return found


@functools.cache
def _described(module: str, name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return a definition as text, and (module, name) of what it uses of this project."""
    read, nodes, used = _read(module), _nodes(module, name), set()
    for node in nodes:
        known = read.imports | dict(_bound(node, module))
        used |= {place for dotted in set(_names(node)) for place in _places(dotted, read, known)}
    return json.dumps([_plain(node) for node in nodes]), tuple(sorted(used))


@functools.cache
def _read(module: str) -> _Module:
    """Return what a module defines and imports.

    Raises:
        LookupError: there is no such module in the project.
    """
    path = _path(module)
    if path is None:
        raise LookupError(f"There is no module {module}.")
    read, rest = _Module(module), []
    for node in ast.parse(path.read_bytes()).body:
        read.imports |= dict(_bound(node, module, is_package=path.name == "__init__.py"))
        names = set(_defined(node))
        for name in names:
            read.definitions.setdefault(name, []).append(node)
        if not names and not isinstance(node, ast.Import | ast.ImportFrom):
            rest.append(node)
    for node in rest:  # a loop or a call belongs to the constants that it mentions, which it may fill
        for name in {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & set(read.definitions):
            if not isinstance(read.definitions[name][0], _FUNCTIONS):
                read.definitions[name].append(node)
    return read


@functools.cache
def _path(module: str) -> pathlib.Path | None:
    """Return the file of a module of the project; None if it is no such module."""
    package, *names = module.split(".")
    if package not in PACKAGES:
        return None
    spec = importlib.util.find_spec(package)  # of a package without a dot, so that nothing is imported
    for folder in spec.submodule_search_locations if spec else ():
        place = pathlib.Path(folder, *names)
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def _nodes(module: str, name: str) -> list[ast.stmt]:
    """Return the statements that define a name of a module, or a method of a class there."""
    first, _, method = name.partition(".")
    nodes = _read(module).definitions.get(first, [])
    if method:
        nodes = [inner for node in nodes for inner in getattr(node, "body", []) if method in _defined(inner)]
    if not nodes:
        raise LookupError(f"{module} defines no {name}.")
    return nodes


def _bound(node: ast.AST, module: str, *, is_package: bool = False) -> Iterator[tuple[str, str]]:
    """Yield what the imports inside a statement bind: a name, and the dotted name that it stands for."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            for alias in inner.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
        elif isinstance(inner, ast.ImportFrom):
            parents = module.split(".") + ["__init__"] * is_package
            start = ".".join(parents[: -inner.level]) if inner.level else ""
            source = ".".join(filter(None, (start, inner.module)))
            for alias in inner.names:
                yield alias.asname or alias.name, f"{source}.{alias.name}"


def _defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines, those inside "if", "try" and "with" included."""
    if isinstance(node, _FUNCTIONS):
        return [node.name]
    if isinstance(node, ast.If | ast.Try | ast.With):
        inner = (part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt | ast.ExceptHandler))
        return [name for part in inner for name in _defined(part)]
    if isinstance(node, ast.ExceptHandler):
        return [name for part in node.body for name in _defined(part)]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, ast.For):
        return []
    return [part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]


def _names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a statement mentions, each with the attributes behind it: "ranking.spearman"."""
    attributes, at = [], node
    while isinstance(at, ast.Attribute):
        attributes.append(at.attr)
        at = at.value
    if isinstance(at, ast.Name):
        yield ".".join([at.id, *reversed(attributes)])
        return
    for inner in ast.iter_child_nodes(node):
        if not isinstance(node, ast.Raise):
            yield from _names(inner)


def _places(dotted: str, read: _Module, known: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Return (module, name) of what a mentioned name stands for, given what the names of imports stand for."""
    first, *attributes = dotted.split(".")
    if first in read.definitions:
        return [(read.name, first)]
    return _resolved((*known[first].split("."), *attributes)) if first in known else []


def _resolved(parts: tuple[str, ...]) -> Iterable[tuple[str, str]]:
    """Return (module, name) of a dotted name; all that a module defines where it is passed whole."""
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        if _path(module) is None:
            continue
        read, rest = _read(module), parts[cut:]
        if not rest:
            return [(module, name) for name in read.definitions]
        if rest[0] in read.definitions:
            return [(module, rest[0])]
        return _resolved((*read.imports[rest[0]].split("."), *rest[1:])) if rest[0] in read.imports else []
    return []


def _plain(value: object) -> object:
    """Return a syntax tree as nested lists without what does not count."""
    if isinstance(value, ast.Raise):
        return "Raise"
    if isinstance(value, ast.AnnAssign) and value.value is not None:
        return _plain(ast.Assign([value.target], value.value))
    if isinstance(value, ast.AST):
        fields = [(name, part) for name, part in ast.iter_fields(value) if name not in _SKIPPED]
        body = getattr(value, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
            fields = [(name, body[1:] if name == "body" else part) for name, part in fields]
        return [type(value).__name__, *([name, _plain(part)] for name, part in fields if part not in (None, []))]
    return [_plain(part) for part in value] if isinstance(value, list) else repr(value)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
