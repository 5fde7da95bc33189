"""Chapters as notebooks: executing them, refreshing the outputs in ``book/``, and copies for students."""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping

import jupytext
import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from book.making import drawings
from book.making.pages import first_cell
from book.places import REPOSITORY, chapter_names, repository_address
from emq_lib.core.errors import EMQError, InvalidParameterError
from emq_lib.core.files import named_when_unwritable, write_bytes

KERNEL, PATIENCE = "python3", 600  # seconds that a kernel may take to start, on a busy machine
INJECTED, MEASURING = ("injected-parameters", "measures-memory")  # tags of cells that are not the chapter's
HEADLINE = "headline"  # tag of the cell whose figure stands in the README
SOLUTION = "solution"  # tag of the cells that students do not get
COSTS = REPOSITORY / "benchmarks" / "chapters.json"
FINGERPRINT = "emq"  # key of a notebook's metadata

# Runs last in every chapter, is shown nowhere, and prints the peak memory of the chapter and of its largest worker.
MEASURE_MEMORY = """
import json, resource
import torch
from book.studies.study import device_name
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps({"device": device_name(), "memory_bytes": 1024 * sum(peaks), "gpu_memory_bytes": gpu}))
"""


class ChapterError(EMQError, RuntimeError):
    """A chapter failed."""


def read_source(name: str) -> nbformat.NotebookNode:
    """Return a chapter's cells from its ``.py``, with cell ids that do not change from run to run."""
    notebook = jupytext.read(REPOSITORY / "book" / f"{name}.py")
    if address := repository_address():
        tags = {"tags": ["remove-cell"]}
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first_cell(address), metadata=tags))
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:03d}"
    return notebook


def execute(
    name: str, parameters: Mapping[str, object], *, build: pathlib.Path, environment: Mapping[str, str] | None = None
) -> float:
    """Execute one chapter with papermill into `build`/source/book.

    The cells come from the chapter's ``.py``; the notebook in ``book/`` is not touched.

    Args:
        name: chapter without ending.
        parameters: PROFILE, REBUILD and SEED, or some of them.
        build: folder of this build.
        environment: variables that the chapter sees besides those of this process.

    Returns:
        wall time in seconds.

    Raises:
        InvalidParameterError: the chapter has no such parameter; nothing was executed.
        ChapterError: a cell failed; the message names the chapter, the cell and where the notebook so far is.
        UnwritablePathError, DiskFullError: the folder cannot be written.
    """
    target, source = build / "source" / "book" / f"{name}.ipynb", build / "input" / f"{name}.ipynb"
    notebook = read_source(name)
    tags = {"tags": [MEASURING, "remove-cell"]}
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE_MEMORY.strip(), id="memory", metadata=tags))
    _write(notebook, source)
    with named_when_unwritable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    changed = _changed_parameters(source, parameters)
    started = time.perf_counter()
    try:
        with _environment(environment or {}):
            papermill.execute_notebook(
                str(source),
                str(target),
                parameters=changed,
                kernel_name=KERNEL,
                start_timeout=PATIENCE,
                cwd=str(REPOSITORY / "book"),
                progress_bar=False,
                extra_arguments=["--log-level=ERROR"],
            )
    except PapermillExecutionError as error:
        raise ChapterError(
            f"Chapter {name} failed in cell {error.cell_index}: {error.ename}: {error.evalue} See {target}"
        ) from error
    return time.perf_counter() - started


def _changed_parameters(notebook: pathlib.Path, parameters: Mapping[str, object]) -> dict[str, object]:
    """Return those parameters that differ from the notebook's own, so that a page does not say the same twice."""
    defaults = papermill.inspect_notebook(str(notebook))
    if unknown := sorted(set(parameters) - set(defaults)):
        raise InvalidParameterError(f"No parameter {', '.join(unknown)}: chapters have {', '.join(defaults)}.")
    return {name: value for name, value in parameters.items() if ast.literal_eval(defaults[name]["default"]) != value}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which kernels inherit, inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def refresh_outputs(name: str, build: pathlib.Path) -> None:
    """Write a chapter's executed outputs into its notebook in ``book/``, without a trace of papermill or of warnings.

    The figure of a cell tagged "headline" also becomes ``book/_static/headline.png``.

    Raises:
        UnwritablePathError, DiskFullError: the notebook cannot be written.
    """
    executed = nbformat.read(build / "source" / "book" / f"{name}.ipynb", as_version=4)
    run = [cell for cell in executed.cells if not {INJECTED, MEASURING} & set(cell.metadata.get("tags", []))]
    notebook, static = read_source(name), REPOSITORY / "book" / "_static"
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata[FINGERPRINT] = fingerprint(name)
    for cell, done in zip(notebook.cells, run, strict=True):
        if cell.cell_type == "code":
            cell.outputs = [output for output in done.outputs if output.get("name") != "stderr"]
            cell.execution_count = done.execution_count
        if HEADLINE in cell.metadata.get("tags", []):
            image = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
            write_bytes(static / "headline.png", base64.b64decode(image))
    drawings.draw_static(static)
    _write(notebook, REPOSITORY / "book" / f"{name}.ipynb")


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
    """Enter what an executed chapter took into ``benchmarks/chapters.json``, by device, study and chapter.

    Raises:
        UnwritablePathError, DiskFullError: the file cannot be written.
    """
    executed = nbformat.read(build / "source" / "book" / f"{name}.ipynb", as_version=4)
    cost = json.loads(executed.cells[-1].outputs[-1].text)
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else {}
    study = costs.setdefault(cost.pop("device"), {}).setdefault(profile, {})
    study[name] = {"seconds": round(seconds, 1)} | cost
    write_bytes(COSTS, (json.dumps(costs, indent=1, sort_keys=True) + "\n").encode())


def write_student_copies(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write every notebook without outputs, solutions and answers into a folder; return their paths.

    Raises:
        UnwritablePathError, DiskFullError: the folder cannot be written.
    """
    paths = []
    for name in chapter_names():
        notebook = read_source(name)
        notebook.cells = [cell for cell in notebook.cells if SOLUTION not in cell.metadata.get("tags", [])]
        paths.append(folder / f"{name}.ipynb")
        _write(notebook, paths[-1])
    return paths


def _write(notebook: nbformat.NotebookNode, path: pathlib.Path) -> None:
    write_bytes(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())
