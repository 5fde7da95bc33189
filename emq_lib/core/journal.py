"""Journals: lines of JSON that a long run appends, so that the next one goes on where it was killed."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.files import named_when_unwritable, to_json


class Journal:
    """A file that only grows, by whole lines; what a crash or a full disk cut off is overwritten by the next line.

    Opening one writes nothing, so that it can be read while a run appends. Lines are not forced onto the disk: a power
    cut costs the last ones, which are computed again.

    Args:
        path: the file, which may exist.
        identity: what the lines depend on; stands in the first line.

    Attributes:
        lines: what was appended, by earlier runs too.

    Raises:
        CorruptArtefactError: the file belongs to something else, or holds a line that no run wrote.
    """

    def __init__(self, path: pathlib.Path, identity: Mapping[str, object]) -> None:
        self.path, self.lines = path, []
        self._head = to_json({"journal": identity})
        with named_when_unwritable(path):
            content = path.read_bytes() if path.exists() else b""
        self._size = content.rfind(b"\n") + 1  # of whole lines
        head, *lines = content[: self._size].split(b"\n")[:-1] or [b""]
        if self._size and head != self._head.encode():
            raise CorruptArtefactError(
                f"{path} is of another run, of other files, or of another version of the code: it begins with "
                f"{head[:200].decode(errors='replace')!r}. Delete it to start afresh."
            )
        for number, line in enumerate(lines, start=2):
            self.lines.append(_parsed(line, path, number))

    def append(self, line: Mapping[str, object]) -> None:
        """Write a line.

        Raises:
            DiskFullError: no room; the file stays as it was.
            UnwritablePathError: it cannot be written.
        """
        with named_when_unwritable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._size = min(self._size, self.path.stat().st_size) if self.path.exists() else 0
            text = f"{to_json(line)}\n" if self._size else f"{self._head}\n{to_json(line)}\n"
            try:
                with self.path.open("ab") as file:
                    file.truncate(self._size)
                    file.write(text.encode())
            except OSError:
                if self.path.is_file():
                    os.truncate(self.path, self._size)
                raise
            self._size += len(text.encode())
        self.lines.append(dict(line))


def _parsed(line: bytes, path: pathlib.Path, number: int) -> dict:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptArtefactError(f"{path}, line {number}, was written by no run. Delete the file to start afresh.")
    return found
