"""Statistics, hand-made proxies and the held-out table of a study.

Explained in chapter 02.
"""

from __future__ import annotations

import json
import time

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load

from book.studies.files import BENCH, SCORES, STATISTICS, TABLES
from book.studies.networks import fresh_model, layer_table, load_folded
from book.studies.study import checked_path, load_table, manifest_of, new_file, save_tensors, sole_writer
from emq_lib.bench.table import read_bench
from emq_lib.core.datasets import Split
from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.files import check_rows, to_json
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.profiles import Profile
from emq_lib.proxies.handmade import PROXIES, score_table
from emq_lib.proxies.layer_statistics import LayerStatistics, assemble_statistics
from emq_lib.proxies.measuring import measure_statistics
from emq_lib.proxies.released import ReleasedStatistics, measure_released
from emq_lib.proxies.scores import score


def build_statistics(profile: Profile, calibration: Split) -> None:
    """Measure the statistics on the calibration images and write ``statistics.safetensors``."""
    with sole_writer(profile):
        model = load_folded(profile, calibration.images.device)
        layers = layer_table(model, profile)
        released, streams = released_statistics(profile, calibration), profile.generator
        stored, seconds = measure_statistics(
            model, layers, calibration, choices=profile.choices, released=released, streams=streams
        )
        save_tensors(profile, STATISTICS, stored, {}, seconds=sum(seconds.values()), costs=seconds)


def released_statistics(profile: Profile, calibration: Split) -> ReleasedStatistics:
    """Measure what the released code reads, on a network of random weights that the profile's seed draws."""
    random = fold_batchnorm(fresh_model(profile)).to(calibration.images.device)
    shortcuts = tuple(dict(profile.tied))
    choices, streams = profile.choices, profile.generator
    layers = layer_table(random, profile)
    return measure_released(random, layers, calibration, choices=choices, shortcuts=shortcuts, streams=streams)


def load_statistics(profile: Profile) -> LayerStatistics:
    """Load a study's statistics; weights and quantization errors come from its checkpoint. Needs no images.

    Raises:
        MissingArtefactError: the statistics were not built.
        CorruptArtefactError: the file is truncated, or lacks a statistic.
        StaleArtefactError: they belong to another checkpoint.
    """
    path = checked_path(profile, STATISTICS)
    model = load_folded(profile, "cpu")
    costs = manifest_of(profile)[STATISTICS].get("costs", {})
    try:
        return assemble_statistics(model, layer_table(model, profile), load(path.read_bytes()), profile.choices, costs)
    except (SafetensorError, CorruptArtefactError, OSError) as error:
        raise CorruptArtefactError(f"{path} does not hold the statistics ({error}). Restore or rebuild it.") from error


def build_proxies(profile: Profile) -> None:
    """Score every configuration of the bench with every proxy; write ``proxies.parquet`` and ``proxies.json``.

    The JSON file gives, per proxy: variant, seconds (its statistics and its table) and the score table or matrix.
    Configurations with widths that the profile does not offer (the sample "one-bit") have no scores.
    """
    with sole_writer(profile):
        started = time.perf_counter()
        statistics, configs = load_statistics(profile), scored_configs(profile)
        columns, facts = {}, {}
        for name, entry in PROXIES.items():
            before = time.perf_counter()
            found = score_table(name, statistics)
            own = time.perf_counter() - before
            columns[name] = score(found, np.stack(configs["bits"]), profile.choices)
            seconds = sum(statistics.seconds[key] for key in entry.reads) + own
            facts[name] = {"variant": entry.variant, "seconds": seconds, "table": found.tolist()}
        scores, spent = configs[["config_id"]].assign(**columns), time.perf_counter() - started
        with new_file(profile, SCORES, seconds=spent, rows=len(scores)) as path:
            scores.to_parquet(path, index=False)
        with new_file(profile, TABLES, seconds=spent, rows=len(facts)) as path:
            path.write_text(to_json(facts) + "\n")


def scored_configs(profile: Profile) -> pd.DataFrame:
    """Return config_id and bits of the bench's configurations, of all quantizers, with the widths on offer."""
    table = read_bench(checked_path(profile, BENCH))[["config_id", "bits"]]
    offered = table["bits"].map(lambda bits: set(bits) <= set(profile.choices))
    return table[offered].drop_duplicates("config_id", ignore_index=True)


def load_proxies(profile: Profile) -> tuple[pd.DataFrame, dict[str, dict]]:
    """Return a study's proxy scores, and what they come from.

    Returns:
        scores indexed by config_id, one column per proxy; and, per proxy, variant, seconds and "table", its score
        table (S, B) or matrix of pairs (S B, S B).
    """
    path = checked_path(profile, TABLES)
    try:
        facts = json.loads(path.read_text())
        entries = {
            name: {
                "variant": str(fact["variant"]),
                "seconds": float(_finite(fact["seconds"])),
                "table": _finite(fact["table"]),
            }
            for name, fact in facts.items()
        }
        check_rows(path, len(entries))
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise CorruptArtefactError(f"{path} does not hold the proxies ({error}). Restore or rebuild it.") from error
    cells = {"config_id": str} | dict.fromkeys(entries, float)
    scores = load_table(profile, SCORES, cells, unique=("config_id",)).set_index("config_id")
    slots, choices = len(scores.index[0]), len(profile.choices)
    shapes = ((slots, choices), (slots * choices, slots * choices))
    if odd := [name for name, entry in entries.items() if entry["table"].shape not in shapes]:
        raise CorruptArtefactError(f"{path} has a table of another network for {odd[0]!r}. Restore or rebuild it.")
    return scores, entries


def _finite(stored: object) -> np.ndarray:
    found = np.array(stored, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError("a number is NaN or infinite")
    return found
