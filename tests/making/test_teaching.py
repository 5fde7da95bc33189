"""What a course needs: exercises with levels and solutions, a quiz, copies for students, slides without a network."""

import re

import jupytext
import nbformat
import pytest

from book.making import notebooks, slides
from book.places import REPOSITORY, chapter_names

CHAPTERS = [name for name in chapter_names() if name[0].isdigit()]
LEVELS = {"by hand", "from data/", "longer"}


def cells_from(name, heading):
    """Return a chapter's cells from a heading to the end."""
    cells = jupytext.read(REPOSITORY / "book" / f"{name}.py").cells
    start = next(i for i, cell in enumerate(cells) if cell.source.startswith(heading))
    return cells[start:]


def is_solution(cell):
    return notebooks.SOLUTION in cell.metadata.get("tags", [])


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_exercise_has_a_level_and_a_solution_in_a_folded_cell_that_asserts(name):
    exercises, written, *computed = cells_from(name, "## Exercises")
    items = re.findall(r"^(\d+)\. \*\((.*?)\)\*", exercises.source, re.MULTILINE)
    numbers = [int(number) for number, _ in items]
    assert 5 <= len(numbers) <= 7
    assert numbers == list(range(1, len(numbers) + 1))
    assert {level for _, level in items} == LEVELS
    assert written.source.startswith(":::{dropdown}")
    assert [int(number) for number in re.findall(r"^(\d+)\. ", written.source, re.MULTILINE)] == numbers
    assert len(computed) == len(numbers)
    assert all(cell.cell_type == "code" and "hide-cell" in cell.metadata["tags"] for cell in computed)
    assert all(re.search(r"^ *assert ", cell.source, re.MULTILINE) for cell in computed)
    assert all(map(is_solution, [written, *computed]))


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_question_of_the_quiz_is_followed_by_its_folded_answer(name):
    quiz = cells_from(name, "## Quiz")
    quiz = quiz[: -len(cells_from(name, "## Exercises"))]
    for number, (question, answer) in enumerate(zip(quiz[::2], quiz[1::2], strict=True), start=1):
        assert f"{number}. " in question.source
        assert not is_solution(question)
        assert answer.source.startswith(":::{dropdown} Answer")
        assert is_solution(answer)
    assert 4 <= number <= 6


@pytest.mark.slow
def test_student_copies_have_no_outputs_and_nothing_folded(tmp_path):
    paths = notebooks.write_student_copies(tmp_path)
    assert [path.stem for path in paths] == chapter_names()
    for path in paths:
        cells = nbformat.read(path, as_version=4).cells
        published = jupytext.read(REPOSITORY / "book" / f"{path.stem}.py").cells
        assert not any(map(is_solution, cells))
        assert not any("{dropdown}" in cell.source for cell in cells)
        assert not any(cell.get("outputs") for cell in cells)
        assert [cell.source for cell in cells] == [cell.source for cell in published if not is_solution(cell)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTERS)
def test_slides_resolve_every_reference_and_load_nothing_from_the_network(name, tmp_path):
    page = slides.export_deck(REPOSITORY / "book" / f"{name}.ipynb", tmp_path).read_text()
    loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"([^\"]*)\"", page) + re.findall(
        r"<link[^>]*href=\"(.*?)\"", page
    )
    loaded = [source for source in loaded if not source.startswith("data:")] + ["mathjax/tex-chtml.js"]
    assert all((tmp_path / source).is_file() for source in loaded)
    assert not re.search(r"@import|import .* from|\burl\(.?https?:", page)
    assert "mathjax/tex-chtml.js" in page
    shown = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"{(glue|cite|dropdown)|\.ipynb", shown)
    for part in ("Question.", "Answer.", "What we found", "What could be wrong", "Quiz"):
        assert part in shown
    images = re.findall(r"<img[^>]*>", shown)
    assert images
    assert all(re.search(r'alt="[^"]{40,}"', image) for image in images)


def a_notebook(text, **metadata):
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n## Section"),
        nbformat.v4.new_markdown_cell(text, metadata=metadata),
    ]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_slide_without_a_heading_gets_that_of_its_section():
    deck = slides.make_deck(a_notebook("Text.", slideshow={"slide_type": "slide"}), works=None)
    assert [cell.source for cell in deck.cells] == ["## Section", "Text."]
    assert deck.metadata.title == "Title"


def test_progress_and_warnings_are_not_on_a_slide():
    notebook = a_notebook("Text.", slideshow={"slide_type": "slide"})
    code = nbformat.v4.new_code_cell("print(1)", metadata={"slideshow": {"slide_type": "-"}})
    code.outputs = [nbformat.v4.new_output("stream", name=name, text="1") for name in ("stderr", "stdout")]
    notebook.cells.append(code)
    assert [output.name for output in slides.make_deck(notebook, works=None).cells[-1].outputs] == ["stdout"]


def test_slides_of_unmarked_cells_or_of_numbers_that_were_not_glued_are_refused():
    with pytest.raises(slides.SlidesError, match="No cell is marked"):
        slides.make_deck(a_notebook("Text."), works=None)
    with pytest.raises(slides.SlidesError, match="'rho', which this notebook did not glue"):
        slides.make_deck(a_notebook("{glue:text}`rho:.2f`", slideshow={"slide_type": "slide"}), works=None)
