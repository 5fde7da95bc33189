"""Files of a study under ``data/<profile>/``: their place, the lock, and the manifest that vouches for them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping

import torch
from emq_lib.core.errors import CorruptArtefactError, MissingArtefactError, StudyBusyError
from emq_lib.core.files import atomic_path, device_name, sha256, to_json
from emq_lib.core.profiles import Profile
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file

from book.places import REPOSITORY

_RECORDED_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "safetensors")


def study_folder(profile: Profile) -> pathlib.Path:
    """Return the profile's folder: under ``data/``, or under the folder that ``EMQ_STUDY_ROOT`` names."""
    root = os.environ.get("EMQ_STUDY_ROOT")
    return (pathlib.Path(root) if root else REPOSITORY / "data") / profile.name


@contextlib.contextmanager
def sole_writer(profile: Profile) -> Iterator[None]:
    """Keep every other run from writing the study while the block runs; a killed run does not block later ones.

    Raises:
        StudyBusyError: another run is writing it.
    """
    folder = study_folder(profile)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise StudyBusyError(
            f"Another run is writing the study in {folder}. Wait for it, stop it, or set EMQ_STUDY_ROOT elsewhere."
        ) from error


def read_manifest(profile: Profile) -> dict[str, dict]:
    """Return the study's manifest: file name -> provenance. A study without one gives an empty dictionary.

    Raises:
        CorruptArtefactError: the manifest is not valid JSON.
    """
    path = study_folder(profile) / "manifest.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CorruptArtefactError(f"{path} is not valid JSON ({error}). Restore or rebuild it.") from error


def record(
    profile: Profile, filename: str, *, command: str, seconds: float, rows: int | None = None, note: str = ""
) -> None:
    """Enter a file that was just written into the study's manifest.

    Args:
        profile: the study.
        filename: name inside the study's folder.
        command: what a reader calls to make the file again.
        seconds: wall time it took.
        rows: number of rows, for tables.
        note: anything a reader of the card must know.
    """
    folder = study_folder(profile)
    manifest = read_manifest(profile)
    manifest[filename] = {
        "sha256": sha256(folder / filename),
        "rows": rows,
        "command": command,
        "seed": profile.seed,
        "commit": _commit(),
        "versions": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        "python": platform.python_version(),
        "device": device_name(),
        "seconds": round(seconds, 1),
        "note": note,
    }
    with atomic_path(folder / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def checked_path(profile: Profile, filename: str) -> pathlib.Path:
    """Return the path of a study's file after comparing it with the manifest.

    Raises:
        MissingArtefactError: the file or its manifest entry is absent.
        CorruptArtefactError: the file is not the one that the manifest describes.
    """
    path = study_folder(profile) / filename
    remedy = f"Restore it, or make it again: run the chapters on {profile.name!r} with REBUILD=True."
    if not path.is_file():
        raise MissingArtefactError(f"{path} does not exist. {remedy}")
    entry = read_manifest(profile).get(filename)
    if entry is None:
        raise MissingArtefactError(f"{path} is not listed in manifest.json, so nothing vouches for it. {remedy}")
    if sha256(path) != entry["sha256"]:
        raise CorruptArtefactError(
            f"{path} does not match the SHA-256 in manifest.json: truncated or altered. {remedy}"
        )
    return path


def save_tensors(
    profile: Profile, filename: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, object]
) -> None:
    """Write tensors, and facts about them, as one safetensors file of the study; same content, same bytes.

    The facts are one text, because the format stores several texts in any order.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(study_folder(profile) / filename) as path:
        save_file(contiguous, str(path), metadata={"facts": to_json(facts)})


def read_facts(profile: Profile, filename: str) -> dict:
    """Return the facts that a safetensors file of the study carries.

    Raises:
        MissingArtefactError, CorruptArtefactError: see :func:`checked_path`.
    """
    with safe_open(str(checked_path(profile, filename)), "pt") as file:
        return json.loads(file.metadata()["facts"])


def _commit() -> str:
    """Return the commit of the working tree, with "+changes" if it differs; "unknown" outside a checkout."""
    try:
        run = {"cwd": REPOSITORY, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "emq_lib", "book/studies"], **run
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")
