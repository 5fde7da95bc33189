"""What the files of a study were made from, and whether that is still what there is."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib

from book.places import REPOSITORY
from book.studies.files import FILES, NEUTRAL
from emq_lib.core.errors import CorruptArtefactError, MissingArtefactError
from emq_lib.core.files import read_manifest, sha256, vouched_path
from emq_lib.core.profiles import Profile, get_profile, is_published, profile_names
from emq_lib.core.sources import code_hash


def study_folder(profile: Profile) -> pathlib.Path:
    """Return the profile's folder: under ``data/``, or under the folder that ``EMQ_STUDY_ROOT`` names.

    A study of another seed than the published one never stands in ``data/``: it has a folder of its own in ``_build``.
    """
    root = os.environ.get("EMQ_STUDY_ROOT")
    if root:
        return pathlib.Path(root) / profile.name
    if is_published(profile):
        return REPOSITORY / "data" / profile.name
    return REPOSITORY / "_build" / profile.name / f"studies-seed-{profile.seed}" / profile.name


def made_from(profile: Profile, filename: str) -> dict[str, object]:
    """Return what decides whether a file is up to date: inputs, settings and code, hashes of what they are now."""
    names = FILES[filename].inputs if filename in FILES else ()
    return {
        "inputs": {name: _digest(profile, name) for name in names},
        "settings": settings_hash(profile, filename),
        "code": code_version(filename),
    }


def _digest(profile: Profile, filename: str) -> str | None:
    """Return the SHA-256 of a file of a study that its manifest vouches for; None without one, "altered" else."""
    try:
        return sha256(vouched_path(study_folder(profile), filename))
    except MissingArtefactError:
        return None
    except CorruptArtefactError:
        return "altered"


def settings_hash(profile: Profile, filename: str) -> str:
    """Return a hash of the profile's fields that decide a file."""
    fields = FILES[filename].settings if filename in FILES else ()
    facts = repr([(field, getattr(profile, field)) for field in sorted(fields)])
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


@functools.cache
def code_version(filename: str) -> str:
    """Return the hash of the code that decides a file's numbers."""
    return code_hash(*FILES[filename].code, neutral=NEUTRAL) if filename in FILES else ""


def renewal(profile: Profile, filename: str) -> str:
    """Return how to make a file of a study again: a command, or the function to call where none knows the study."""
    if filename not in FILES or profile.name not in profile_names():
        builder = FILES[filename].builder.replace(":", ".") if filename in FILES else "what made it"
        return f"call {builder} again"
    seed = profile.seed - get_profile(profile.name).seed
    return f"python -m book.studies build {profile.name} {filename}" + (f" --seed {seed}" if seed else "")


def stale_because(profile: Profile, filename: str) -> list[str]:
    """Return why a file of a study is out of date, if it is.

    Files that it was made from, settings or code have changed since, or one of those files is itself out of date
    without being published so.
    """
    entry = read_manifest(study_folder(profile)).get(filename, {})
    if not isinstance(entry.get("inputs"), dict):
        return ["the manifest does not say what it was made from"]
    found = [reason for name, digest in entry["inputs"].items() if (reason := what_changed(profile, name, digest))]
    if entry.get("settings") != settings_hash(profile, filename):
        found.append("the profile has changed")
    if entry.get("code") != code_version(filename):
        found.append("the code that makes it has changed")
    return found


def what_changed(profile: Profile, name: str, digest: object) -> str:
    """Return what happened to an input, "file" or "study/file", since it had a hash; empty if nothing did."""
    study, _, filename = name.rpartition("/")
    if study and study not in profile_names():
        return f"{name} is of a study that is not registered here"
    owner = get_profile(study) if study else profile
    now = _digest(owner, filename)
    if now != digest:
        return f"{name} " + ("is gone" if now is None else "is new" if digest is None else "has changed")
    if now and outdated(owner, filename) is None and stale_because(owner, filename):
        return f"{name} is out of date"
    return ""


def outdated(profile: Profile, filename: str) -> str | None:
    """Return why a file is published although it is out of date, as its manifest entry says it; None if it is not."""
    return read_manifest(study_folder(profile)).get(filename, {}).get("outdated")
