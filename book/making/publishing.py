"""Executing the chapters, building pages and slides, copies for students: what ``make`` calls for the book."""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jupytext
import nbformat
import papermill
import yaml
from nbconvert.preprocessors import TagRemovePreprocessor
from papermill.exceptions import PapermillExecutionError

from book.making import drawings, pages, slides
from book.places import REPOSITORY, repository_address
from emq_lib.core.errors import EMQError
from emq_lib.core.profiles import PRINTED, get_profile

KERNEL = "python3"
INJECTED, MEASURING = ("injected-parameters", "measures-memory")  # tags of cells that are not the chapter's
HEADLINE = "headline"  # tag of the cell whose figure stands in the README
SOLUTION = "solution"  # tag of the cells that students do not get
COSTS = REPOSITORY / "benchmarks" / "chapters.json"
FINGERPRINT = "emq"  # key of a notebook's metadata

# Runs last in every chapter, is shown nowhere, and prints the peak memory of the chapter and of its largest worker.
MEASURE_MEMORY = """
import json, resource
import torch
from emq_lib.core.files import device_name
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps({"device": device_name(), "memory_bytes": 1024 * sum(peaks), "gpu_memory_bytes": gpu}))
"""


class ChapterError(EMQError, RuntimeError):
    """A chapter or the build of the pages failed."""


def chapter_names() -> list[str]:
    """Return the notebooks of the book in the order of ``_toc.yml``, without ending, e.g. "01_bench"."""
    files = map(pathlib.PurePath, _toc_files())
    return [file.name for file in files if (REPOSITORY / file).with_suffix(".py").is_file()]


def _toc_files() -> list[str]:
    """Return all files of ``_toc.yml`` in order, without ending, e.g. "book/intro"."""
    toc = yaml.safe_load((REPOSITORY / "_toc.yml").read_text())
    return [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]


def execute(
    name: str, profile: str, *, rebuild: bool, build: pathlib.Path, study_root: pathlib.Path | None, seed: int = 0
) -> float:
    """Execute one chapter with papermill into `build`/source/book.

    The cells come from the chapter's ``.py``; the notebook in ``book/`` is not touched.

    Args:
        name: chapter without ending.
        profile: parameter PROFILE.
        rebuild: parameter REBUILD.
        build: folder of this build; claims go to its folder ``ledger``.
        study_root: folder of the studies instead of ``data/``.
        seed: parameter SEED.

    Returns:
        wall time in seconds.

    Raises:
        ChapterError: a cell failed; the message names the chapter, the cell and where the notebook so far is.
    """
    target = build / "source" / "book" / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    source = build / "input" / f"{name}.ipynb"
    source.parent.mkdir(parents=True, exist_ok=True)
    notebook = read_source(name)
    tags = {"tags": [MEASURING, "remove-cell"]}
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE_MEMORY.strip(), id="memory", metadata=tags))
    nbformat.write(notebook, source)
    environment = {"EMQ_LEDGER_DIR": str(build / "ledger")}
    if study_root is not None:
        environment["EMQ_STUDY_ROOT"] = str(study_root)
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    started = time.perf_counter()
    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            parameters=_changed_parameters(source, {"PROFILE": profile, "REBUILD": rebuild, "SEED": seed}),
            kernel_name=KERNEL,
            cwd=str(REPOSITORY / "book"),
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],
        )
    except PapermillExecutionError as error:
        raise ChapterError(
            f"Chapter {name} failed in cell {error.cell_index}: {error.ename}: {error.evalue} See {target}"
        ) from error
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    return time.perf_counter() - started


