"""Files that are written whole or not at all, their hashes, the manifest beside them, and plain JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd

from emq_lib.core.errors import CorruptArtefactError, DiskFullError, MissingArtefactError, UnwritablePathError

MANIFEST = "manifest.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside `path` that replaces it on success; on an error `path` stays as it was.

    What killed runs left beside `path` is removed.

    Raises:
        DiskFullError: there is no room.
        UnwritablePathError: the place cannot be written: a folder, no permission, a name too long.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with named_when_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        sweep(path.parent, f".{glob_escape(path.name)}.*.tmp")
    try:
        with named_when_unwritable(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def glob_escape(name: str) -> str:
    """Return a file name as a pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def sweep(folder: pathlib.Path, pattern: str = ".*.tmp") -> None:
    """Remove temporary files that no running process writes."""
    for path in folder.glob(pattern):
        owner = path.name.removesuffix(".tmp").rpartition(".")[2]
        if not (owner.isdigit() and _runs(int(owner))):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Return whether a process is running that may be the writer of a temporary file."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def named_when_unwritable(path: pathlib.Path) -> Iterator[None]:
    """Name the error of a disk (or a quota) without room, or of a place that cannot be written, inside the block.

    Errors of other places pass through.

    Raises:
        DiskFullError: there is no room.
        UnwritablePathError: the place cannot be written.
    """
    try:
        yield
    except (DiskFullError, UnwritablePathError, MissingArtefactError):
        raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFullError(
                f"No room to write {path} ({error.strerror}). What was finished is kept: free some and call again."
            ) from error
        raise UnwritablePathError(
            f"{path} cannot be written ({error.strerror or error}). Give another path, or permission to write there."
        ) from error


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write a file whole: a file that was there stays as it was if anything fails. Errors: :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def sha256(path: pathlib.Path) -> str:
    """Return the hexadecimal SHA-256 of a file; a file that did not change is read once."""
    facts = path.stat()
    return _sha256(path, facts.st_mtime_ns, facts.st_size, facts.st_ino)


@functools.lru_cache(maxsize=256)
def _sha256(path: pathlib.Path, _changed: int, _size: int, _number: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: pathlib.Path) -> dict[str, dict]:
    """Return the manifest of a folder: file name -> provenance. A folder without one gives an empty dictionary.

    Raises:
        CorruptArtefactError: the manifest is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptArtefactError(f"{path} is not valid JSON ({error}). Restore or rebuild it.") from error
    entries = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in entries):
        raise CorruptArtefactError(f"{path} is no manifest: it needs a SHA-256 for each file. Restore or rebuild it.")
    return found


def vouched_path(folder: pathlib.Path, filename: str, remedy: str = "Restore it, or make it again.") -> pathlib.Path:
    """Return the path of a file after comparing it with the manifest of its folder.

    A file is staged, entered into the manifest, and then put in its place: if that was interrupted after the second
    step, the staged file is the one that the manifest vouches for, and its path is returned.

    Raises:
        MissingArtefactError: the file or its manifest entry is absent.
        CorruptArtefactError: the file is not the one that the manifest describes.
    """
    path, entry = folder / filename, read_manifest(folder).get(filename)
    staged = staged_path(folder, filename)
    if entry is not None and staged.is_file() and sha256(staged) == entry["sha256"]:
        return staged
    if not path.is_file():
        raise MissingArtefactError(f"{path} does not exist. {remedy}")
    if entry is None:
        raise MissingArtefactError(f"{path} is not listed in {MANIFEST}, so nothing vouches for it. {remedy}")
    if sha256(path) != entry["sha256"]:
        raise CorruptArtefactError(f"{path} does not match the SHA-256 in {MANIFEST}: truncated or altered. {remedy}")
    return path


def staged_path(folder: pathlib.Path, filename: str) -> pathlib.Path:
    """Return where a file waits until the manifest vouches for it."""
    return folder / f".{filename}.staged"


def read_table(path: pathlib.Path, columns: Mapping[str, object], **options: object) -> pd.DataFrame:
    """Read a CSV or parquet table and check that it has what is needed.

    Args:
        path: the file.
        columns: name -> type that a column is read as (CSV only), or None.
        options: of the reader.

    Raises:
        CorruptArtefactError: it is empty, no such table, or lacks a column.
    """
    try:
        if path.name.removesuffix(".staged").endswith(".parquet"):
            table = pd.read_parquet(path, **options)
        else:
            types = {name: kind for name, kind in columns.items() if kind is not None}
            table = pd.read_csv(path, dtype=types, **options)
    except (OSError, ValueError) as error:  # of pandas and of pyarrow, all of which are ValueErrors
        raise CorruptArtefactError(f"{path} is not a table ({error}). Restore or rebuild it.") from error
    if absent := sorted(set(columns) - set(table.columns)):
        raise CorruptArtefactError(f"{path} lacks the columns {absent}. Restore or rebuild it.")
    return table


def to_json(value: object) -> str:
    """Return compact JSON text of numbers, texts, tuples and dictionaries, NumPy scalars included, keys in order."""
    default: Callable = lambda item: item.item() if isinstance(item, np.generic) else list(item)  # noqa: E731
    return json.dumps(value, sort_keys=True, default=default)
