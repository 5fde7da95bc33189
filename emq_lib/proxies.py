"""Hand-designed proxies as score tables: one decorated function each, higher is better.

A separable proxy is a table T of shape (S, B); the score of a configuration is the sum of the entries that it selects.
Every function here turns :class:`~emq_lib.layer_statistics.LayerStatistics` into such a table. Explained in chapter 02.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from emq_lib.artefacts import atomic_path, checked_path, record, study_folder, to_json
from emq_lib.bench import Bench
from emq_lib.costs import gather
from emq_lib.errors import InvalidScoreError
from emq_lib.layer_statistics import LayerStatistics, load_statistics
from emq_lib.profiles import Profile


@dataclass(frozen=True)
class Proxy:
    """A hand-designed proxy.

    Attributes:
        name: how tables and figures call it.
        variant: "trivial" (counts bits) or "corrected" (the published method, layers aligned with their bits).
        reads: the statistics whose cost it bears.
        table: statistics -> score table of shape (S, B).
    """

    name: str
    variant: str
    reads: tuple[str, ...]
    table: Callable[[LayerStatistics], np.ndarray]


PROXIES: dict[str, Proxy] = {}


def proxy(name: str, *, reads: tuple[str, ...] = (), variant: str = "corrected") -> Callable:
    """Register the decorated function as a proxy of that name."""

    def decorate(table: Callable[[LayerStatistics], np.ndarray]) -> Callable[[LayerStatistics], np.ndarray]:
        PROXIES[name] = Proxy(name, variant, reads, table)
        return table

    return decorate


def score_table(name: str, statistics: LayerStatistics) -> np.ndarray:
    """Return a proxy's score table after checking it.

    Args:
        name: a key of :data:`PROXIES`.
        statistics: of the S searchable layers at the B choices.

    Returns:
        float64 array of shape (S, B).

    Raises:
        InvalidScoreError: unknown proxy, wrong shape, a NaN or an infinity, or the same entry everywhere.
    """
    if name not in PROXIES:
        raise InvalidScoreError(f"Unknown proxy {name!r}; registered proxies: {', '.join(PROXIES)}.")
    table = np.asarray(PROXIES[name].table(statistics), dtype=np.float64)
    expected = (len(statistics.names), len(statistics.choices))
    if table.shape != expected:
        raise InvalidScoreError(
            f"proxy {name!r} returned shape {table.shape}; one row per layer and column per bit is {expected}."
        )
    if not np.isfinite(table).all():
        layer = statistics.names[np.argwhere(~np.isfinite(table))[0][0]]
        raise InvalidScoreError(f"proxy {name!r} is not finite at layer {layer!r}; look at that layer's statistics.")
    if (table == table[:, :1]).all():
        raise InvalidScoreError(
            f"proxy {name!r} gives every bit width the same score, so it cannot rank configurations."
        )
    return table


@proxy("bit sum", variant="trivial")
def bit_sum(statistics: LayerStatistics) -> np.ndarray:
    """Sum of the bits: T[l, b] = b."""
    return np.tile(np.array(statistics.choices, dtype=np.float64), (len(statistics.names), 1))


@proxy("parameter bits", variant="trivial")
def parameter_bits(statistics: LayerStatistics) -> np.ndarray:
    """Bits of all weights: T[l, b] = b P_l, with P_l the number of weights."""
    return statistics.parameters[:, None] * bit_sum(statistics)


@proxy("BOPs", variant="trivial")
def bops(statistics: LayerStatistics) -> np.ndarray:
    """Bit operations at a fixed activation width: T[l, b] = b MAC_l."""
    return statistics.macs[:, None] * bit_sum(statistics)


@proxy("bit-SNIP", reads=("gradients",))
def bit_snip(statistics: LayerStatistics) -> np.ndarray:
    """Bit-weighted SNIP: T[l, b] = b sum |W * G| (Lee et al. 2019; weighted by bits as in Dong et al. 2023)."""
    pairs = zip(statistics.weights, statistics.gradients, strict=True)
    return _per_layer([(w * g).abs().sum() for w, g in pairs]) * bit_sum(statistics)


@proxy("bit-Synflow", reads=("synflow",))
def bit_synflow(statistics: LayerStatistics) -> np.ndarray:
    """Bit-weighted Synflow: T[l, b] = b sum |W * dR/dW| (Tanaka et al. 2020, weighted by bits)."""
    return statistics.synflow[:, None] * bit_sum(statistics)


@proxy("HAWQ-V2", reads=("trace", "errors"))
def hawq_v2(statistics: LayerStatistics) -> np.ndarray:
    """Mean Hessian trace times squared error: T[l, b] = -(tr H_l / P_l) ||E_lb||^2 (Dong et al. 2020)."""
    return -(statistics.trace / statistics.parameters)[:, None] * _squared_error(statistics)


@proxy("Fisher error", reads=("gradients", "errors"))
def fisher_error(statistics: LayerStatistics) -> np.ndarray:
    """Squared error weighted by the empirical Fisher diagonal: T[l, b] = -sum F_l * E_lb^2 (as in FIT, 2022)."""
    pairs = zip(statistics.curvature, statistics.errors, strict=True)
    return -np.stack([(h * e.square()).sum(dim=(1, 2)).double().numpy() for h, e in pairs])


@proxy("relative weight error", reads=("errors",))
def relative_weight_error(statistics: LayerStatistics) -> np.ndarray:
    """Squared error over squared norm: T[l, b] = -||E_lb||^2 / ||W_l||^2, the inverse of the weights' SQNR."""
    return -_squared_error(statistics) / _per_layer([w.square().sum() for w in statistics.weights])