def build_pages(build: pathlib.Path, html: pathlib.Path) -> pathlib.Path:
    """Build the HTML of executed chapters with every warning an error; return the path of its first page.

    Raises:
        ChapterError: Sphinx warned or failed.
    """
    source = build / "source"
    ignored = shutil.ignore_patterns("*.ipynb", "*.py", "__pycache__", ".ipynb_checkpoints")
    shutil.copytree(REPOSITORY / "book", source / "book", dirs_exist_ok=True, ignore=ignored)
    shutil.copy(REPOSITORY / "_toc.yml", source)
    config = yaml.safe_load((REPOSITORY / "_config.yml").read_text())
    (source / "_config.yml").write_text(yaml.safe_dump(pages.configure(config)))
    shutil.rmtree(build / "pages", ignore_errors=True)
    options = ["--warningiserror", "--keep-going", "--nitpick", "--all", "--path-output", str(build / "pages")]
    program = pathlib.Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChapterError(f"The pages were not built:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    shutil.rmtree(html, ignore_errors=True)
    shutil.copytree(build / "pages" / "_build" / "html", html)
    pages.work_offline(html)
    names = [file.removeprefix("book/") for file in _toc_files()]
    pages.add_downloads(html, source / "book", names=names, title=config["title"])
    return html / "index.html"


def build_slides(name: str, build: pathlib.Path) -> pathlib.Path:
    """Write the slides of an executed chapter into `build`/slides; return their path."""
    return slides.export_deck(build / "source" / "book" / f"{name}.ipynb", build / "slides")


def write_student_copies(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write every notebook without outputs, solutions and answers into a folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    remove = TagRemovePreprocessor(remove_cell_tags={SOLUTION})
    paths = []
    for name in chapter_names():
        notebook, _ = remove.preprocess(read_source(name), {})
        paths.append(folder / f"{name}.ipynb")
        nbformat.write(notebook, paths[-1])
    return paths


def copy_notebooks(build: pathlib.Path) -> None:
    """Put the notebooks of ``book/``, with the outputs they have, where `build_pages` expects executed ones."""
    target = build / "source" / "book"
    target.mkdir(parents=True, exist_ok=True)
    for name in chapter_names():
        shutil.copy(REPOSITORY / "book" / f"{name}.ipynb", target)


def refresh_outputs(name: str, build: pathlib.Path) -> None:
    """Write a chapter's executed outputs into its notebook in ``book/``, without a trace of papermill or of warnings.

    The figure of a cell tagged "headline" also becomes ``book/_static/headline.png``.
    """
    executed = nbformat.read(build / "source" / "book" / f"{name}.ipynb", as_version=4)
    run = [cell for cell in executed.cells if not {INJECTED, MEASURING} & set(cell.metadata.get("tags", []))]
    notebook = read_source(name)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata[FINGERPRINT] = fingerprint(name)
    drawings.draw_static(REPOSITORY / "book" / "_static")
    for cell, done in zip(notebook.cells, run, strict=True):
        if cell.cell_type == "code":
            cell.outputs = [output for output in done.outputs if output.get("name") != "stderr"]
            cell.execution_count = done.execution_count
        if HEADLINE in cell.metadata.get("tags", []):
            image = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
            (REPOSITORY / "book" / "_static" / "headline.png").write_bytes(base64.b64decode(image))
    nbformat.write(notebook, REPOSITORY / "book" / f"{name}.ipynb")


def fingerprint(name: str) -> dict[str, str]:
    """Return digests of what a chapter's outputs follow from: its code, and the tables and timings that are published.

    Prose and captions change no output and do not count. Nor does the library, which would make every page stale with
    every commit: the tests run all chapters live against it, and compare the sources that pages show.
    """
    code = "\0".join(cell.source for cell in read_source(name).cells if cell.cell_type == "code")
    paths = [*REPOSITORY.glob("data/*/manifest.json"), *REPOSITORY.glob("benchmarks/*.json")]
    tables = b"\0".join(path.read_bytes() for path in sorted(paths) if path != COSTS)
    return {"code": hashlib.sha256(code.encode()).hexdigest(), "tables": hashlib.sha256(tables).hexdigest()}


def record_cost(name: str, profile: str, build: pathlib.Path, *, seconds: float) -> None:
    """Enter what an executed chapter took into ``benchmarks/chapters.json``, by device, study and chapter."""
    executed = nbformat.read(build / "source" / "book" / f"{name}.ipynb", as_version=4)
    cost = json.loads(executed.cells[-1].outputs[-1].text)
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else {}
    study = costs.setdefault(cost.pop("device"), {}).setdefault(profile, {})
    study[name] = {"seconds": round(seconds, 1)} | cost
    COSTS.write_text(json.dumps(costs, indent=1, sort_keys=True) + "\n")


def _changed_parameters(notebook: pathlib.Path, parameters: dict[str, object]) -> dict[str, object]:
    """Return those parameters that differ from the notebook's own, so that a page does not say the same twice."""
    defaults = papermill.inspect_notebook(str(notebook))
    return {name: value for name, value in parameters.items() if ast.literal_eval(defaults[name]["default"]) != value}


def read_source(name: str) -> nbformat.NotebookNode:
    """Return a chapter's cells from its ``.py``, with cell ids that do not change from run to run."""
    notebook = jupytext.read(REPOSITORY / "book" / f"{name}.py")
    if address := repository_address():
        notebook.cells.insert(
            0, nbformat.v4.new_code_cell(pages.first_cell(address), metadata={"tags": ["remove-cell"]})
        )
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:03d}"
    return notebook


def _link_other_studies(root: pathlib.Path, own: str) -> None:
    """Put links to the published studies beside the one that is to be made there: chapters look at several."""
    root.mkdir(parents=True, exist_ok=True)
    for published in (REPOSITORY / "data").iterdir():
        place = root / published.name
        if published.is_dir() and published.name != own and not place.exists():
            place.symlink_to(published, target_is_directory=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m book.making.publishing", description=__doc__)
    parser.add_argument("action", choices=("book", "notebooks", "pages", "slides", "student"))
    parser.add_argument("--profile", default=PRINTED, help="study that the chapters show")
    parser.add_argument("--rebuild", action="store_true", help="compute the study afresh instead of reading it")
    parser.add_argument("--seed", type=int, default=0, help="not 0: another draw of all that is random")
    options = parser.parse_args(arguments)
    build = REPOSITORY / "_build" / options.profile
    choices = {"rebuild": options.rebuild, "seed": options.seed, "build": build}
    choices["study_root"] = build / f"studies-seed-{options.seed}" if options.seed else None
    try:
        get_profile(options.profile)
        if options.seed:
            _link_other_studies(choices["study_root"], options.profile)
        if options.action == "student":
            print(*write_student_copies(REPOSITORY / "_build" / "student"), sep="\n")
            return 0
        for name in chapter_names() if options.action != "pages" else ():
            if options.action == "slides" and not slides.has_slides(read_source(name)):
                continue
            print(f"{name} ...", end=" ", flush=True)
            seconds = execute(name, options.profile, **choices)
            print(f"{seconds:.0f} s")
            if options.action == "notebooks":
                record_cost(name, options.profile, build, seconds=seconds)
                refresh_outputs(name, build)
            if options.action == "slides":
                print(build_slides(name, build))
        if options.action == "pages":
            copy_notebooks(build)
        if options.action in ("book", "pages"):
            print(f"The book: {build_pages(build, build / 'html')}")
    except EMQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
