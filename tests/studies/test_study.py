"""Files of a study: kills at every step, races, full disks, what is out of date, letting a file stand."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shlex
import signal
import sys
import threading

import pytest
import torch

from book.places import REPOSITORY
from book.studies import __main__ as command_line
from book.studies import origins
from book.studies import study as study_module
from book.studies.files import BENCH, FILES, HELDOUT, LAYERS, MODEL, SCORES, STATISTICS, TABLES, TRANSFER
from book.studies.study import (
    checked_path,
    has_study,
    keep,
    manifest_of,
    new_file,
    one_thread,
    read_facts,
    renewal,
    save_tensors,
    seconds_of,
    sole_writer,
    stale_because,
    study_folder,
)
from emq_lib.core.errors import (
    CorruptArtefactError,
    DiskFullError,
    MissingArtefactError,
    StaleArtefactError,
    StudyBusyError,
    UnwritablePathError,
)
from emq_lib.core.files import MANIFEST, sha256
from emq_lib.core.profiles import get_profile

DIGITS = get_profile("digits-resnet8")
OTHER = get_profile("cifar10-resnet20")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Return the folder of an empty digits study."""
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path))
    monkeypatch.setattr(study_module, "_commit", lambda: "0123456789ab")
    return tmp_path / DIGITS.name


def _put(filename, text, profile=DIGITS, **entry):
    with new_file(profile, filename, **({"seconds": 0.0} | entry)) as path:
        path.write_text(text)


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# Kills


def _forked(job):
    """Run a job in a copy of this process and return how that ended."""
    process = os.fork()
    if not process:
        status = 1
        with contextlib.suppress(BaseException):
            status = job() or 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _killed_before(step, job, root):
    """Run a job, killed before a step: a file below the root opened to write, renamed or removed. Return the steps."""

    def run():
        taken = 0

        def count(event, details):
            nonlocal taken
            writes = event in ("os.rename", "os.remove") or (event == "open" and (details[2] or 0) & os.O_ACCMODE)
            if writes and str(details[0]).startswith(str(root)):
                if taken == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                taken += 1

        sys.addaudithook(count)
        job()
        return taken

    return _forked(run)


@pytest.mark.slow
def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one(folder):
    def job():
        _put(LAYERS, "new")

    steps, seen = _killed_before(None, job, folder), set()
    assert steps >= 5
    for step in range(steps):
        _put(LAYERS, "old")
        assert _killed_before(step, job, folder) == -signal.SIGKILL
        before = _contents(folder)
        text = checked_path(DIGITS, LAYERS).read_text()
        assert _contents(folder) == before  # a reader needs no permission to write
        with sole_writer(DIGITS):
            assert set(_contents(folder)) == {LAYERS, MANIFEST}
        assert checked_path(DIGITS, LAYERS) == folder / LAYERS
        assert (folder / LAYERS).read_text() == text
        job()
        assert (folder / LAYERS).read_text() == "new"
        seen.add(text)
    assert seen == {"old", "new"}


@pytest.mark.slow
def test_the_first_file_of_a_study_is_there_or_not(folder):
    def job():
        _put(LAYERS, "new")

    steps = _killed_before(None, job, folder)
    for step in range(steps):
        for path in folder.iterdir():
            path.unlink()
        _killed_before(step, job, folder)
        with contextlib.suppress(MissingArtefactError):
            assert checked_path(DIGITS, LAYERS).read_text() == "new"
        job()
        assert checked_path(DIGITS, LAYERS).read_text() == "new"
        assert set(_contents(folder)) == {LAYERS, MANIFEST}


def test_an_interrupted_block_leaves_what_was_there(folder):
    _put(LAYERS, "old")
    before = _contents(folder)

    def stop():
        with new_file(DIGITS, LAYERS, seconds=0.0) as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert _contents(folder) == before


# Two at once


@pytest.mark.slow
@pytest.mark.parametrize("race", range(3))
def test_two_writers_lose_no_entry(folder, race):
    def write(name):
        for number in range(20):
            while True:
                with contextlib.suppress(StudyBusyError):
                    _put(f"{name}{number}", f"{name}{number} {race}")
                    break

    process = os.fork()
    if not process:
        with contextlib.suppress(BaseException):
            write("theirs")
            os._exit(0)
        os._exit(1)
    write("ours")
    assert os.waitpid(process, 0)[1] == 0
    names = {f"{name}{number}" for name in ("ours", "theirs") for number in range(20)}
    assert set(manifest_of(DIGITS)) == names
    assert set(_contents(folder)) == names | {MANIFEST}
    assert all(checked_path(DIGITS, name).read_text() == f"{name} {race}" for name in names)


