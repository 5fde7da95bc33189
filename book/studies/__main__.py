"""Files of studies from the command line: what is out of date, making it again, letting it stand.

python -m book.studies status [STUDY ...]
python -m book.studies build STUDY [FILE ...]
python -m book.studies keep STUDY FILE ... --why TEXT [--outdated]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from book.studies import files
from book.studies.files import BENCH, FILES, MODEL, STATISTICS, TRANSFER
from book.studies.origins import outdated, stale_because, study_folder
from book.studies.study import checked_path, has_study, keep, manifest_of
from emq_lib.core.errors import CorruptArtefactError, EMQError, InvalidParameterError, MissingArtefactError
from emq_lib.core.files import read_table, sha256, vouched_path
from emq_lib.core.profiles import QUANTIZERS, Profile, get_profile, profile_names

if TYPE_CHECKING:
    from emq_lib.core.datasets import ImageData

MISSING, UP_TO_DATE, PUBLISHED = "missing", "up to date", "published although out of date"


def state(profile: Profile, filename: str) -> str:
    """Return what is to be said of a file of a study: "up to date", or why it is not."""
    try:
        vouched_path(study_folder(profile), filename)
    except MissingArtefactError:
        return MISSING
    except CorruptArtefactError:
        return "altered"
    if why := outdated(profile, filename):
        return f"{PUBLISHED}: {' '.join(why.split())}"
    reasons = stale_because(profile, filename)
    return f"out of date because {'; '.join(reasons)}" if reasons else UP_TO_DATE


def status(studies: Sequence[str]) -> None:
    """Print the files of studies, of all that have some by default: name, rows and state."""
    for name in studies or [name for name in profile_names() if manifest_of(get_profile(name))]:
        profile = get_profile(name)
        entries = manifest_of(profile)
        print(f"{name} ({study_folder(profile)})")
        for filename in [*FILES, *(other for other in entries if other not in FILES)]:
            rows = entries.get(filename, {}).get("rows")
            print(f"  {filename:24}{'' if rows is None else rows:>8}  {state(profile, filename)}")


def build(profile: Profile, filenames: Sequence[str] = ()) -> None:
    """Make what is missing or out of date among files of a study, all by default, and before it what it is made from.

    Files that are published although they are out of date are made again if they are meant themselves, and serve as
    they are if others are made from them. Interrupted at any moment, the same call goes on.

    Raises:
        InvalidParameterError: a study has no such file.
    """
    if unknown := sorted(set(filenames) - set(FILES)):
        raise InvalidParameterError(f"no study has a file {unknown[0]!r}; there are {', '.join(FILES)}.")
    meant = set(filenames or FILES)
    images = functools.cache(lambda: _load(profile))
    for filename in FILES:
        if filename not in meant | _inputs(meant):
            continue
        found = state(profile, filename)
        if found == UP_TO_DATE or (found.startswith(PUBLISHED) and filename not in meant):
            continue
        if filename == TRANSFER and not other_studies(profile):
            print(f"{filename}: no other study has a bench and statistics, so nothing is transferred")
            continue
        print(f"{filename}: {found}", flush=True)
        _make(profile, filename, images)


def _inputs(filenames: set[str]) -> set[str]:
    """Return what files are made from, and what that is made from."""
    direct = {name for filename in filenames for name in FILES[filename].inputs}
    return direct | _inputs(direct) if direct else direct


def _load(profile: Profile) -> ImageData:
    from book.studies.images import load_dataset

    return load_dataset(profile)


def _make(profile: Profile, filename: str, images: Callable[[], ImageData]) -> None:
    """Make a file of a study as its chapter does."""
    from book.studies import allocation, bench, checkpoints, checks, evolution, heldout, proxies, quantization, runtimes

    match filename:
        case files.MODEL:
            checkpoints.build_checkpoint(profile, images())
        case files.LAYERS | files.BENCH:
            for quantizer in _quantizers(profile):
                bench.build_bench(profile, images(), quantizer=quantizer)
        case files.CHECKS:
            checks.build_checks(profile, images())
        case files.STATISTICS:
            proxies.build_statistics(profile, images().calibration)
        case files.SCORES | files.TABLES:
            proxies.build_proxies(profile)
        case files.EVOLUTION_LOG:
            evolution.build_evolution(profile)
        case files.SEARCHES:
            evolution.build_searches(profile)
        case files.ENUMERATION:
            evolution.build_enumeration(profile)
        case files.TRANSFER:
            evolution.build_transfer(profile, other_studies(profile))
        case files.HELDOUT:
            heldout.build_heldout(profile)
        case files.CHOICES:
            tables = heldout.load_tables(profile) | heldout.load_searched(profile)
            allocation.build_quantization(profile, images(), tables)
        case files.COMPARISON:
            quantization.build_comparison(profile, images(), **quantization.IN_FULL)
        case files.RUNTIMES:
            runtimes.build_runtimes(profile, images())


def _quantizers(profile: Profile) -> Sequence[str]:
    """Return the quantizers that a study's bench holds, both if there is none."""
    try:
        return list(read_table(vouched_path(study_folder(profile), BENCH), {"quantizer": str})["quantizer"].unique())
    except (MissingArtefactError, CorruptArtefactError):
        return QUANTIZERS


def other_studies(profile: Profile) -> list[Profile]:
    """Return the studies that proxies may be transferred from to this one: those that have a bench and statistics."""
    others = [get_profile(name) for name in profile_names() if name != profile.name]
    return [other for other in others if has_study(other, MODEL, BENCH, STATISTICS)]


def _keep(profile: Profile, filename: str, why: str, *, although_outdated: bool) -> None:
    """Let a file stand: see :func:`book.studies.study.keep`."""
    others = {}
    if filename == TRANSFER:
        read = [(other, name) for other in other_studies(profile) for name in (MODEL, BENCH, STATISTICS)]
        others = {f"{other.name}/{name}": sha256(checked_path(other, name)) for other, name in read}
    keep(profile, filename, why, others=others, although_outdated=although_outdated)
    print(f"{filename}: {state(profile, filename)}")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are named like all others here."""

    def error(self, message: str) -> NoReturn:
        """Raise InvalidParameterError."""
        raise InvalidParameterError(f"{message}. See {self.prog} --help.")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m book.studies", description="Files of studies: state, making, letting stand.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="status | build | keep")
    one = actions.add_parser("status", help="what is up to date, out of date or missing")
    one.add_argument("studies", nargs="*", metavar="STUDY", help="all that have files by default")
    one = actions.add_parser("build", help="make what is missing or out of date, and what it is made from")
    one.add_argument("study", metavar="STUDY")
    one.add_argument("files", nargs="*", metavar="FILE", help="all by default")
    one.add_argument("--seed", type=int, default=0, help="SEED of the chapters: a study beside the published one")
    one = actions.add_parser("keep", help="let a file stand after a change of code that changes no number")
    one.add_argument("study", metavar="STUDY")
    one.add_argument("files", nargs="+", metavar="FILE")
    one.add_argument("--why", required=True, metavar="TEXT", help="how that is known, or what is wrong with the file")
    one.add_argument("--outdated", action="store_true", help="publish the file although it is out of date")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 after an error, which takes one line."""
    try:
        given = _parsed(arguments)
        if given.action == "status":
            status(given.studies)
        elif given.action == "build":
            published = get_profile(given.study)
            build(dataclasses.replace(published, seed=published.seed + given.seed), given.files)
        else:
            profile = get_profile(given.study)
            for filename in sorted(given.files, key=[*FILES, *given.files].index):  # what others are made from first
                _keep(profile, filename, given.why, although_outdated=given.outdated)
    except EMQError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
