"""Short searches on the published digits study, for tests: few methods, candidates and seeds."""

from __future__ import annotations

import dataclasses
import pathlib

from book.studies import evolution, methods
from book.studies.files import BENCH, LAYERS, MODEL, STATISTICS
from book.studies.study import new_file
from emq_lib.core.files import vouched_path
from emq_lib.core.profiles import EvolutionBudget, Profile, get_profile

KEPT = (methods.EVOLUTION, "three goals", methods.FOR_RHO, methods.WITH_PAIRS)
FEW_METHODS = {name: methods.METHODS[name] for name in KEPT}
DIGITS = dataclasses.replace(
    get_profile("digits-resnet8"), evolution=EvolutionBudget(population=8, iterations=8, seeds=1)
)


def enter_published(profile: Profile, published: pathlib.Path) -> None:
    """Write the published checkpoint, bench and statistics into a study as if they had been made there."""
    for name in (MODEL, LAYERS, BENCH, STATISTICS):
        with new_file(profile, name, seconds=0.0) as path:
            path.write_bytes(vouched_path(published, name).read_bytes())


def search_briefly(profile: Profile = DIGITS, workers: int = 1) -> None:
    """Build the log and the table of searches, of few methods."""
    methods.METHODS = FEW_METHODS
    evolution.build_evolution(profile, workers=workers)
