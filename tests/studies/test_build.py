"""Every file of a study, made by the command line: it knows all that it was made from."""

import pytest
import watching

from book.studies.files import BENCH, CHECKS, FILES, NEUTRAL
from book.studies.study import manifest_of, stale_because
from emq_lib.core.sources import reached

MADE = sorted(FILES)


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


@pytest.mark.parametrize("filename", MADE)
def test_a_made_file_is_up_to_date(tiny, filename):
    assert filename in manifest_of(tiny)
    assert stale_because(tiny, filename) == []


@pytest.mark.parametrize("filename", MADE)
def test_a_file_declares_what_its_builder_reads(look, filename):
    read = {name for name in look(filename).files if "/" not in name} - look(filename).made
    assert read <= set(FILES[filename].inputs)


@pytest.mark.parametrize("filename", MADE)
def test_a_file_declares_the_settings_that_its_builder_reads(look, filename):
    fields = set(watching.TINY.__dataclass_fields__) & look(filename).fields - {"name"}
    declared = {
        field for made in look(filename).made for name in _with_ancestors(made) for field in FILES[name].settings
    }
    if {BENCH, CHECKS} & look(filename).made:
        declared.add("quantizer")  # they hold the rows of each
    assert fields <= declared


@pytest.mark.parametrize("filename", MADE)
def test_the_code_of_a_file_is_the_code_that_runs(look, filename):
    ran = {place for place in look(filename).functions if place[0] not in (*NEUTRAL, "book.studies.__main__")}
    found = set().union(*(reached(*FILES[made].code, neutral=NEUTRAL) for made in look(filename).made))
    assert ran - found <= {tuple(FILES[filename].builder.split(":"))}
