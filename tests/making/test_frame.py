"""The frame: dependency files agree, notebooks are pairs with clean outputs, the command line names its errors."""

import ast
import functools
import pkgutil
import tomllib

import jupytext
import nbformat
import papermill
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from book.making import publishing, tables
from book.places import REPOSITORY
from book.studies.study import has_study
from emq_lib.core.profiles import get_profile

CHAPTERS = publishing.chapter_names()


@pytest.fixture(scope="module")
def lock():
    lines = [line for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    pins = {}
    for requirement in map(Requirement, lines):
        pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pins


def test_the_lock_pins_every_dependency_within_its_bounds(lock):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    groups = (entry for group in project["dependency-groups"].values() for entry in group if isinstance(entry, str))
    for requirement in map(Requirement, [*project["project"]["dependencies"], *groups]):
        pins = lock[canonicalize_name(requirement.name)]
        for pin in pins:
            version = next(iter(pin.specifier))
            assert version.operator == "=="
            assert requirement.specifier.contains(version.version), pin


def test_the_lock_names_no_index():
    text = (REPOSITORY / "requirements.lock").read_text()
    assert not any(word in text for word in ("://", "index-url", "find-links"))


def test_conda_users_get_the_lock():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert pip["pip"] == ["-r requirements.lock", "-e ."]
    assert f">={conda[0].removeprefix('python=')}" == project["requires-python"]


@pytest.mark.parametrize("name", CHAPTERS)
def test_notebooks_hold_the_cells_of_their_source_and_no_errors(name):
    notebook = nbformat.read(REPOSITORY / "book" / f"{name}.ipynb", as_version=4)
    source = publishing.read_source(name)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in source.cells]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(publishing.INJECTED in cell.metadata.get("tags", []) for cell in notebook.cells)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_figure_has_a_caption_and_alt_text(name):
    source = jupytext.read(REPOSITORY / "book" / f"{name}.py")
    for cell in source.cells:
        if "plt.show()" in cell.source:
            described = cell.metadata["mystnb"]
            assert len(described["figure"]["caption"]) > 40
            assert len(described["image"]["alt"]) > 40


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_start_with_three_documented_parameters_and_their_check(name):
    parameters = papermill.inspect_notebook(str(REPOSITORY / "book" / f"{name}.ipynb"))
    types = {key: parameter["inferred_type_name"] for key, parameter in parameters.items()}
    assert types == {"PROFILE": "str", "REBUILD": "bool", "SEED": "int"}
    assert all(len(parameter["help"]) > 10 for parameter in parameters.values())
    code = [cell for cell in jupytext.read(REPOSITORY / "book" / f"{name}.py").cells if cell.cell_type == "code"]
    assert code[0].metadata["tags"] == ["parameters"]
    assert f'chapter = start_chapter("{name}", PROFILE, REBUILD, SEED)' in code[1].source


@pytest.mark.parametrize("name", CHAPTERS)
def test_outputs_are_in_step_with_the_code_and_the_tables(name):
    notebook = nbformat.read(REPOSITORY / "book" / f"{name}.ipynb", as_version=4)
    assert notebook.metadata[publishing.FINGERPRINT] == publishing.fingerprint(name), "run make notebooks"


@pytest.mark.parametrize("name", CHAPTERS)
def test_sources_shown_on_pages_are_those_of_the_library(name):
    notebook = nbformat.read(REPOSITORY / "book" / f"{name}.ipynb", as_version=4)
    cells = [(ast.parse(cell.source), cell) for cell in notebook.cells if cell.cell_type == "code"]
    names = {}
    for tree, _ in cells:
        for line in ast.walk(tree):
            if isinstance(line, ast.ImportFrom) and line.module.startswith("emq_lib"):
                for alias in line.names:
                    names[alias.asname or alias.name] = pkgutil.resolve_name(f"{line.module}.{alias.name}")
    for tree, cell in cells:
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "show_source":
                paths = [ast.unparse(argument).split(".") for argument in call.args]
                shown = tables.source_block(*(functools.reduce(getattr, rest, names[first]) for first, *rest in paths))
                assert shown in [output.get("data", {}).get("text/markdown") for output in cell.outputs], call.lineno


def test_an_unknown_profile_ends_with_its_name_and_no_traceback(capsys):
    assert publishing.main(["book", "--profile", "nope"]) == 2
    assert "error: Unknown profile 'nope'. Known profiles" in capsys.readouterr().err


def test_a_study_with_another_seed_finds_the_published_ones_beside_it(tmp_path, monkeypatch):
    publishing._link_other_studies(tmp_path, "digits-resnet8")
    publishing._link_other_studies(tmp_path, "digits-resnet8")  # a second run finds them there
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path))
    assert has_study(get_profile("cifar10-resnet20"), "bench.parquet")
    assert not has_study(get_profile("digits-resnet8"), "bench.parquet")
