"""The start of a chapter, its claims, and the ledger."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown, display
from myst_nb import glue

from book.making.tables import fenced, plain
from book.places import PRINTED, REPOSITORY
from book.studies.study import manifest_of, outdated, study_folder
from emq_lib.core.errors import ClaimError, CorruptArtefactError, InvalidParameterError, UnwritablePathError
from emq_lib.core.files import named_when_unwritable, write_bytes
from emq_lib.core.profiles import Profile, get_profile, is_published

PARAMETERS = ("PROFILE", "REBUILD", "SEED")


@dataclasses.dataclass(frozen=True)
class Chapter:
    """A running chapter: its name, the study it shows, and whether it computes that study afresh."""

    name: str
    profile: Profile
    rebuild: bool

    @property
    def as_printed(self) -> bool:
        """Whether this is the study that the text speaks of: another one, or another seed, may find otherwise."""
        return self.profile == get_profile(PRINTED)

    def study(self, name: str) -> Profile:
        """Return the profile of that name, with the chapter's own seed if it is the chapter's study.

        Raises:
            UnknownProfileError: no such profile.
        """
        return self.profile if name == self.profile.name else get_profile(name)

    @property
    def ledger(self) -> pathlib.Path:
        """File that takes this chapter's claims; those that another seed drew stand apart."""
        drawn = "ledger" if is_published(self.profile) else f"ledger-seed-{self.profile.seed}"
        folder = os.environ.get("EMQ_LEDGER_DIR") or REPOSITORY / "_build" / self.profile.name / drawn
        return pathlib.Path(folder) / f"{self.name}.jsonl"

    def claim(
        self,
        key: str,
        sentence: str,
        value: float,
        *,
        within: tuple[float, float] | Mapping[str, tuple[float, float]],
        interval: tuple[float, float] | None = None,
        n: int | None = None,
        paper: str = "",
        reported: tuple[float, float] | None = None,
    ) -> Markdown:
        """State a number, check it, glue it under its key, and enter it into the ledger.

        Args:
            key: name for glue; its parts (`key_lo`, `key_hi`) are glued too when an interval is given.
            sentence: text with a place ``{}`` (or ``{:.1f}``) for the value.
            value: the number, computed.
            within: (lo, hi) that it must lie in, or such bounds by profile name; another study's number is entered
                without a bound, and so is one that another seed drew.
            interval: 95 % interval, if the number is an estimate.
            n: number of observations behind it.
            paper: what the paper reports, with the source of that knowledge.
            reported: the paper's number as an interval, 95 % where it is an estimate; with equal ends if it is exact.

        Returns:
            the sentence with its value, to be shown as the cell's output.

        Raises:
            ClaimError: the number lies outside its bounds.
            UnwritablePathError, DiskFullError: the ledger cannot be written.
        """
        value = float(value)
        bounds = within
        if isinstance(within, Mapping):
            published = self.profile == get_profile(self.profile.name)
            bounds = within.get(self.profile.name) if published else None
        if not math.isfinite(value) or (bounds and not bounds[0] <= value <= bounds[1]):
            raise ClaimError(
                f"claim {key!r}: {value} is not within {bounds}. The text around it no longer holds; revise both."
            )
        text = sentence.format(value)
        glue(key, value, display=False)
        if interval:
            glue(f"{key}_lo", float(interval[0]), display=False)
            glue(f"{key}_hi", float(interval[1]), display=False)
            low, high = (re.search(r"{.*?}", sentence)[0].format(end) for end in interval)
            words = text.rstrip(".,;")
            text = f"{words} (95 % interval {low} to {high}" + (f", n = {n})" if n else ")") + text[len(words) :]
        row = {
            "key": key,
            "sentence": sentence.format(value),
            "value": value,
            "lo": interval[0] if interval else None,
            "hi": interval[1] if interval else None,
            "n": n,
            "bounds": bounds,
            "paper": paper,
            "agrees": _agreement(interval or (value, value), reported) if reported else "",
        }
        with _ledger_is_writable(self.ledger), named_when_unwritable(self.ledger), self.ledger.open("a") as file:
            file.write(json.dumps(row, default=float) + "\n")
        return Markdown(text)


def _agreement(ours: tuple[float, float], theirs: tuple[float, float]) -> str:
    """Say whether two intervals overlap, and otherwise which one lies higher."""
    if ours[0] > theirs[1]:
        return "no, higher here"
    return "no, lower here" if ours[1] < theirs[0] else "yes"


def start_chapter(name: str, profile: str, rebuild: bool, seed: int = 0) -> Chapter:
    """Check a chapter's parameters, say what made it, set the style of figures, and open a fresh page of the ledger.

    At its top the chapter also says which files of its study are published although they are out of date, and why.

    Raises:
        UnknownProfileError, InvalidParameterError: see :func:`study_of`; or papermill was given a parameter that no
            chapter has.
        UnwritablePathError, DiskFullError: there is no place for the ledger.
    """
    if unknown := sorted(_given_parameters() - set(PARAMETERS)):
        raise InvalidParameterError(f"No parameter {', '.join(unknown)}: chapters have {', '.join(PARAMETERS)}.")
    chapter = Chapter(name, study_of(profile, rebuild, seed), rebuild)
    plt.style.use(REPOSITORY / "book" / "emq.mplstyle")
    with _ledger_is_writable(chapter.ledger):
        write_bytes(chapter.ledger, b"")
    display(Markdown(_made_by(name, dict(zip(PARAMETERS, (profile, rebuild, seed), strict=True)))))
    for sentence in _outdated_files(chapter.profile):
        display(Markdown(sentence))
    return chapter


