"""Files of a study under ``data/<profile>/``: their place, the lock, and the manifest that vouches for them.

A file is written whole and entered into ``manifest.json`` in one step that survives a kill: it is staged under another
name, entered, and put in its place; whoever comes after a kill finishes that. Its entry holds the hashes of the files
that it was computed from and of the code that decides its numbers, so that a stale file is refused, with the command
that renews it. :mod:`book.studies.files` says which file is made from what.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from book.places import REPOSITORY
from book.studies.origins import made_from, outdated, renewal, stale_because, study_folder, what_changed
from emq_lib.core.errors import (
    CorruptArtefactError,
    MissingArtefactError,
    StaleArtefactError,
    StudyBusyError,
)
from emq_lib.core.files import (
    MANIFEST,
    Kind,
    atomic_path,
    named_when_unwritable,
    read_manifest,
    read_table,
    sha256,
    staged_path,
    sweep,
    to_json,
    vouched_path,
    write_bytes,
)
from emq_lib.core.profiles import Profile

if TYPE_CHECKING:
    import pandas as pd
    import torch

_RECORDED_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "safetensors")
_SAFETENSORS_LENGTH = 8  # bytes in front of the header


@contextlib.contextmanager
def sole_writer(profile: Profile) -> Iterator[pathlib.Path]:
    """Keep every other run from writing the study while the block runs; a killed run does not block later ones.

    What a killed run left half done is finished or removed. Inside the block PyTorch and linear algebra use one thread,
    so that a study has the same bytes whatever the number of processors. May be nested.

    Yields:
        the study's folder.

    Raises:
        StudyBusyError: another run is writing it, or another thread or a worker of this one.
        UnwritablePathError: the folder cannot be written.
        CorruptArtefactError: its manifest is none.
    """
    folder = study_folder(profile)
    with named_when_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise StudyBusyError(
                f"Another run is writing the study in {folder}. Wait for it, stop it, or set EMQ_STUDY_ROOT elsewhere."
            ) from error
    try:
        with contextlib.ExitStack() as stack:
            if lock.lock_counter == 1:
                _finish(folder)
                stack.enter_context(one_thread())
            yield folder
    finally:
        lock.release()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch and the libraries of linear algebra use one thread inside the block."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _finish(folder: pathlib.Path) -> None:
    """Put staged files that the manifest vouches for in their place; remove others and what killed runs left."""
    manifest = read_manifest(folder)
    with named_when_unwritable(folder):
        for staged in folder.glob(".*.staged"):
            filename = staged.name.removeprefix(".").removesuffix(".staged")
            if filename in manifest and sha256(staged) == manifest[filename]["sha256"]:
                os.replace(staged, folder / filename)
            else:
                staged.unlink()
        sweep(folder)


@contextlib.contextmanager
def new_file(
    profile: Profile,
    filename: str,
    *,
    seconds: float,
    rows: int | None = None,
    note: str = "",
    costs: Mapping[str, float] | None = None,
    others: Mapping[str, str] | None = None,
) -> Iterator[pathlib.Path]:
    """Yield a path to write a file of the study to; on success it takes its place together with its manifest entry.

    Args:
        profile: the study.
        filename: name inside the study's folder.
        seconds: wall time that it took.
        rows: number of rows, for tables.
        note: anything that a reader of the card must know.
        costs: what was computed -> wall time.
        others: "study/file" -> SHA-256, of files of other studies that it was computed from.

    Raises:
        StudyBusyError, DiskFullError, UnwritablePathError: nothing was changed.
    """
    with sole_writer(profile) as folder:
        staged, entry = staged_path(folder, filename), {"rows": rows, "seconds": round(seconds, 1), "note": note}
        with named_when_unwritable(folder / filename):
            if (folder / filename).is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
        try:
            with atomic_path(staged) as path:
                yield path
            entry |= _origin(profile, filename, staged) | ({"costs": dict(costs)} if costs else {})
            entry["inputs"] |= dict(others or {})
            _write_entry(folder, filename, entry)  # from here on the new file counts, wherever it stands
        finally:
            _finish(folder)


def _origin(profile: Profile, filename: str, path: pathlib.Path) -> dict[str, object]:
    """Return what the manifest says of a file's origin."""
    return {
        "sha256": sha256(path),
        "command": renewal(profile, filename),
        **made_from(profile, filename),
        "seed": profile.seed,
        "commit": _commit(),
        "versions": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        "python": platform.python_version(),
        "device": device_name(),
    }


