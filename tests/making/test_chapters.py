"""Every chapter, live on the digits from the beginning, as a reader reruns it; and what wrong parameters get."""

import pathlib
import shutil

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from book.making import notebooks
from book.places import REPOSITORY, chapter_names

ALONE = ("your_network", "your_profile", "larger_benches")  # read no file of the chapter's study
CHAIN = [name for name in chapter_names() if name not in ALONE]

pytestmark = pytest.mark.chapters
one_after_the_other = pytest.mark.xdist_group("chapters")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Folder of a build, in whose kernels the study of the digits is small: see small_study.py."""
    folder = tmp_path_factory.mktemp("book")
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    shutil.copy(pathlib.Path(__file__).with_name("small_study.py"), startup)
    return folder


def run_live(name, build, **parameters):
    """Execute a chapter that computes the digits study in a folder of its own; return its cells of code."""
    places = {"EMQ_STUDY_ROOT": "studies", "EMQ_LEDGER_DIR": "ledger", "IPYTHONDIR": "ipython"}
    environment = {variable: str(build / name) for variable, name in places.items()}
    given = {"PROFILE": "digits-resnet8", "REBUILD": True} | parameters
    notebooks.execute(name, given, build=build, environment=environment)
    notebook = nbformat.read(build / "source" / "book" / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=one_after_the_other if name in CHAIN else ()) for name in chapter_names()]
)
def test_chapters_run_live_on_the_digits(name, build):
    assert all(cell.execution_count for cell in run_live(name, build))
    assert (build / "ledger" / f"{name}.jsonl").read_text().count("\n") >= 1


@one_after_the_other
def test_the_study_is_complete(build):
    found = {path.name for path in (build / "studies" / "digits-resnet8").glob("[!.]*")}
    assert found == {
        "model.safetensors",
        "layers.csv",
        "bench.parquet",
        "checks.csv",
        "statistics.safetensors",
        "proxies.parquet",
        "proxies.json",
        "evolution.jsonl",
        "searches.csv",
        "enumeration.jsonl",
        "heldout.csv",
        "quantization.csv",
        "comparison.parquet",
        "runtimes.csv",
        "manifest.json",
    }


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
