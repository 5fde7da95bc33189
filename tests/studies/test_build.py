"""Files of a study from the command line; each of them knows all that it was made from."""

import os
import subprocess
import sys

import pytest
import watching

from book.places import REPOSITORY
from book.studies import __main__ as command_line
from book.studies.files import BENCH, CHECKS, ENUMERATION, FILES, HELDOUT, LAYERS, MODEL, NEUTRAL, SCORES, TRANSFER
from book.studies.study import manifest_of, new_file, stale_because
from emq_lib.core.sources import reached

MADE = sorted(FILES)
KEEPING = {  # what keeps learned roundings, without loss, until a bench is whole
    ("emq_lib.core.training", "state_digest"),
    ("emq_lib.core.training", "tensors_digest"),
    ("emq_lib.quantization.packing", "pack_codes"),
    ("emq_lib.quantization.packing", "unpack_codes"),
}


@pytest.fixture(scope="module")
def made_root(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def look(made_root):
    """Return what the builder of a file looked at."""
    looks = watching.make_everything(made_root)
    return lambda filename: next(look for look in looks if filename in look.made)


@pytest.fixture
def tiny(look, made_root, monkeypatch):
    """The tiny study, whose files the test must not change."""
    watching.register_both(monkeypatch)
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(made_root))
    return watching.TINY


def _with_ancestors(filename):
    return {filename}.union(*(_with_ancestors(name) for name in FILES[filename].inputs))


@pytest.mark.slow
@pytest.mark.parametrize("filename", MADE)
def test_a_made_file_is_up_to_date(tiny, filename):
    assert filename in manifest_of(tiny)
    assert stale_because(tiny, filename) == []


@pytest.mark.slow
@pytest.mark.parametrize("filename", MADE)
def test_a_file_declares_what_its_builder_reads(look, filename):
    read = {name for name in look(filename).files if "/" not in name} - look(filename).made
    assert read <= set(FILES[filename].inputs)


@pytest.mark.slow
@pytest.mark.parametrize("filename", MADE)
def test_a_file_declares_the_settings_that_its_builder_reads(look, filename):
    fields = set(watching.TINY.__dataclass_fields__) & look(filename).fields - {"name"}
    declared = {
        field for made in look(filename).made for name in _with_ancestors(made) for field in FILES[name].settings
    }
    if {BENCH, CHECKS} & look(filename).made:
        declared.add("quantizer")  # they hold the rows of each
    assert fields <= declared


@pytest.mark.slow
@pytest.mark.parametrize("filename", MADE)
def test_the_code_of_a_file_is_the_code_that_runs(look, filename):
    ran = {place for place in look(filename).functions if place[0] not in (*NEUTRAL, "book.studies.__main__")}
    found = set().union(*(reached(*FILES[made].code, neutral=NEUTRAL) for made in look(filename).made))
    builders = {tuple(FILES[made].builder.split(":")) for made in look(filename).made}
    assert ran - found <= builders | KEEPING


