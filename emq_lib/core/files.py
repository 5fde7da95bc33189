"""Files that are written whole or not at all, their hashes, the manifest beside them, and plain JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow as pa

from emq_lib.core.errors import (
    CorruptArtefactError,
    DiskFullError,
    EMQError,
    MissingArtefactError,
    UnwritablePathError,
)

MANIFEST = "manifest.json"
Kind = type | UnionType
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOOKS = 50  # at a file and its entry, while somebody replaces both
_RENEW = "Restore it, or make it again."
_RENEW_MANIFEST = "Restore it; without it nothing vouches for the files beside it, and they are made again."
_HUGE = 1e15
_CLOCK = 2.0  # seconds by which the clocks of the system and of a disk may differ
_ENTRY = {  # what an entry of a manifest may hold, as far as it is read
    "sha256": lambda value: isinstance(value, str),
    "rows": lambda value: value is None or _is_number(value),
    "seconds": lambda value: _is_number(value),
    "seed": lambda value: isinstance(value, int),
    "device": lambda value: isinstance(value, str),
    "note": lambda value: isinstance(value, str),
    "costs": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "inputs": lambda value: isinstance(value, dict) and all(isinstance(each, str | None) for each in value.values()),
    "outdated": lambda value: isinstance(value, str),
}


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside `path` that replaces it on success; on an error `path` stays as it was.

    What killed runs left beside `path` is removed. Errors of other files inside the block pass through.

    Raises:
        DiskFullError: there is no room.
        UnwritablePathError: the place cannot be written: a folder, no permission, a name too long.
    """
    with named_when_unwritable(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, f".{glob.escape(path.name)}.*.tmp")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_when_unwritable(path, temporary):
            yield temporary
        with named_when_unwritable(path):
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: pathlib.Path) -> None:
    """Wait until a file is on the disk.

    Without it a power cut may leave the new name with nothing behind it, and some disks say only here that they are
    full. The order of renames is kept by the file system, so the folder needs no such wait.
    """
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sweep(folder: pathlib.Path, pattern: str = ".*.tmp") -> None:
    """Remove temporary files that no running process writes."""
    for path in folder.glob(pattern):
        owner = path.name.removesuffix(".tmp").rpartition(".")[2]
        if not (owner.isdigit() and _may_write(int(owner), path)):
            path.unlink(missing_ok=True)