@contextlib.contextmanager
def _another_writer():
    """Let another process hold the study while the block runs; yields its number."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        with sole_writer(DIGITS):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_second_writer_is_told_so_and_a_killed_one_is_in_nobodys_way(folder):
    _put(LAYERS, "old")
    before = _contents(folder)
    with _another_writer():
        with pytest.raises(StudyBusyError, match="Another run is writing the study"):
            _put(LAYERS, "new")
        assert checked_path(DIGITS, LAYERS).read_text() == "old"
        with sole_writer(OTHER):  # another study is free
            pass
        assert _contents(folder) == before
    _put(LAYERS, "new")
    assert checked_path(DIGITS, LAYERS).read_text() == "new"


def test_locks_nest_in_one_thread_and_keep_other_threads_out(folder):
    found = []

    def write():
        try:
            _put(LAYERS, "theirs")
        except BaseException as error:
            found.append(error)

    with sole_writer(DIGITS) as outer, sole_writer(DIGITS) as inner:
        assert outer == inner == folder
        _put(LAYERS, "ours")
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        _put(BENCH, "ours")
    assert [type(error) for error in found] == [StudyBusyError]
    assert checked_path(DIGITS, LAYERS).read_text() == "ours"
    write()
    assert len(found) == 1


def test_a_lock_is_free_after_an_error(folder):
    with pytest.raises(KeyboardInterrupt), sole_writer(DIGITS), sole_writer(DIGITS):
        raise KeyboardInterrupt
    with _another_writer():
        pass


def test_inside_one_thread_is_used_and_the_number_comes_back():
    torch.set_num_threads(2)
    with sole_writer(DIGITS), sole_writer(DIGITS):
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


# Disks and places


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_at_any_step_changes_nothing(folder, monkeypatch, step, call):
    _put(LAYERS, "old")
    before = _contents(folder)
    _fail_once(monkeypatch, os, step, call)
    with pytest.raises(DiskFullError, match="No room to write"):
        _put(LAYERS, "new")
    assert _contents(folder) == before


@pytest.mark.parametrize("call", range(3))
def test_a_full_disk_while_anything_is_opened_changes_nothing(folder, monkeypatch, call):
    _put(LAYERS, "old")
    before, opened = _contents(folder), pathlib.Path.open
    left = call

    def fail(self, mode="r", *args, **options):
        nonlocal left
        if set(mode) & set("wax+"):
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(pathlib.Path, "open", fail)
    with pytest.raises(DiskFullError, match="No room to write"):
        _put(LAYERS, "new")
    assert _contents(folder) == before


def test_once_entered_a_file_counts_wherever_it_stands(folder, monkeypatch):
    _put(LAYERS, "old")
    with monkeypatch.context() as patch:
        replace = os.replace

        def fail(source, target):
            if str(source).endswith(".staged"):
                raise OSError(errno.EACCES, "Permission denied", str(target))
            replace(source, target)

        patch.setattr(os, "replace", fail)
        with pytest.raises(UnwritablePathError, match="Permission denied"):
            _put(LAYERS, "new")
    assert checked_path(DIGITS, LAYERS).read_text() == "new"
    with sole_writer(DIGITS):
        assert (folder / LAYERS).read_text() == "new"


def _fail_once(monkeypatch, owner, name, call):
    function, left = getattr(owner, name), call

    def fail(*args):
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[-1]))
        return function(*args)

    monkeypatch.setattr(owner, name, fail)


def test_a_full_disk_under_tensors_is_named(folder, monkeypatch):
    save_tensors(DIGITS, MODEL, {"w": torch.zeros(3)}, {"top1": 1.0}, seconds=1.0)
    before = _contents(folder)
    _fail_once(monkeypatch, os, "fsync", 0)
    with pytest.raises(DiskFullError, match="No room to write"):
        save_tensors(DIGITS, MODEL, {"w": torch.ones(3)}, {"top1": 2.0}, seconds=1.0)
    assert _contents(folder) == before
    assert read_facts(DIGITS, MODEL) == {"top1": 1.0}


def test_every_file_has_the_mode_of_the_umask(folder):
    before = os.umask(0o022)
    try:
        save_tensors(DIGITS, MODEL, {"w": torch.zeros(3)}, {}, seconds=1.0)
        _put(LAYERS, "new")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        [MODEL, LAYERS, MANIFEST, ".lock"], 0o644
    )


@pytest.mark.parametrize("place", ["folder", "x" * 300, "x" * 250])
def test_a_file_that_cannot_be_written_is_named(folder, place):
    _put(LAYERS, "old")
    (folder / "folder").mkdir()
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(UnwritablePathError):
        _put(place, "new")
    assert (folder / MANIFEST).read_bytes() == before
    assert not list(folder.glob(".*.staged")) + list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("root", ["taken", "x" * 300, "taken/below"])
def test_a_study_that_cannot_have_a_folder_is_named(tmp_path, monkeypatch, root):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path / root))
    with pytest.raises(UnwritablePathError, match="cannot be written"):
        _put(LAYERS, "new")
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_lock_that_cannot_be_made_is_named(folder):
    (folder / ".lock").mkdir(parents=True)
    with pytest.raises(UnwritablePathError, match="cannot be written"):
        _put(LAYERS, "new")


def test_what_killed_runs_left_goes_with_the_next_writer(folder):
    _put(LAYERS, "old")
    for name in (".layers.csv.staged", ".model.safetensors.99999999.tmp", ".x.staged"):
        (folder / name).write_text("half")
    own = folder / f".report.{os.getpid()}.tmp"
    own.write_text("being written")
    with sole_writer(DIGITS):
        assert set(_contents(folder)) == {LAYERS, MANIFEST, own.name}


def test_a_manifest_that_is_none_stops_every_writer(folder):
    _put(LAYERS, "old")
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(CorruptArtefactError, match="Restore it"):
        _put(LAYERS, "new")
    assert (folder / LAYERS).read_text() == "old"
    (folder / MANIFEST).unlink()
    _put(LAYERS, "new")
    assert checked_path(DIGITS, LAYERS).read_text() == "new"


# What is out of date


@pytest.fixture
def chain(folder, monkeypatch):
    """A study whose files are made from each other, and one that another study's files went into."""
    for name in (MODEL, LAYERS, BENCH, STATISTICS, SCORES, TABLES, HELDOUT):
        _put(name, name)
    _put(MODEL, "theirs", profile=OTHER)
    read = {f"{OTHER.name}/{MODEL}": sha256(study_folder(OTHER) / MODEL)}
    _put(TRANSFER, "log", others=read)
    _put(HELDOUT, HELDOUT)
    return folder


