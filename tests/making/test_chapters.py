"""Every chapter, live on the digits from the beginning, as a reader reruns it: those that read what others compute."""

import pathlib
import shutil

import nbformat
import pytest

from book.making import notebooks
from book.places import chapter_names

ALONE = ("your_network", "your_profile", "larger_benches")  # read no file of the chapter's study
CHAIN = [name for name in chapter_names() if name not in ALONE]

pytestmark = pytest.mark.chapters


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


def check_live(name, build):
    """Execute a chapter whole; it makes at least one claim."""
    assert all(cell.execution_count for cell in run_live(name, build))
    assert (build / "ledger" / f"{name}.jsonl").read_text().count("\n") >= 1


@pytest.mark.parametrize("name", CHAIN)
def test_chapters_run_live_on_the_digits(name, build):
    check_live(name, build)


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
