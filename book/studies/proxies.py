"""Statistics, hand-made proxies and the held-out table of a study.

Explained in chapter 02.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from emq_lib.core.datasets import Split
from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.files import atomic_path, sha256, to_json
from emq_lib.core.profiles import Profile
from emq_lib.proxies.handmade import PROXIES, score_table
from emq_lib.proxies.layer_statistics import (
    NUMBERS,
    SAMPLES,
    LayerStatistics,
    _load_folded,
    _quantized_weights,
    _weight,
    measure_statistics,
)
from emq_lib.proxies.released import ReleasedStatistics
from emq_lib.proxies.scores import score
from safetensors.torch import load_file

from book.studies.study import checked_path, read_facts, record, save_tensors, study_folder

STATISTICS = "statistics.safetensors"


def build_statistics(profile: Profile, calibration: Split) -> None:
    """Measure the statistics and write ``statistics.safetensors``."""
    stored = measure_statistics(profile, calibration)
    seconds = stored.pop("seconds")
    facts = {"seconds": seconds, "checkpoint": sha256(study_folder(profile) / "model.safetensors")}
    save_tensors(profile, STATISTICS, stored, facts)
    command = f"book.studies.proxies.build_statistics on {profile.name}"
    record(profile, STATISTICS, command=command, seconds=sum(seconds.values()))


def load_statistics(profile: Profile) -> LayerStatistics:
    """Load a study's statistics; weights and quantization errors come from its checkpoint. Needs no images.

    Raises:
        MissingArtefactError: the statistics were not built.
        CorruptArtefactError: they belong to another checkpoint, or the file is truncated.
    """
    path, checkpoint = (checked_path(profile, STATISTICS), checked_path(profile, "model.safetensors"))
    facts = read_facts(profile, STATISTICS)
    if facts["checkpoint"] != sha256(checkpoint):
        raise CorruptArtefactError(f"{path} was measured on another checkpoint. Build it again with REBUILD=True.")
    stored = load_file(str(path))
    model, layers = _load_folded(profile)
    searchable = layers[layers["searchable"]]
    names = tuple(searchable["name"])
    quantized = _quantized_weights(model, names, profile.choices)
    weights = tuple(_weight(model, name).flatten(1) for name in names)
    return LayerStatistics(
        choices=profile.choices,
        names=names,
        slots=searchable["slot"].to_numpy(),
        parameters=searchable["parameters"].to_numpy(),
        macs=searchable["macs"].to_numpy(),
        weights=weights,
        errors=tuple(
            torch.stack([q.flatten(1) - weight for q in quantized[name]])
            for name, weight in zip(names, weights, strict=True)
        ),
        **{key: tuple(stored[f"{key}/{name}"] for name in names) for key in SAMPLES},
        **{key: stored[key].numpy() for key in NUMBERS},
        saliencies=_with_prefix(stored, "saliency "),
        released=ReleasedStatistics(**_with_prefix(stored, "released ")),
        seconds=facts["seconds"],
    )


def _with_prefix(stored: Mapping[str, torch.Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): stored[key].numpy() for key in stored if key.startswith(prefix)}


def build_proxies(profile: Profile) -> None:
    """Score every configuration of the bench with every proxy; write ``proxies.parquet`` and ``proxies.json``.

    The JSON file gives, per proxy: variant, seconds (its statistics and its table) and the score table or matrix.
    Configurations with widths that the profile does not offer (the sample "one-bit") have no scores.
    """
    started = time.perf_counter()
    statistics, folder = load_statistics(profile), study_folder(profile)
    configs = scored_configs(profile)
    columns, facts = {}, {}
    for name, entry in PROXIES.items():
        before = time.perf_counter()
        found = score_table(name, statistics)
        own = time.perf_counter() - before
        columns[name] = score(found, np.stack(configs["bits"]), profile.choices)
        seconds = sum(statistics.seconds[key] for key in entry.reads) + own
        facts[name] = {"variant": entry.variant, "seconds": seconds, "table": found.tolist()}
    scores = configs[["config_id"]].assign(**columns)
    with atomic_path(folder / "proxies.parquet") as path:
        scores.to_parquet(path, index=False)
    with atomic_path(folder / "proxies.json") as path:
        path.write_text(to_json(facts) + "\n")
    command, seconds = (f"book.studies.proxies.build_proxies on {profile.name}", time.perf_counter() - started)
    record(profile, "proxies.parquet", command=command, seconds=seconds, rows=len(scores))
    record(profile, "proxies.json", command=command, seconds=seconds, rows=len(facts))


def scored_configs(profile: Profile) -> pd.DataFrame:
    """Return config_id and bits of the bench's configurations, of all quantizers, with the widths on offer."""
    table = pd.read_parquet(checked_path(profile, "bench.parquet"), columns=["config_id", "bits"])
    offered = table["bits"].map(lambda bits: set(bits) <= set(profile.choices))
    return table[offered].drop_duplicates("config_id", ignore_index=True)


def load_proxies(profile: Profile) -> tuple[pd.DataFrame, dict[str, dict]]:
    """Return a study's proxy scores, and what they come from.

    Returns:
        scores indexed by config_id, one column per proxy; and, per proxy, variant, seconds and "table", its score
        table (S, B) or matrix of pairs (S B, S B).
    """
    scores = pd.read_parquet(checked_path(profile, "proxies.parquet")).set_index("config_id")
    facts = json.loads(checked_path(profile, "proxies.json").read_text())
    return scores, {name: fact | {"table": np.array(fact["table"])} for name, fact in facts.items()}