def _edit_entry(folder, filename, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[filename] |= changes
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _other_code(monkeypatch, filename):
    monkeypatch.setattr(origins, "code_version", lambda name: "other" if name == filename else _VERSION(name))


_VERSION = origins.code_version
CHANGES = {
    "an input made again": (HELDOUT, lambda _folder, _patch: _put(BENCH, "grown"), "bench.parquet has changed"),
    "an input altered": (HELDOUT, lambda folder, _: (folder / BENCH).write_text("x"), "bench.parquet has changed"),
    "an input removed": (HELDOUT, lambda folder, _: (folder / BENCH).unlink(), "bench.parquet is gone"),
    "an input that is new": (HELDOUT, lambda _folder, _patch: _put("evolution.jsonl", "x"), "evolution.jsonl is new"),
    "its code": (HELDOUT, lambda _, patch: _other_code(patch, HELDOUT), "the code that makes it has changed"),
    "code of an input": (HELDOUT, lambda _, patch: _other_code(patch, SCORES), "proxies.parquet is out of date"),
    "code of an input's input": (HELDOUT, lambda _, patch: _other_code(patch, MODEL), "bench.parquet is out of date"),
    "another study's file": (
        TRANSFER,
        lambda _folder, _patch: _put(MODEL, "new", profile=OTHER),
        f"{OTHER.name}/{MODEL} has changed",
    ),
    "another study's code": (TRANSFER, lambda _, patch: _other_code(patch, MODEL), f"{OTHER.name}/{MODEL} is out of"),
    "another study gone": (
        TRANSFER,
        lambda _folder, _patch: (study_folder(OTHER) / MODEL).unlink(),
        f"{OTHER.name}/{MODEL} is gone",
    ),
    "a study nobody knows": (
        TRANSFER,
        lambda folder, _: _edit_entry(folder, TRANSFER, inputs={"nobody/bench.parquet": "0"}),
        "nobody/bench.parquet is of a study that is not registered",
    ),
    "no word of its inputs": (
        HELDOUT,
        lambda folder, _: (folder / MANIFEST).write_text(json.dumps({HELDOUT: {"sha256": sha256(folder / HELDOUT)}})),
        "does not say what it was made from",
    ),
    "odd names of inputs": (
        HELDOUT,
        lambda folder, _: _edit_entry(folder, HELDOUT, inputs={"../../x": "0", "": "1", "..": None, "a/b/c": None}),
        "is gone",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_made_from_other_things_is_refused_with_the_command_that_renews_it(chain, monkeypatch, what):
    filename, change, reason = CHANGES[what]
    assert checked_path(DIGITS, filename).name == filename
    change(chain, monkeypatch)
    command = rf"Renew it: python -m book\.studies build {DIGITS.name} {filename}"
    for read in (checked_path, has_study):
        with pytest.raises(StaleArtefactError, match=rf"out of date: .*{reason}.*{command}"):
            read(DIGITS, filename)


FIELDS = {
    "choices": (2, 4),
    "activation_bits": 4,
    "calibration_images": 100,
    "bench_images": 50,
    "bench_configs": 50,
    "stratified_configs": 50,
    "one_bit_configs": 1,
    "pinned": (),
    "seed": 1,
    "model": "resnet20",
    "validation_images": 100,
    "training": None,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_bench_of_another_profile_is_refused(chain, field):
    with pytest.raises(StaleArtefactError, match=r"bench\.parquet is out of date"):
        checked_path(dataclasses.replace(DIGITS, **{field: FIELDS[field]}), BENCH)


@pytest.mark.parametrize("field", ["quantizer", "budgets"])
def test_what_does_not_decide_a_bench_does_not_count(chain, field):
    other = {"quantizer": "adaround", "budgets": (3.0,)}[field]
    assert checked_path(dataclasses.replace(DIGITS, **{field: other}), BENCH) == chain / BENCH


def test_a_file_published_although_it_is_out_of_date_is_let_through(chain, monkeypatch):
    _other_code(monkeypatch, SCORES)
    keep(DIGITS, SCORES, "the statistics were wrong", although_outdated=True)
    assert checked_path(DIGITS, SCORES) == chain / SCORES
    assert checked_path(DIGITS, HELDOUT) == chain / HELDOUT  # it was made from what is published
    assert study_module.outdated(DIGITS, SCORES) == "the statistics were wrong"
    _put(SCORES, "renewed")
    assert study_module.outdated(DIGITS, SCORES) is None
    with pytest.raises(StaleArtefactError, match="proxies.parquet has changed"):
        checked_path(DIGITS, HELDOUT)


def test_a_file_that_is_kept_is_up_to_date_again(chain, monkeypatch):
    _other_code(monkeypatch, BENCH)
    before = manifest_of(DIGITS)
    keep(DIGITS, BENCH, "a rename")
    assert stale_because(DIGITS, BENCH) == stale_because(DIGITS, HELDOUT) == []
    after = manifest_of(DIGITS)
    assert after[BENCH] == before[BENCH] | {"code": "other", "kept": "a rename"}
    assert {name: after[name] for name in after if name != BENCH} == {
        name: before[name] for name in before if name != BENCH
    }


@pytest.mark.parametrize(
    "change", ["an input made again", "an input altered", "an input removed", "an input that is new"]
)
def test_a_file_made_from_other_files_is_not_kept(chain, monkeypatch, change):
    CHANGES[change][1](chain, monkeypatch)
    before = _contents(chain)
    with pytest.raises(StaleArtefactError, match="was made from other files"):
        keep(DIGITS, HELDOUT, "I am sure")
    assert _contents(chain) == before
    keep(DIGITS, HELDOUT, "recomputed next week", although_outdated=True)
    assert checked_path(DIGITS, HELDOUT) == chain / HELDOUT
    assert manifest_of(DIGITS)[HELDOUT]["inputs"] == json.loads(before[MANIFEST])[HELDOUT]["inputs"]


def test_a_file_whose_entry_names_no_inputs_can_be_kept(chain):
    (chain / MANIFEST).write_text(
        json.dumps({name: {"sha256": entry["sha256"]} for name, entry in manifest_of(DIGITS).items()})
    )
    for name in (MODEL, LAYERS, BENCH):
        keep(DIGITS, name, "made by the same code in another place")
        assert stale_because(DIGITS, name) == []
    keep(DIGITS, TRANSFER, "likewise", others={f"{OTHER.name}/{MODEL}": sha256(study_folder(OTHER) / MODEL)})
    assert stale_because(DIGITS, TRANSFER) == []
    _put(MODEL, "new", profile=OTHER)
    assert stale_because(DIGITS, TRANSFER) == [f"{OTHER.name}/{MODEL} has changed"]


@pytest.mark.parametrize(("filename", "named"), [(BENCH, CorruptArtefactError), (SCORES, MissingArtefactError)])
def test_what_is_not_there_cannot_be_kept(chain, filename, named):
    (chain / BENCH).write_text("altered")
    (chain / SCORES).unlink()
    with pytest.raises(named):
        keep(DIGITS, filename, "why not")


def test_a_missing_file_is_no_study_and_a_wrong_one_is_an_error(chain):
    assert has_study(DIGITS, BENCH, HELDOUT)
    assert not has_study(DIGITS, BENCH, "searches.csv")
    assert not has_study(dataclasses.replace(DIGITS, name="nobody"), BENCH)
    (chain / HELDOUT).write_text("altered")
    with pytest.raises(CorruptArtefactError, match="truncated or altered"):
        has_study(DIGITS, HELDOUT)


# Facts, costs, places


def _header(text, length=None):
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\xff" * 40,
        _header(b"[]"),
        _header(b"{}"),
        _header(b"{}", length=1),
        _header(b'{"__metadata__": 3}'),
        _header(b'{"__metadata__": {}}'),
        _header(b'{"__metadata__": {"facts": "3"}}'),
        _header(b'{"__metadata__": {"facts": "[1]"}}'),
        _header(b'{"__metadata__": {"facts": "{"}}'),
        _header(b"[" * 10**6),
    ],
    ids=range(12),
)
def test_facts_that_are_none_are_named(folder, content):
    with new_file(DIGITS, MODEL, seconds=0.0) as path:
        path.write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="is no file of a study"):
        read_facts(DIGITS, MODEL)


def test_tensors_and_facts_come_back_and_have_the_same_bytes(folder):
    tensors = {"b": torch.arange(6).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.float16)}
    save_tensors(DIGITS, MODEL, tensors, {"top1": 90.0, "epochs": (1, 2)}, seconds=1.5, costs={"a": 1.0})
    first = (folder / MODEL).read_bytes()
    save_tensors(DIGITS, MODEL, dict(reversed(tensors.items())), {"epochs": (1, 2), "top1": 90.0}, seconds=2.5)
    assert (folder / MODEL).read_bytes() == first
    assert read_facts(DIGITS, MODEL) == {"top1": 90.0, "epochs": [1, 2]}
    assert (seconds_of(DIGITS, MODEL), seconds_of(DIGITS, BENCH)) == (2.5, 0.0)


