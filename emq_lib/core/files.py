"""Files that are written whole or not at all, their hashes, and plain JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import torch

from emq_lib.core.errors import DiskFullError


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside `path` that replaces it on success; on an error `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_when_full(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named_when_full(path: pathlib.Path) -> Iterator[None]:
    """Name the error of a disk (or a quota) without room for what is written to `path` inside the block.

    Raises:
        DiskFullError: there is no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            f"No room to write {path} ({error.strerror}). What was finished is kept: free some and call again."
        ) from error


def sha256(path: pathlib.Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: object) -> str:
    """Return compact JSON text of numbers, texts, tuples and dictionaries, NumPy scalars included, keys in order."""
    return json.dumps(
        value, sort_keys=True, default=lambda item: item.item() if isinstance(item, np.generic) else list(item)
    )


def device_name() -> str:
    """Describe the processor or the accelerator in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