def study_of(profile: str, rebuild: bool, seed: int) -> Profile:
    """Return the study that a chapter's parameters name. Another seed than the published one is a study of its own.

    Raises:
        UnknownProfileError: no such profile.
        InvalidParameterError: a parameter of the wrong kind; files that were made with another seed; or another seed,
            whose study is neither there nor to be computed.
    """
    if not isinstance(profile, str):
        raise InvalidParameterError(f"PROFILE must be the name of a profile, got {profile!r}.")
    if not isinstance(rebuild, bool):
        raise InvalidParameterError(f"REBUILD must be True or False, got {rebuild!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InvalidParameterError(f"SEED must be a whole number from 0 to {2**32 - 1}, got {seed!r}.")
    published = get_profile(profile)
    study = dataclasses.replace(published, seed=published.seed + seed)
    folder, manifest = study_folder(study), manifest_of(study)
    if any(entry.get("seed", study.seed) != study.seed for entry in manifest.values()):
        raise InvalidParameterError(
            f"The files in {folder} were not made with SEED = {seed}. Ask for the seed that they have, or name another "
            "folder of studies with EMQ_STUDY_ROOT."
        )
    if seed and not rebuild and not manifest:
        raise InvalidParameterError(
            f"There is no study of {profile} with SEED = {seed}. make book PROFILE={profile} SEED={seed} REBUILD=1 "
            f"computes it in {folder}, beside the published one."
        )
    return study


def _given_parameters() -> set[str]:
    """Return the names that papermill's cell of parameters assigns, in the notebook that runs."""
    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell else []
    given = [ast.parse(cell) for cell in cells if cell.startswith("# Parameters\n")]
    return {node.id for tree in given for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)}


@contextlib.contextmanager
def _ledger_is_writable(path: pathlib.Path) -> Iterator[None]:
    """Say what to do where the ledger cannot be written, as in a checkout that is read-only."""
    try:
        yield
    except UnwritablePathError as error:
        raise UnwritablePathError(
            f"The ledger {path} cannot be written. Name another folder for it with EMQ_LEDGER_DIR."
        ) from error


def _made_by(name: str, parameters: Mapping[str, object]) -> str:
    """Return the command that makes a chapter as it is shown, and what it cost when that was last measured."""
    given = " ".join(f"-p {key} {shlex.quote(str(value))}" for key, value in parameters.items())
    line = f"mkdir -p _build && .venv/bin/papermill book/{name}.ipynb _build/{name}.ipynb {given}"
    costs = read_costs().query("chapter == @name and study == @parameters['PROFILE']")
    measured = [f"{row.seconds:.0f} s and {row.memory:.1f} GiB ({plain(row.device)})" for row in costs.itertuples()]
    cost = f"\n\nTime and memory, as last measured: {'; '.join(measured)}." if measured else ""
    return fenced(line, "bash") + cost


def _outdated_files(study: Profile) -> list[str]:
    """Return a sentence for each reason for which files of a study are published although they are out of date."""
    files: dict[str, list[str]] = {}
    for filename in manifest_of(study):
        if reason := outdated(study, filename):
            files.setdefault(reason, []).append(plain(filename))
    return [f"**Shown although out of date: {', '.join(names)}.** {plain(why)}" for why, names in files.items()]


def read_costs() -> pd.DataFrame:
    """Return what chapters took: columns device, study, chapter, seconds, memory and gpu_memory (both in GiB).

    Raises:
        CorruptArtefactError: ``benchmarks/chapters.json`` is cut or altered.
    """
    path = REPOSITORY / "benchmarks" / "chapters.json"
    try:
        rows = [
            (device, study, chapter, cost["seconds"], cost["memory_bytes"] / 2**30, cost["gpu_memory_bytes"] / 2**30)
            for device, studies in (json.loads(path.read_text()) if path.is_file() else {}).items()
            for study, chapters in studies.items()
            for chapter, cost in chapters.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtefactError(
            f"{path} is cut or altered ({error}). Restore it; make notebooks adds to it."
        ) from error
    return pd.DataFrame(rows, columns=["device", "study", "chapter", "seconds", "memory", "gpu_memory"])


def read_rebuild_costs(studies: Sequence[str]) -> pd.DataFrame:
    """Return what computing studies took according to their manifests: columns study, device, files and hours."""
    rows = [
        (study, entry["device"], entry["seconds"] / 3600)
        for study in studies
        for entry in manifest_of(get_profile(study)).values()
    ]
    table = pd.DataFrame(rows, columns=["study", "device", "hours"])
    return table.groupby(["study", "device"], sort=False)["hours"].agg(files="size", hours="sum").reset_index()


def read_ledger(chapter: Chapter) -> pd.DataFrame:
    """Return the claims of all chapters that ran on this study, one row each, with the chapter's name in front.

    Raises:
        CorruptArtefactError: a page of the ledger is cut or altered.
    """
    rows = []
    for path in sorted(chapter.ledger.parent.glob("*.jsonl")):
        try:
            rows += [{"chapter": path.stem} | json.loads(line) for line in path.read_text().splitlines()]
        except (ValueError, TypeError) as error:
            raise CorruptArtefactError(f"{path} is cut or altered ({error}). Execute {path.stem} again.") from error
    return pd.DataFrame(rows)
