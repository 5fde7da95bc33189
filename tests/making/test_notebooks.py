"""Notebooks are pairs with clean outputs, in step with code, tables and library; executing one checks first."""

import ast
import functools
import json
import pkgutil

import jupytext
import nbformat
import papermill
import pytest

from book.making import notebooks, tables
from book.places import REPOSITORY, chapter_names
from emq_lib.core.errors import InvalidParameterError, UnwritablePathError

CHAPTERS = chapter_names()


@pytest.mark.parametrize("name", CHAPTERS)
def test_notebooks_hold_the_cells_of_their_source_and_no_errors(name):
    notebook = nbformat.read(REPOSITORY / "book" / f"{name}.ipynb", as_version=4)
    source = notebooks.read_source(name)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in source.cells]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(notebooks.INJECTED in cell.metadata.get("tags", []) for cell in notebook.cells)


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
    assert notebook.metadata[notebooks.FINGERPRINT] == notebooks.fingerprint(name), "run make notebooks"


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


@pytest.mark.parametrize("parameters", [{"PROFIL": "digits-resnet8"}, {"PROFILE": "digits-resnet8", "seed": 1}])
def test_a_misspelt_parameter_is_an_error_before_anything_runs(parameters, tmp_path, monkeypatch):
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("executed"))
    with pytest.raises(InvalidParameterError, match="No parameter (PROFIL|seed): chapters have PROFILE, REBUILD, SEED"):
        notebooks.execute("02_proxies", parameters, build=tmp_path)


def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("executed"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritablePathError, match="file"):
        notebooks.execute("02_proxies", {}, build=tmp_path / "file")
    with pytest.raises(UnwritablePathError, match="file"):
        notebooks.write_student_copies(tmp_path / "file")


def test_costs_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    """As in a checkout that is read-only."""
    cost = nbformat.v4.new_output("stream", text='{"device": "a", "memory_bytes": 1, "gpu_memory_bytes": 0}')
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[cost])])
    (tmp_path / "source" / "book").mkdir(parents=True)
    nbformat.write(executed, tmp_path / "source" / "book" / "x.ipynb")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(notebooks, "COSTS", tmp_path / "file" / "chapters.json")
    with pytest.raises(UnwritablePathError, match="chapters.json"):
        notebooks.record_cost("x", "digits-resnet8", tmp_path, seconds=1)
    monkeypatch.setattr(notebooks, "COSTS", tmp_path / "chapters.json")
    notebooks.record_cost("x", "digits-resnet8", tmp_path, seconds=1)
    recorded = json.loads((tmp_path / "chapters.json").read_text())
    assert recorded == {"a": {"digits-resnet8": {"x": {"seconds": 1, "memory_bytes": 1, "gpu_memory_bytes": 0}}}}