DIGITS = "digits-resnet8"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return the list of files that were made: builders write the name of the file, and no images are loaded."""
    found = []

    def make(profile, filename, _images):
        found.append(filename)
        with new_file(profile, filename, seconds=0.0) as path:
            path.write_text(filename)

    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path))
    monkeypatch.setattr(command_line, "_make", make)
    return found


def _run(capsys, *arguments):
    code = command_line.main(arguments)
    return code, *capsys.readouterr()


def test_only_what_is_missing_or_out_of_date_is_made_and_its_inputs_first(made, tmp_path, capsys):
    assert _run(capsys, "build", DIGITS, SCORES)[0] == 0
    assert made == [MODEL, LAYERS, BENCH, "statistics.safetensors", SCORES]
    made.clear()
    before = {*manifest_of(command_line.get_profile(DIGITS)), TRANSFER}  # from which no other study can transfer
    _run(capsys, "build", DIGITS)
    assert made == [name for name in FILES if name not in before]
    made.clear()
    _run(capsys, "build", DIGITS)
    assert made == []
    (tmp_path / DIGITS / LAYERS).write_text("altered")
    code, said, _ = _run(capsys, "build", DIGITS, HELDOUT)
    assert (code, made) == (0, [LAYERS])  # which is what it was again, and so is all that was made from it
    assert said.startswith("layers.csv: altered\n")


def test_what_is_published_although_out_of_date_is_renewed_if_it_is_meant(made, tmp_path, capsys, monkeypatch):
    _run(capsys, "build", DIGITS, HELDOUT)
    assert _run(capsys, "keep", DIGITS, SCORES, "--why", "old numbers", "--outdated")[0] == 0
    made.clear()
    _run(capsys, "build", DIGITS, HELDOUT)
    assert made == []
    _run(capsys, "build", DIGITS, SCORES)
    assert made == [SCORES]


def test_status_says_how_every_file_is(made, tmp_path, capsys):
    _run(capsys, "build", DIGITS)
    (tmp_path / DIGITS / ENUMERATION).write_text("altered")
    (tmp_path / DIGITS / HELDOUT).unlink()
    _run(capsys, "keep", DIGITS, CHECKS, "--why", "old\nnumbers", "--outdated")
    with new_file(command_line.get_profile(DIGITS), LAYERS, seconds=0.0, rows=8) as path:
        path.write_text("other")
    code, said, errors = _run(capsys, "status", DIGITS)
    states = {line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines()[1:]}
    assert (code, errors, list(states)) == (0, "", list(FILES))
    assert states[MODEL] == "up to date"
    assert states[LAYERS] == "8 up to date"
    assert states[ENUMERATION] == "altered"
    assert states[HELDOUT] == states[TRANSFER] == "missing"
    assert states[CHECKS] == "published although out of date: old numbers"
    assert states[BENCH] == "out of date because layers.csv has changed"
    assert _run(capsys, "status") == (0, said, "")  # no other study has files here


@pytest.mark.slow
def test_files_are_kept_in_an_order_in_which_they_can_be(made, tmp_path, capsys, monkeypatch):
    _run(capsys, "build", DIGITS)
    path = tmp_path / DIGITS / "manifest.json"
    path.write_text(path.read_text().replace('"code": "', '"code": "x'))
    code, said, _ = _run(
        capsys, "keep", DIGITS, *reversed(manifest_of(command_line.get_profile(DIGITS))), "--why", "moved"
    )
    assert code == 0
    assert {line.partition(": ")[2] for line in said.splitlines()} == {"up to date"}


WRONG = [
    [],
    ["nothing"],
    ["status", "nobody"],
    ["status", "../digits-resnet8"],
    ["status", "--all"],
    ["build"],
    ["build", "nobody"],
    ["build", ""],
    ["build", DIGITS, "x.csv"],
    ["build", DIGITS, MODEL, "../model.safetensors"],
    ["build", DIGITS, MODEL, "--seed", "x"],
    ["build", DIGITS, MODEL, "--seed", "-1"],
    ["keep"],
    ["keep", DIGITS],
    ["keep", DIGITS, BENCH],
    ["keep", DIGITS, BENCH, "--why"],
    ["keep", DIGITS, BENCH, "--why", "it is missing"],
    ["keep", DIGITS, "x.csv", "--why", "it is missing"],
    ["keep", "nobody", BENCH, "--why", "nobody knows it"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_command_is_answered_in_one_line(made, tmp_path, capsys, arguments):
    code, said, errors = _run(capsys, *arguments)
    assert (code, said, made) == (2, "", [])
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_study_that_cannot_be_read_is_answered_in_one_line(made, tmp_path, capsys):
    (tmp_path / DIGITS).mkdir()
    (tmp_path / DIGITS / "manifest.json").write_text("[]")
    for arguments in (["status", DIGITS], ["build", DIGITS], ["keep", DIGITS, MODEL, "--why", "x"]):
        code, _, errors = _run(capsys, *arguments)
        assert code == 2
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1


@pytest.mark.slow
def test_the_command_works_as_printed_and_says_how_things_are_without_torch(tmp_path):
    code = "import sys; from book.studies.__main__ import main; main(['status']); sys.exit('torch' in sys.modules)"
    environment = os.environ | {"EMQ_STUDY_ROOT": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, check=False).returncode == 0
    command = [sys.executable, "-m", "book.studies", "build", DIGITS, "x.csv"]
    found = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: no study has a file 'x.csv'")
