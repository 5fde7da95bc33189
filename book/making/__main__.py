"""The command line of the book: ``python -m book.making``, which ``make`` calls.

Building pages from the outputs that are there needs no PyTorch, so what executes chapters is imported where it is used.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from book.making import pages
from book.places import PRINTED, REPOSITORY, chapter_names
from emq_lib.core.errors import EMQError

ACTIONS = {
    "book": "execute the chapters and build the pages",
    "notebooks": "execute the chapters and refresh the outputs of book/*.ipynb",
    "pages": "build the pages from the outputs that book/*.ipynb have",
    "slides": "execute the chapters and make slides of their marked cells",
    "student": "copy the notebooks without outputs, solutions and answers",
}


def run(action: str, profile: str, *, rebuild: bool, seed: int) -> None:
    """Do what the command line asks for; its parts say which errors.

    Args:
        action: key of :data:`ACTIONS`.
        profile: study that the chapters show.
        rebuild: whether chapters compute the study afresh.
        seed: not 0: another draw of all that is random.
    """
    build = REPOSITORY / "_build" / (PRINTED if action == "pages" else profile)
    if action == "pages":
        pages.copy_notebooks(build)
    elif action == "student":
        from book.making.notebooks import write_student_copies

        print(*write_student_copies(REPOSITORY / "_build" / "student"), sep="\n")
    else:
        _execute_all(action, build, {"PROFILE": profile, "REBUILD": rebuild, "SEED": seed})
    if action in ("book", "pages"):
        print(f"The book: {pages.build_pages(build, build / 'html')}")


def _execute_all(action: str, build: pathlib.Path, parameters: dict[str, object]) -> None:
    """Execute the chapters one after the other, after checking their parameters."""
    from book.making import notebooks, slides
    from book.making.chapter import study_of

    study_of(*parameters.values())
    for name in chapter_names():
        if action == "slides" and not slides.has_slides(notebooks.read_source(name)):
            continue
        print(f"{name} ...", end=" ", flush=True)
        seconds = notebooks.execute(name, parameters, build=build)
        print(f"{seconds:.0f} s")
        if action == "notebooks":
            notebooks.record_cost(name, parameters["PROFILE"], build, seconds=seconds)
            notebooks.refresh_outputs(name, build)
        if action == "slides":
            print(slides.export_deck(build / "source" / "book" / f"{name}.ipynb", build / "slides"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    lines = "\n".join(f"  {action:<10} {help}" for action, help in ACTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m book.making",
        description=f"Make the book.\n\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--profile", default=PRINTED, help="study that the chapters show")
    parser.add_argument("--rebuild", action="store_true", help="compute the study afresh instead of reading it")
    parser.add_argument("--seed", type=int, default=0, help="not 0: another draw of all that is random")
    options = parser.parse_args(arguments)
    try:
        run(options.action, options.profile, rebuild=options.rebuild, seed=options.seed)
    except (EMQError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