def test_a_study_of_another_seed_never_stands_among_the_published_ones(monkeypatch):
    monkeypatch.delenv("EMQ_STUDY_ROOT")
    assert study_folder(DIGITS) == REPOSITORY / "data" / DIGITS.name
    other = study_folder(dataclasses.replace(DIGITS, seed=3))
    assert other.is_relative_to(REPOSITORY / "_build")
    assert other != study_folder(dataclasses.replace(DIGITS, seed=4))


@pytest.mark.parametrize("filename", FILES)
def test_the_command_that_renews_a_file_is_one(filename):
    for seed in (0, 3):
        given = shlex.split(renewal(dataclasses.replace(DIGITS, seed=seed), filename))
        assert given[:3] == ["python", "-m", "book.studies"]
        found = command_line._parsed(given[3:])
        assert (found.action, found.study, found.files, found.seed) == ("build", DIGITS.name, [filename], seed)
    module, _, function = FILES[filename].builder.partition(":")
    assert f"call {module}.{function} again" == renewal(dataclasses.replace(DIGITS, name="own"), filename)
    assert f"def {function}(" in (REPOSITORY / f"{module.replace('.', '/')}.py").read_text()


def test_files_stand_in_an_order_in_which_they_can_be_made():
    made = set()
    for filename, file in FILES.items():
        assert file.name == filename
        assert set(file.inputs) <= made
        made.add(filename)
        assert set(file.settings) <= set(DIGITS.__dataclass_fields__)
