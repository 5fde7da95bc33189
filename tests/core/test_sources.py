"""Hashes of code: they change with what decides a number, and with nothing else."""

import sys
import textwrap
import time

import pytest

from book.studies.files import FILES, NEUTRAL
from emq_lib.core import sources
from emq_lib.core.sources import code_hash, reached

PLAIN = {
    "__init__": "",
    "a": """
        '''Module.'''
        import emq_sample.b
        import emq_sample.c as alias
        from emq_sample import d
        from emq_sample.b import helper as renamed
        from . import e
        from .e import relative
        from .sub import inside

        FACTOR: float = 2
        TABLE = {"square": lambda x: x * x}
        TABLE["cube"] = alias.cube
        LOOSE = {}
        for name in ("p", "q"):
            LOOSE[name] = 1
        try:
            import numpy as np
        except ImportError:
            np = None
        if FACTOR:
            BRANCH = 1
        else:
            BRANCH = 2

        def decorated(function):
            return function

        @decorated
        def root(x, scale=FACTOR):
            '''Doc.'''
            # comment
            def nested(y):
                return renamed(y)
            if x is None:
                raise ValueError(f"no {x}")
            return nested(x) * scale + d.attribute(x) + emq_sample.b.dotted(x) + apply(relative, x) + e.passed(x)

        def apply(function, x):
            from emq_sample.b import local
            return function(x) + local(x)

        class Base:
            step = 1

        class Thing(Base):
            size = FACTOR

            def method(self):
                return self.size + inside()

            def other(self):
                return LOOSE, BRANCH

        def by_table(name):
            return TABLE[name]

        def whole():
            return max(vars(alias))

        async def waits(*rest):
            return apply(*rest)
    """,
    "b": "def helper(x):\n    return x + 1\ndef dotted(x):\n    return x - 1\ndef local(x):\n    return x\n",
    "c": "def cube(x):\n    return x ** 3\ndef unused():\n    return 7\n",
    "d": "def attribute(x):\n    return CONSTANT * x\nCONSTANT = 5\n",
    "e": "def relative(x):\n    return -x\ndef passed(x):\n    return x\n",
    "sub/__init__": "from ..b import helper\ndef inside():\n    return helper(3)\n",
}
ROOT = "emq_sample.a:root"
CHANGES = {  # what is edited, in which module, and the root that it must reach
    "an operator": ("a", "* scale", "/ scale", ROOT),
    "a default": ("a", "scale=FACTOR", "scale=3", ROOT),
    "a constant": ("a", "FACTOR: float = 2", "FACTOR: float = 3", ROOT),
    "a decorator": ("a", "return function\n", "return lambda x: function(x)\n", ROOT),
    "a renamed import": ("b", "x + 1", "x + 2", ROOT),
    "an attribute of a module": ("d", "CONSTANT * x", "CONSTANT + x", ROOT),
    "a constant behind it": ("d", "CONSTANT = 5", "CONSTANT = 6", ROOT),
    "a dotted module": ("b", "x - 1", "x - 2", ROOT),
    "an import inside a function": ("b", "return x\n", "return 2 * x\n", ROOT),
    "a function passed by name": ("e", "return -x", "return +x", ROOT),
    "a relative module": ("e", "return x\n", "return 3 * x\n", ROOT),
    "a condition": ("a", "x is None", "x == 0", ROOT),
    "star arguments": ("b", "return x\n", "return 2 * x\n", "emq_sample.a:waits"),
    "a table": ("a", "x * x", "x + x", "emq_sample.a:by_table"),
    "a table filled later": ("c", "x ** 3", "x ** 4", "emq_sample.a:by_table"),
    "a module passed whole": ("c", "return 7", "return 8", "emq_sample.a:whole"),
    "an attribute of a class": ("a", "size = FACTOR", "size = 9", "emq_sample.a:Thing"),
    "a base class": ("a", "step = 1", "step = 2", "emq_sample.a:Thing"),
    "a method's import": ("b", "x + 1", "x + 2", "emq_sample.a:Thing.method"),
    "a loop over a constant": ("a", '("p", "q")', '("p", "r")', "emq_sample.a:Thing.other"),
    "a branch": ("a", "BRANCH = 2", "BRANCH = 3", "emq_sample.a:Thing.other"),
    "a whole module": ("a", "step = 1", "step = 2", "emq_sample.a"),
}
SAME = {  # edits that decide nothing
    "a comment": ("a", "# comment", "# another"),
    "a docstring": ("a", "'''Doc.'''", "'''Other.'''"),
    "a docstring gone": ("a", "'''Doc.'''", "# none"),
    "a module's docstring": ("a", "'''Module.'''", ""),
    "formatting": ("a", "return nested(x) * scale", "return (nested( x ))*scale"),
    "an annotation": ("a", "FACTOR: float = 2", "FACTOR = 2"),
    "an argument's annotation": (
        "a",
        "def root(x, scale=FACTOR):",
        "def root(x: int, scale: float = FACTOR) -> float:",
    ),
    "an error's message": ("a", 'f"no {x}"', 'f"{x} is none"'),
    "a function beside it": ("c", "return 7", "return 8"),
    "a class beside it": ("a", "step = 1", "step = 2"),
    "quotes": ("a", '{"square"', "{'square'"),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package, with edits; the hash of roots in it is returned by the function that comes with it."""
    folder = tmp_path / "emq_sample"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sources, "PACKAGES", ("emq_sample",))

    def hashed(*roots, module="a", old="", new=""):
        for name, text in PLAIN.items():
            text = textwrap.dedent(text)
            if name == module:
                assert old in text, old
                text = text.replace(old, new) if old else text
            path = folder / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for function in (sources._described, sources._read, sources._path):
            function.cache_clear()
        try:
            return code_hash(*roots)
        finally:
            assert not {name for name in sys.modules if name.startswith("emq_sample.")}  # nothing is imported

    yield hashed
    for function in (sources._described, sources._read, sources._path):
        function.cache_clear()


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_a_number_counts(package, what):
    module, old, new, root = CHANGES[what]
    assert package(root) != package(root, module=module, old=old, new=new)


@pytest.mark.parametrize("what", SAME)
def test_what_decides_nothing_does_not_count(package, what):
    module, old, new = SAME[what]
    assert package(ROOT) == package(ROOT, module=module, old=old, new=new)


def test_a_move_to_another_file_does_not_count(package, monkeypatch):
    before = package(ROOT)
    moved = "def helper(x):\n    return x + 1\n"
    monkeypatch.setitem(PLAIN, "b", PLAIN["b"].replace(moved, "from emq_sample.c import helper\n"))
    monkeypatch.setitem(PLAIN, "c", PLAIN["c"] + moved)
    assert package(ROOT) == before
    assert package(ROOT, module="c", old="x + 1", new="x + 2") != before


@pytest.mark.parametrize(
    "root", ["emq_sample.a:nothing", "emq_sample.nowhere", "emq_sample.a:Thing.nothing", "json:dumps"]
)
def test_what_is_not_there_is_named(package, root):
    with pytest.raises(LookupError, match=r"no module|defines no"):
        package(root)


def test_neutral_modules_do_not_count_unless_they_are_roots(package):
    package(ROOT)
    assert ("emq_sample.d", "CONSTANT") in reached(ROOT)
    assert not [place for place in reached(ROOT, neutral=("emq_sample.d",)) if place[0] == "emq_sample.d"]
    assert ("emq_sample.d", "attribute") in reached(ROOT, "emq_sample.d:attribute", neutral=("emq_sample.d",))


@pytest.mark.parametrize("filename", FILES)
def test_the_code_of_every_file_is_found(filename):
    places = reached(*FILES[filename].code, neutral=NEUTRAL)
    assert len(places) > 5
    neutral = {f"{module}:{name}" for module, name in places if module in NEUTRAL}
    assert neutral <= set(FILES[filename].code)


@pytest.mark.slow
def test_all_hashes_take_less_than_a_second_and_then_nothing():
    for function in (sources._described, sources._read, sources._path):
        function.cache_clear()
    started = time.process_time()
    first = [code_hash(*file.code, neutral=NEUTRAL) for file in FILES.values()]
    cold = time.process_time() - started
    assert [code_hash(*file.code, neutral=NEUTRAL) for file in FILES.values()] == first
    assert cold < 3  # 0.8 s on an idle processor
