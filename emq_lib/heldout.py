"""The held-out table: what every score table is worth on configurations that nobody looked at while choosing it.

Explained in chapters 02 and 03.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pandas as pd

from emq_lib import evolution, ranking
from emq_lib.artefacts import atomic_path, checked_path, record, study_folder
from emq_lib.bench import Bench, has_study
from emq_lib.costs import gather
from emq_lib.layer_statistics import load_statistics
from emq_lib.profiles import Profile
from emq_lib.proxies import load_proxies
from emq_lib.search_space import Evaluator, parse

ORACLE = "additive oracle"


def load_tables(profile: Profile) -> dict[str, dict]:
    """Return every score table of a study: hand-made proxies, the evolved one if there is one, the additive oracle.

    Returns:
        name -> {"table": (S, B), "variant": text, "seconds": cost of its scores}.
    """
    _, tables = load_proxies(profile)
    if has_study(profile, "evolution.jsonl"):
        started = time.perf_counter()
        statistics = load_statistics(profile)
        genotype = parse(evolution.load_winner(profile)["best"])
        table = Evaluator(statistics).table(genotype)
        seconds = sum(statistics.seconds[key] for key in ("errors", "gradients", "activations"))
        tables["evolved"] = {
            "table": table,
            "variant": "evolved",
            "seconds": seconds + time.perf_counter() - started,
        }
    search, heldout = Bench.load(profile).split()
    started = time.perf_counter()
    oracle = ranking.additive_oracle(search.configs, search.half_a, heldout.configs, profile.choices)
    tables[ORACLE] = {"table": oracle.table, "variant": "oracle", "seconds": time.perf_counter() - started}
    return tables


def build_heldout(profile: Profile) -> None:
    """Rank the held-out configurations by every score table of the study and write ``heldout.csv``.

    One row per table, and one for the noise ceiling: how the true accuracies would rank these measurements. rho at 20,
    50 and 100 % with 95 % bootstrap intervals; partial rho given size and BOPs; Kendall's tau; fitness on the search
    half (which chose the evolved proxy); seconds.
    """
    started = time.perf_counter()
    bench = Bench.load(profile)
    search, heldout = bench.split()
    rng = profile.rng("held-out bootstrap")
    covariates = heldout.table[["size_bytes", "bops"]].to_numpy(dtype=np.float64)
    rows = [
        _row(name, entry, search=search, heldout=heldout, covariates=covariates, rng=rng)
        for name, entry in load_tables(profile).items()
    ]
    ceiling = ranking.noise_ceiling(heldout.half_a, heldout.half_b, rng=rng).perfect
    facts = {"rho100": ceiling.value, "lo": ceiling.lo, "hi": ceiling.hi}
    rows.append({"proxy": "noise ceiling", "variant": "ceiling", "n": len(heldout)} | facts)
    table = pd.DataFrame(rows).assign(quantizer=profile.quantizer)
    with atomic_path(study_folder(profile) / "heldout.csv") as path:
        table.to_csv(path, index=False)
    command = f"emq_lib.heldout.build_heldout on {profile.name}"
    record(profile, "heldout.csv", command=command, seconds=time.perf_counter() - started, rows=len(table))


def _row(
    name: str, entry: Mapping, *, search: Bench, heldout: Bench, covariates: np.ndarray, rng: np.random.Generator
) -> dict[str, object]:
    """Describe one score table by its ranks of the held-out configurations."""
    choices = heldout.profile.choices
    scores = gather(entry["table"], heldout.configs, choices)
    estimates = {k: ranking.bootstrap_rho(scores, heldout.top1, percent=k, rng=rng) for k in (20, 50, 100)}
    return {
        "proxy": name,
        "variant": entry["variant"],
        "n": len(heldout),
        "rho20": estimates[20].value,
        "rho50": estimates[50].value,
        "rho100": estimates[100].value,
        "lo": estimates[100].lo,
        "hi": estimates[100].hi,
        "lo20": estimates[20].lo,
        "hi20": estimates[20].hi,
        "lo50": estimates[50].lo,
        "hi50": estimates[50].hi,
        "partial_rho": ranking.partial_rho(scores, heldout.top1, covariates),
        "kendall": ranking.kendall(scores, heldout.top1),
        "search_fitness": ranking.fitness(gather(entry["table"], search.configs, choices), search.half_a),
        "heldout_fitness": np.mean([estimates[k].value for k in (20, 50, 100)]),
        "seconds": entry["seconds"],
    }


def load_heldout(profile: Profile) -> pd.DataFrame:
    """Return a study's held-out table."""
    return pd.read_csv(checked_path(profile, "heldout.csv"))
