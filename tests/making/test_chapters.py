"""Every chapter, live on the digits from the beginning, as a reader reruns it; and what wrong parameters get."""

import nbformat
import pytest

from book.making import publishing


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Execute all chapters in order with REBUILD=True into a folder of their own."""
    folder = tmp_path_factory.mktemp("book")
    for name in publishing.chapter_names():
        publishing.execute(name, "digits-resnet8", rebuild=True, build=folder, study_root=folder / "studies")
    return folder


@pytest.mark.parametrize("name", publishing.chapter_names())
def test_chapters_run_live_on_the_digits(name, build):
    notebook = nbformat.read(build / "source" / "book" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert (build / "ledger" / f"{name}.jsonl").read_text().count("\n") >= 1


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
    ("profile", "rebuild", "error"), [("nope", False, "Unknown"), ("digits-resnet8", "maybe", "REBUILD must")]
)
def test_wrong_parameters_fail_at_the_first_cell(profile, rebuild, error, tmp_path):
    with pytest.raises(publishing.ChapterError, match=rf"01_bench failed in cell \d: .*{error}"):
        publishing.execute("01_bench", profile, rebuild=rebuild, build=tmp_path, study_root=tmp_path)
    notebook = nbformat.read(tmp_path / "source" / "book" / "01_bench.ipynb", as_version=4)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.execution_count]
    assert "start_chapter" in ran[-1].source
    assert len(ran) == 3  # parameters, the injected ones, and the setup that fails
