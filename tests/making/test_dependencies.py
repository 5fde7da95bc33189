"""What is imported is declared where it is needed, what is declared is used, and every file of pins agrees."""

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from book.places import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
OWN = {"book", "emq_lib", "tests"}
# Declared, used, and imported by no line of Python here.
USED_OTHERWISE = {
    "jupyter-book": "called as a program",
    "jupyterlab": "make lab",
    "pyarrow": "pandas reads and writes parquet with it",
    "pydata-sphinx-theme": "a version that draws no stray bar; sphinx-book-theme stands on it",
    "pytest-xdist": "make check, make test",
    "ruff": "make lint",
    "sphinx-book-theme": "_config.yml",
    "sphinx-mathjax-offline": "_config.yml",
    "sphinx-revealjs": "its files go beside the slides",
}
PAGES = ("book/places.py", *(f"book/making/{name}.py" for name in ("__init__", "__main__", "linking", "pages", "pdf")))
USERS = {  # who imports -> which requirements may be imported there
    "emq_lib": ("", "onnx", "cluster"),
    "book": ("", "onnx", "cluster", "book"),
    "benchmarks": ("", "onnx", "cluster", "book", "benchmarks"),
    "tests": ("", "onnx", "cluster", "book", "benchmarks", "test"),
}


def requirements(part: str) -> dict[str, Requirement]:
    """Return what an extra declares, by name; "" is what the library itself needs, "pages" the group."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"] | PROJECT["dependency-groups"] | {"": project["dependencies"]}
    found = {canonicalize_name(entry.name): entry for entry in map(Requirement, extras[part])}
    found.pop(project["name"], None)
    return found


@functools.cache
def distributions() -> dict[str, set[str]]:
    """Return import name -> names of what installs it."""
    found = importlib.metadata.packages_distributions()
    return {name: set(map(canonicalize_name, owners)) for name, owners in found.items()}


@functools.cache
def imported(pattern: str) -> dict[str, str]:
    """Return what the files of a pattern import from elsewhere -> a file that does."""
    names, paths = {}, list(REPOSITORY.glob(pattern))
    beside = {path.stem for path in paths}  # tests import helpers by their names
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {module.partition(".")[0] for module in modules}:
                if module not in sys.stdlib_module_names | OWN | beside:
                    names[module] = path.relative_to(REPOSITORY).as_posix()
    return names


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS)
def test_what_is_imported_is_declared(user):
    declared = {name for part in USERS[user] for name in requirements(part)}
    undeclared = {
        name: path for name, path in imported(f"{user}/**/*.py").items() if not distributions()[name] & declared
    }
    assert not undeclared
    assert imported(f"{user}/**/*.py")


@pytest.mark.parametrize("path", PAGES)
def test_what_builds_pages_imports_what_make_pages_installs(path):
    undeclared = [name for name in imported(path) if not distributions()[name] & set(requirements("pages"))]
    assert not undeclared


@pytest.mark.slow
def test_what_is_declared_is_used():
    names = {name for user in USERS for name in imported(f"{user}/**/*.py")}
    used = {owner for name in names for owner in distributions()[name]} | set(USED_OTHERWISE)
    declared = {name for part in PROJECT["project"]["optional-dependencies"] for name in requirements(part)}
    assert declared | set(requirements("")) <= used
    assert set(USED_OTHERWISE) <= declared | set(requirements(""))


def test_an_extra_declares_nothing_twice():
    parts = ["", *PROJECT["project"]["optional-dependencies"]]
    names = [name for part in parts for name in requirements(part)]
    assert len(names) == len(set(names))


def test_what_make_pages_installs_is_part_of_the_book():
    assert set(requirements("pages")) <= set(requirements("book"))
    assert not any(entry.specifier for entry in requirements("pages").values())  # bounds stand in one place


def test_the_lock_pins_every_dependency_within_its_bounds():
    lines = [line for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    pins = {}
    for requirement in map(Requirement, lines):
        pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    for part in ("", *PROJECT["project"]["optional-dependencies"]):
        for name, requirement in requirements(part).items():
            for pin in pins[name]:
                (version,) = pin.specifier
                assert version.operator == "=="
                assert requirement.specifier.contains(version.version), pin


def test_every_line_of_the_lock_is_a_pin_and_none_an_option_or_an_address():
    text = (REPOSITORY / "requirements.lock").read_text()
    pins = [line.partition(" ;")[0] for line in text.splitlines()]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", pin)] == []
    assert "://" not in text


def test_conda_users_get_the_lock():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip["pip"] == ["-r requirements.lock", "-e ."]
    assert f">={conda[0].removeprefix('python=')}" == PROJECT["project"]["requires-python"]


STAGES = ["emq_lib.core", "emq_lib.bench", "emq_lib.proxies", "emq_lib.evolution", "emq_lib.allocation"]
STAGES += ["emq_lib.quantization", "book.studies", "book.making"]


@pytest.mark.parametrize("package", STAGES)
def test_no_package_imports_a_later_one(package):
    later, found = tuple(f"{one}." for one in STAGES[STAGES.index(package) + 1 :]), []
    for path in REPOSITORY.glob(f"{package.replace('.', '/')}/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                modules = names if isinstance(node, ast.Import) else [f"{node.module}.{name}" for name in names]
                found += [(path.name, module) for module in modules if f"{module}.".startswith(later)]
    assert not found