def _write_entry(folder: pathlib.Path, filename: str, entry: Mapping[str, object]) -> None:
    manifest = read_manifest(folder) | {filename: entry}
    write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def checked_path(profile: Profile, filename: str) -> pathlib.Path:
    """Return the path of a study's file after comparing it with the manifest.

    Raises:
        MissingArtefactError: the file or its manifest entry is absent.
        CorruptArtefactError: the file is not the one that the manifest describes.
        StaleArtefactError: it was made from other files, settings or code than there are now, and the manifest does not
            say that it is published as "outdated" all the same.
    """
    remedy = f"Restore it, or make it again: {renewal(profile, filename)}"
    path = vouched_path(study_folder(profile), filename, remedy)
    if outdated(profile, filename) is None and (reasons := stale_because(profile, filename)):
        raise StaleArtefactError(f"{path} is out of date: {'; '.join(reasons)}. Renew it: {renewal(profile, filename)}")
    return path


def load_table(
    profile: Profile, filename: str, columns: Mapping[str, Kind | None], *, unique: Sequence[str], **options: object
) -> pd.DataFrame:
    """Load a table of a study: :func:`checked_path`, then :func:`emq_lib.core.files.read_table`.

    Raises:
        MissingArtefactError, StaleArtefactError: see :func:`checked_path`.
        CorruptArtefactError: it is no such table.
    """
    return read_table(checked_path(profile, filename), columns, unique=unique, **options)


def manifest_of(profile: Profile) -> dict[str, dict]:
    """Return a study's manifest: file name -> provenance. Errors: :func:`emq_lib.core.files.read_manifest`."""
    return read_manifest(study_folder(profile))


def has_study(profile: Profile, *filenames: str) -> bool:
    """Return whether every named file of the study is there.

    Raises:
        CorruptArtefactError, StaleArtefactError: one is there, but cannot be used; that must not pass for its absence.
    """
    try:
        for filename in filenames:
            checked_path(profile, filename)
    except MissingArtefactError:
        return False
    return True


def save_tensors(
    profile: Profile, filename: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, object], **entry: object
) -> None:
    """Write tensors, and facts about them, as one safetensors file of the study; same content, same bytes.

    The facts are one text, because the format stores several texts in any order. `entry` is as of :func:`new_file`.
    """
    from safetensors.torch import save

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with new_file(profile, filename, **entry) as path:
        path.write_bytes(save(contiguous, metadata={"facts": to_json(facts)}))


def read_facts(profile: Profile, filename: str) -> dict:
    """Return the facts that a safetensors file of the study carries.

    Raises:
        MissingArtefactError, CorruptArtefactError, StaleArtefactError: see :func:`checked_path`.
    """
    path = checked_path(profile, filename)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_SAFETENSORS_LENGTH), "little")
        header = file.read(min(length, path.stat().st_size))
    try:
        return dict(json.loads(json.loads(header)["__metadata__"]["facts"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtefactError(f"{path} is no file of a study ({error}). Restore or rebuild it.") from error


def keep(
    profile: Profile,
    filename: str,
    why: str,
    *,
    others: Mapping[str, str] | None = None,
    although_outdated: bool = False,
) -> None:
    """Let a file of a study stand after a change of code or settings that changes none of its numbers.

    Args:
        profile: the study.
        filename: inside its folder.
        why: how that is known; stands in the manifest.
        others: as of :func:`new_file`, for an entry that does not say it.
        although_outdated: publish the file although it is out of date; `why` tells readers what is wrong with it.

    Raises:
        MissingArtefactError, CorruptArtefactError: see :func:`checked_path`.
        StaleArtefactError: a file that it was made from has changed, so numbers may have.
    """
    with sole_writer(profile) as folder:
        vouched_path(folder, filename, f"Make it: {renewal(profile, filename)}")
        entry, now = read_manifest(folder)[filename], made_from(profile, filename)
        if although_outdated:
            _write_entry(folder, filename, entry | {"outdated": why})
            return
        before = entry.get("inputs", {})
        now["inputs"] |= {name: digest for name, digest in before.items() if "/" in name} or dict(others or {})
        if changed := [reason for name, digest in before.items() if (reason := what_changed(profile, name, digest))]:
            raise StaleArtefactError(
                f"{folder / filename} was made from other files: {'; '.join(changed)}. "
                f"Renew it: {renewal(profile, filename)}"
            )
        _write_entry(folder, filename, {key: entry[key] for key in entry if key != "outdated"} | now | {"kept": why})


def seconds_of(profile: Profile, filename: str) -> float:
    """Return the wall time that a file took, 0 if there is none."""
    return float(read_manifest(study_folder(profile)).get(filename, {}).get("seconds", 0.0))


def _commit() -> str:
    """Return the commit of the working tree, with "+changes" if it differs; "unknown" outside a checkout."""
    try:
        run = {"cwd": REPOSITORY, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        places = ["emq_lib", "book/studies"]
        changed = subprocess.run(["git", "status", "--porcelain", "--", *places], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def device_name() -> str:
    """Describe the processor or the accelerator in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