@proxy("relative output error", reads=("output_error", "errors"))
def relative_output_error(statistics: LayerStatistics) -> np.ndarray:
    """Error of the layer's output over the output: T[l, b] = -||E_lb x||^2 / ||W_l x||^2 on calibration images."""
    return -statistics.output_error


@proxy("one-layer KL", reads=("kl", "errors"))
def kl_divergence(statistics: LayerStatistics) -> np.ndarray:
    """Divergence of the predictions when one layer alone is quantized: T[l, b] = -KL(float || layer l at b bits)."""
    return -statistics.kl


@proxy("sqrt one-layer KL", reads=("kl", "errors"))
def sqrt_kl_divergence(statistics: LayerStatistics) -> np.ndarray:
    """Square root of the one-layer divergence, which grows like the size of a perturbation and not like its square."""
    return -np.sqrt(statistics.kl.clip(min=0))


def _per_layer(values: list) -> np.ndarray:
    """Return one number per layer as a column, shape (S, 1)."""
    return np.array([float(value.double()) for value in values])[:, None]


def _squared_error(statistics: LayerStatistics) -> np.ndarray:
    """Return ||E_lb||^2, shape (S, B)."""
    return np.stack([e.double().square().sum(dim=(1, 2)).numpy() for e in statistics.errors])


def build_proxies(profile: Profile) -> None:
    """Score every configuration of the bench with every proxy; write ``proxies.parquet`` and ``proxies.json``.

    The JSON file gives, per proxy: variant, seconds (its statistics and its table) and the score table.
    """
    started = time.perf_counter()
    bench, statistics, folder = Bench.load(profile), load_statistics(profile), study_folder(profile)
    scores, facts = {"config_id": bench.table["config_id"]}, {}
    for name, entry in PROXIES.items():
        before = time.perf_counter()
        table = score_table(name, statistics)
        own = time.perf_counter() - before
        scores[name] = gather(table, bench.configs, profile.choices)
        seconds = sum(statistics.seconds[key] for key in entry.reads) + own
        facts[name] = {"variant": entry.variant, "seconds": seconds, "table": table.tolist()}
    with atomic_path(folder / "proxies.parquet") as path:
        pd.DataFrame(scores).to_parquet(path, index=False)
    with atomic_path(folder / "proxies.json") as path:
        path.write_text(to_json(facts) + "\n")
    command, seconds = f"emq_lib.proxies.build_proxies on {profile.name}", time.perf_counter() - started
    record(profile, "proxies.parquet", command=command, seconds=seconds, rows=len(bench))
    record(profile, "proxies.json", command=command, seconds=seconds, rows=len(facts))


def load_proxies(profile: Profile) -> tuple[pd.DataFrame, dict[str, dict]]:
    """Return a study's proxy scores (config_id and one column per proxy) and, per proxy, variant, seconds and table."""
    scores = pd.read_parquet(checked_path(profile, "proxies.parquet"))
    facts = json.loads(checked_path(profile, "proxies.json").read_text())
    return scores, {name: fact | {"table": np.array(fact["table"])} for name, fact in facts.items()}
