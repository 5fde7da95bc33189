"""Chapters that read no file of a study, so that they run beside the others; and what wrong parameters get."""

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError
from test_chapters import ALONE, build, check_live, run_live  # noqa: F401  build is a fixture

from book.making import notebooks
from book.places import REPOSITORY

pytestmark = pytest.mark.chapters


@pytest.mark.parametrize("name", ALONE)
def test_chapters_run_live(name, build):  # noqa: F811
    check_live(name, build)


@pytest.mark.parametrize(
    ("parameters", "error"),
    [({"PROFILE": "nope"}, "Unknown"), ({"REBUILD": "maybe"}, "REBUILD must"), ({"SEED": True}, "SEED must")],
)
def test_wrong_parameters_fail_at_the_first_cell(parameters, error, tmp_path):
    with pytest.raises(notebooks.ChapterError, match=rf"rerun failed in cell \d: .*{error}"):
        run_live("rerun", tmp_path, **parameters)
    notebook = nbformat.read(tmp_path / "source" / "book" / "rerun.ipynb", as_version=4)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.execution_count]
    assert "start_chapter" in ran[-1].source
    assert len(ran) == 3  # parameters, the injected ones, and the setup that fails


def test_a_misspelt_parameter_given_to_papermill_fails_at_the_first_cell(tmp_path):
    source = REPOSITORY / "book" / "rerun.ipynb"
    with pytest.raises(PapermillExecutionError, match="No parameter PROFIL: chapters have PROFILE, REBUILD, SEED"):
        papermill.execute_notebook(
            source, tmp_path / "out.ipynb", {"PROFIL": "x"}, cwd=REPOSITORY / "book", progress_bar=False
        )
