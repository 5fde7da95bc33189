"""What each method chooses at each budget, and what it buys.

Explained in chapter 04.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pandas as pd

from book.studies.bench import load_bench
from book.studies.files import CHOICES
from book.studies.methods import SEARCHED
from book.studies.networks import build_network
from book.studies.roundings import remove_roundings
from book.studies.rows import PARTIAL, check_measured, measure_resumably
from book.studies.study import load_table, new_file, sole_writer
from emq_lib.allocation.approximate import allocate_locally, random_within
from emq_lib.allocation.exact import Allocation, allocate, budget_for_average_bits
from emq_lib.core.configs import bits_text
from emq_lib.core.costs import CostTable, bops_cost, size_cost
from emq_lib.core.datasets import ImageData
from emq_lib.core.profiles import Profile
from emq_lib.proxies.scores import score
from emq_lib.quantization.choose import PATIENCE, TOLERANCE

FRONT = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75)
FRONT_METHODS = ("bit sum", "HAWQ-V2", "sqrt one-layer KL", "evolved", "evolved for rho", "evolved for allocation")
RANDOM_DRAWS = 5


def choose_configurations(profile: Profile, tables: Mapping[str, Mapping], size: CostTable) -> pd.DataFrame:
    """Allocate bits at every budget by every method's scores, and draw random configurations of the same sizes.

    Sums over slots are allocated exactly, other scores by local search.

    Args:
        profile: gives the budgets (average bits) and the choices.
        tables: method -> entry as of :func:`book.studies.heldout.load_tables`.
        size: packed size of a configuration.

    Returns:
        columns proxy, variant, average_bits, budget_bytes, seed, bits (text), seconds; one row per choice.
    """
    rows = []
    for average in sorted({*profile.budgets, *FRONT}):
        budget = budget_for_average_bits(average, size, profile.choices)
        shared = {"average_bits": average, "budget_bytes": int(budget)}
        for name, entry in tables.items():
            if average not in profile.budgets and name not in FRONT_METHODS:
                continue
            started = time.perf_counter()
            best = _allocate(entry, size, budget, profile, rng=profile.rng(f"{name} at {average}"))
            seconds = entry["seconds"] + time.perf_counter() - started
            row = {
                "proxy": name,
                "variant": entry["variant"],
                "seed": 0,
                "bits": bits_text(best.bits),
                "seconds": seconds,
            }
            rows.append(shared | row)
        rng = profile.rng(f"random at {average}")
        for seed in range(RANDOM_DRAWS):
            drawn = bits_text(random_within(size, budget, profile.choices, rng=rng))
            rows.append(shared | {"proxy": "random", "variant": "trivial", "seed": seed, "bits": drawn, "seconds": 0.0})
    return pd.DataFrame(rows)


def _allocate(
    entry: Mapping, size: CostTable, budget: float, profile: Profile, *, rng: np.random.Generator
) -> Allocation:
    """Allocate by one method's scores within a size."""
    costs, budgets, choices = {"size": size}, {"size": budget}, profile.choices
    if entry["separable"]:
        found = allocate(entry["table"], costs, budgets, choices, time_limit=PATIENCE)
        return found if found.optimal else allocate(entry["table"], costs, budgets, choices, tolerance=TOLERANCE)

    def scored(configs: np.ndarray) -> np.ndarray:
        return score(entry["table"], configs, choices, aggregation=entry["aggregation"])

    return allocate_locally(scored, costs, budgets, choices, rng=rng)


def build_quantization(profile: Profile, data: ImageData, tables: Mapping[str, Mapping]) -> None:
    """Choose configurations, measure each on the test images of the bench, and write ``quantization.csv``.

    Can be interrupted and called again: see :func:`book.studies.rows.measure_resumably`.

    Args:
        profile: the study; checkpoint and bench must exist.
        data: its images.
        tables: as for :func:`choose_configurations`.
    """
    with sole_writer(profile) as folder:
        network, layers = build_network(profile, data, folder=folder)
        size = size_cost(layers, profile.choices)
        bit_operations = bops_cost(layers, profile.choices, activation_bits=profile.activation_bits)
        uniform = load_bench(profile).select("uniform").table
        chosen = choose_configurations(profile, tables, size)
        flat = [
            {
                "proxy": "uniform",
                "variant": "trivial",
                "average_bits": float(row.bits[0]),
                "budget_bytes": row.size_bytes,
                "seed": 0,
                "bits": bits_text(row.bits),
                "seconds": 0.0,
            }
            for row in uniform.itertuples()
        ]
        chosen = pd.concat([pd.DataFrame(flat), chosen], ignore_index=True)
        distinct = chosen["bits"].drop_duplicates()
        configs = np.array([[int(bits) for bits in text] for text in distinct], dtype=np.int8)
        measured, seconds = measure_resumably(profile, network, data, configs, images=profile.bench_images)
        measured = measured.drop(columns="key").assign(
            bits=distinct.to_numpy(),
            size_bytes=size.total(configs, profile.choices).astype(np.int64),
            bops=bit_operations.total(configs, profile.choices).astype(np.int64),
            activation_bits=profile.activation_bits,
            quantizer=profile.quantizer,
        )
        table = chosen.merge(measured, on="bits", how="left", validate="many_to_one")
        with new_file(profile, CHOICES, seconds=seconds, rows=len(table)) as path:
            table.to_csv(path, index=False)
        (folder / PARTIAL).unlink(missing_ok=True)
        remove_roundings(folder)


def load_quantization(profile: Profile) -> pd.DataFrame:
    """Return what each method chose at each budget, with its measured accuracy; `bits` is text."""
    table = _load(profile)
    return table[table["variant"] != SEARCHED].reset_index(drop=True)


def load_search_choices(profile: Profile) -> pd.DataFrame:
    """Return what the formula of each search chose, as :func:`load_quantization`, with the search's method and seed."""
    table = _load(profile)
    table = table[table["variant"] == SEARCHED].reset_index(drop=True)
    table[["method", "seed"]] = table["proxy"].str.rsplit(", ", n=1).to_list()
    return table.astype({"seed": int})


_CELLS = {
    **dict.fromkeys(("proxy", "variant", "bits"), str),
    **dict.fromkeys(("average_bits", "seconds", "top1"), float),
    **dict.fromkeys(("seed", "size_bytes", "bops", "correct_a", "correct_b", "n_a", "n_b"), int),
}


def _load(profile: Profile) -> pd.DataFrame:
    table = load_table(profile, CHOICES, _CELLS, unique=("proxy", "variant", "average_bits", "seed"))
    check_measured(table, CHOICES)
    return table.assign(half_b=100 * table["correct_b"] / table["n_b"])