def _may_write(process: int, path: pathlib.Path) -> bool:
    """Return whether the process that wrote a file may still be running; another one may have got its number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    try:
        return _started(process) <= path.stat().st_mtime + _CLOCK
    except (OSError, ValueError, IndexError):  # no /proc here, or the file is gone
        return True


def _started(process: int) -> float:
    """Return when a process started, in seconds since 1970, as Linux tells it."""
    proc = pathlib.Path("/proc")
    ticks = int((proc / str(process) / "stat").read_text().rpartition(")")[2].split()[19])
    boot = next(line for line in (proc / "stat").read_text().splitlines() if line.startswith("btime "))
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def named_when_unwritable(path: pathlib.Path, written: pathlib.Path | None = None) -> Iterator[None]:
    """Name the error of a disk (or a quota) without room, or of a place that cannot be written, inside the block.

    Args:
        path: what to name.
        written: the only file whose errors are meant, where the block may read and write others; those pass through.

    Raises:
        DiskFullError: there is no room.
        UnwritablePathError: the place cannot be written.
    """
    try:
        yield
    except EMQError:
        raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFullError(
                f"No room to write {error.filename or path} ({error.strerror}). What was finished is kept: free some "
                "and call again."
            ) from error
        if written is not None and error.filename != str(written) and error.errno != errno.EIO:
            raise
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
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptArtefactError(f"{path} is not valid JSON ({error}). {_RENEW_MANIFEST}") from error
    if not isinstance(found, dict):
        raise CorruptArtefactError(f"{path} is no manifest, which maps names of files to entries. {_RENEW_MANIFEST}")
    for filename, entry in found.items():
        if not isinstance(entry, dict) or "sha256" not in entry:
            raise CorruptArtefactError(f"{path} gives no SHA-256 for {filename!r}. {_RENEW_MANIFEST}")
        if wrong := [key for key, allowed in _ENTRY.items() if key in entry and not allowed(entry[key])]:
            raise CorruptArtefactError(f"{path} has an impossible {wrong[0]} for {filename!r}. {_RENEW_MANIFEST}")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and -_HUGE < value < _HUGE


def vouched_path(folder: pathlib.Path, filename: str, remedy: str = "Restore it, or make it again.") -> pathlib.Path:
    """Return the path of a file after comparing it with the manifest of its folder.

    A file is staged, entered into the manifest, and then put in its place: if that was interrupted after the second
    step, the staged file is the one that the manifest vouches for, and its path is returned. Nothing is written.

    Raises:
        MissingArtefactError: the file or its manifest entry is absent.
        CorruptArtefactError: the file is not the one that the manifest describes.
    """
    path, entry = folder / filename, read_manifest(folder).get(filename)
    for _ in range(_LOOKS):
        if entry is not None:
            for place in (path, staged_path(folder, filename), path):  # it may be put in its place between two looks
                with contextlib.suppress(OSError):  # gone since, or no file
                    if sha256(place) == entry["sha256"]:
                        return place
        before, entry = entry, read_manifest(folder).get(filename)
        if entry == before:
            break
    if not path.is_file():
        raise MissingArtefactError(f"{path} does not exist. {remedy}")
    if entry is None:
        raise MissingArtefactError(f"{path} is not listed in {MANIFEST}, so nothing vouches for it. {remedy}")
    raise CorruptArtefactError(f"{path} does not match the SHA-256 in {MANIFEST}: truncated or altered. {remedy}")


def staged_path(folder: pathlib.Path, filename: str) -> pathlib.Path:
    """Return where a file waits until the manifest vouches for it."""
    return folder / f".{filename}.staged"


def read_table(
    path: pathlib.Path, columns: Mapping[str, Kind | None], *, unique: Sequence[str] = (), **options: object
) -> pd.DataFrame:
    """Read a CSV or parquet table and check that it has what is needed.

    Args:
        path: the file.
        columns: name -> what each of its cells holds: a finite number (float), a whole one (int), text (str), a truth
            value (bool), or anything (None); ``float | None`` and the like where cells may be empty.
        unique: columns that no two rows share.
        options: of the reader.

    Raises:
        CorruptArtefactError: it is empty, no such table, lacks a column, holds what a column cannot hold, or has other
            rows than a manifest beside it says.
    """
    kinds = {name: kind for name, kind in columns.items() if kind is not None}
    types = {name: kind if isinstance(kind, type) else get_args(kind)[0] for name, kind in kinds.items()}
    try:
        if path.name.removesuffix(".staged").endswith(".parquet"):
            table = pd.read_parquet(path, **options)
        else:
            with path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    raise ValueError("it is cut off")
            table = pd.read_csv(path, dtype=types, **options)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, pa.ArrowException) as error:
        raise CorruptArtefactError(f"{path} is not a table ({error}). {_RENEW}") from error
    if absent := sorted(set(columns) - set(table.columns)):
        raise CorruptArtefactError(f"{path} lacks the columns {absent}. {_RENEW}")
    odd = [name for name, kind in kinds.items() if not _holds(table[name], kind)]
    if odd or table.empty or not isinstance(table.index, pd.RangeIndex):
        raise CorruptArtefactError(f"{path} has no rows, or cells that cannot be, in {odd or 'some columns'}. {_RENEW}")
    if unique and table.duplicated(list(unique)).any():
        raise CorruptArtefactError(f"{path} has rows twice: the same {', '.join(unique)}. {_RENEW}")
    check_rows(path, len(table))
    return table


def check_rows(path: pathlib.Path, count: int) -> None:
    """Compare the number of rows or lines that a file has with what the manifest beside it says, if it does.

    Raises:
        CorruptArtefactError: there are more or fewer.
    """
    entry = read_manifest(path.parent).get(path.name.removeprefix(".").removesuffix(".staged"), {})
    if entry.get("rows") not in (None, count):
        raise CorruptArtefactError(f"{path} has {count} rows, not {entry['rows']} as {MANIFEST} says. {_RENEW}")


def _holds(column: pd.Series, kind: Kind) -> bool:
    """Return whether every cell of a column is of a kind."""
    if not isinstance(kind, type):  # or empty
        column, kind = column.dropna(), get_args(kind)[0]
    if kind is str:
        return bool(column.map(lambda cell: isinstance(cell, str)).all())
    if column.dtype.kind not in "biuf":
        return False
    numbers = column.astype(float)
    return bool(np.isfinite(numbers).all() and (kind is float or (numbers == numbers.round()).all()))


def to_json(value: object) -> str:
    """Return compact JSON text of numbers, texts, tuples and dictionaries, NumPy scalars included, keys in order."""
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(item: object) -> object:
    return item.item() if isinstance(item, np.generic) else list(item)
