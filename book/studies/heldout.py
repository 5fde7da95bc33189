"""The held-out table: what every proxy is worth on configurations that nobody looked at while choosing it.

Explained in chapters 02 and 03.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from book.studies.bench import load_bench
from book.studies.evolution import load_searches, load_winner
from book.studies.files import HELDOUT
from book.studies.methods import ALLOCATED, EVOLVED, SEARCHED, TRANSFERRED
from book.studies.proxies import load_proxies, load_statistics
from book.studies.study import has_study, load_table, new_file, sole_writer
from emq_lib.bench.table import Bench
from emq_lib.core.errors import MissingArtefactError
from emq_lib.core.profiles import QUANTIZERS, Profile
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.genotypes import parse
from emq_lib.proxies import intervals, oracles, ranking
from emq_lib.proxies.scores import is_table, score

ORACLE, PAIRWISE = "additive oracle", "pairwise oracle"
BINS = 5  # of the stratified sample's held-out half, by size


def load_tables(profile: Profile) -> dict[str, dict]:
    """Return what every method of a study scores by: hand-made proxies, the additive oracle, and, if any, evolved ones.

    These evolved on the study, or were transferred: evolved on other studies without a look at this one.

    Returns:
        name -> {"table": score table (S, B) or matrix of pairs (S B, S B), "aggregation": how slots are combined,
        "separable": whether scores are sums over slots, "variant": text, "seconds": cost}.
    """
    tables = {
        name: entry | {"aggregation": "sum", "separable": is_table(entry["table"], profile.choices)}
        for name, entry in load_proxies(profile)[1].items()
    }
    own, others = EVOLVED, {name: name for name in TRANSFERRED}
    for variant, methods, filename in (("evolved", own, "evolution.jsonl"), ("transferred", others, "transfer.jsonl")):
        if has_study(profile, filename):
            winners = {name: load_winner(profile, method, filename)["best"] for name, method in methods.items()}
            tables |= _evaluated(profile, winners, variant)
    search, _ = load_bench(profile).split()
    started = time.perf_counter()
    oracle = oracles.additive_oracle(search.configs, search.half_a, search.configs, profile.choices)
    seconds = time.perf_counter() - started
    facts = {"aggregation": "sum", "separable": True, "variant": "oracle", "seconds": seconds}
    tables[ORACLE] = {"table": oracle.table} | facts
    return tables


def load_searched(profile: Profile) -> dict[str, dict]:
    """Return what the best formula of every search scores by, of methods that look for sums over layers to allocate by.

    Returns:
        "method, seed" -> entry as in :func:`load_tables`.
    """
    searches = load_searches(profile)
    kept = searches[searches["method"].isin(ALLOCATED) & (searches["structure"] == "branched")]
    formulas = {f"{row.method}, {row.seed}": row.best for row in kept.itertuples()}
    return _evaluated(profile, formulas, SEARCHED)


def _evaluated(profile: Profile, formulas: Mapping[str, str], variant: str) -> dict[str, dict]:
    """Return the entries of formulas in their text form."""
    statistics, entries = load_statistics(profile), {}
    evaluator = Evaluator(statistics)
    for name, text in formulas.items():
        started = time.perf_counter()
        genotype = parse(text)
        table = evaluator.scores(genotype)
        seconds = sum(statistics.seconds[key] for key in genotype.reads) + time.perf_counter() - started
        entries[name] = {
            "table": table,
            "aggregation": genotype.aggregation,
            "separable": is_table(table, profile.choices) and genotype.aggregation == "sum",
            "variant": variant,
            "seconds": seconds,
        }
    return entries


def build_heldout(profile: Profile) -> None:
    """Rank the held-out configurations by every method of the study, for each quantizer, and write ``heldout.csv``.

    One row per method and quantizer, and one for the noise ceiling: how the true accuracies would rank these
    measurements. rho at 20, 50 and 100 %; partial rho given size and BOPs; rho inside five bins of similar size, on the
    held-out half of the stratified sample; Kendall's tau, weighted tau, Pearson on logit accuracy; each with a 95 %
    bootstrap interval. Fitness on the search half (which chose the evolved proxy) and on the held-out half; seconds.
    """
    with sole_writer(profile):
        started = time.perf_counter()
        table = pd.DataFrame([row for quantizer in QUANTIZERS for row in _rows(profile, quantizer)])
        with new_file(profile, HELDOUT, seconds=time.perf_counter() - started, rows=len(table)) as path:
            table.to_csv(path, index=False)


def _rows(profile: Profile, quantizer: str) -> list[dict[str, object]]:
    """Describe every method by its ranks of the configurations measured with one quantizer; none if none were."""
    try:
        bench = load_bench(profile, quantizer)
    except MissingArtefactError:
        return []
    (search, heldout), (_, spread) = bench.split(), bench.split("stratified")
    parts, rng = (search, heldout, spread), profile.rng("held-out bootstrap")
    rows = []
    for name, entry in load_tables(profile).items():
        if name != ORACLE:
            table, how = entry["table"], entry["aggregation"]
            scores = [score(table, part.configs, profile.choices, aggregation=how) for part in parts]
            facts = {"variant": entry["variant"], "separable": entry["separable"]}
            rows.append({"proxy": name} | facts | _ranks(parts, scores, rng=rng) | {"seconds": entry["seconds"]})
    for name, fit in ((ORACLE, oracles.additive_oracle), (PAIRWISE, oracles.pairwise_oracle)):
        before = time.perf_counter()
        scores = [fit(search.configs, search.half_a, part.configs, profile.choices).predictions for part in parts]
        seconds = time.perf_counter() - before
        facts = {"variant": "oracle", "separable": name == ORACLE}
        rows.append({"proxy": name} | facts | _ranks(parts, scores, rng=rng) | {"seconds": seconds})
    ceiling = intervals.noise_ceiling(heldout.half_a, heldout.half_b, rng=rng).perfect
    facts = {"n": len(heldout), "rho100": ceiling.value, "lo": ceiling.lo, "hi": ceiling.hi}
    return [*rows, {"proxy": "noise ceiling", "variant": "ceiling", "quantizer": quantizer} | facts]


def _ranks(
    parts: tuple[Bench, Bench, Bench], scores: Sequence[np.ndarray], *, rng: np.random.Generator
) -> dict[str, object]:
    """Describe one method by its scores of the search half, the held-out half, and the held-out stratified ones."""
    (search, heldout, spread), (searched, found, spread_scores) = parts, scores
    top1 = heldout.top1
    rho = {k: intervals.bootstrap_rho(found, top1, percent=k, rng=rng) for k in ranking.PERCENTS}
    covariates = heldout.table[["size_bytes", "bops"]].to_numpy(dtype=np.float64)
    partial = intervals.bootstrap_partial_rho(found, top1, covariates, rng=rng)
    sizes = spread.table["size_bytes"].to_numpy()
    binned = intervals.bootstrap_binned_rho(spread_scores, spread.top1, sizes, bins=BINS, rng=rng)
    images = int(heldout.table[["n_a", "n_b"]].iloc[0].sum())
    statistics: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "kendall": ranking.kendall,
        "weighted_tau": ranking.weighted_tau,
        "logit_pearson": functools.partial(ranking.logit_pearson, images=images),
    }
    others = {name: intervals.bootstrap(statistic, found, top1, rng=rng) for name, statistic in statistics.items()}
    return {
        "quantizer": heldout.quantizer,
        "n": len(heldout),
        "rho20": rho[20].value,
        "rho50": rho[50].value,
        "rho100": rho[100].value,
        "lo": rho[100].lo,
        "hi": rho[100].hi,
        "lo20": rho[20].lo,
        "hi20": rho[20].hi,
        "lo50": rho[50].lo,
        "hi50": rho[50].hi,
        "partial_rho": partial.value,
        "partial_lo": partial.lo,
        "partial_hi": partial.hi,
        "binned_n": binned.n,
        "binned_rho": binned.value,
        "binned_lo": binned.lo,
        "binned_hi": binned.hi,
        **{
            f"{name}{end}": getattr(estimate, field)
            for name, estimate in others.items()
            for end, field in (("", "value"), ("_lo", "lo"), ("_hi", "hi"))
        },
        "search_fitness": ranking.fitness(searched, search.half_a),
        "heldout_fitness": np.mean([rho[k].value for k in ranking.PERCENTS]),
    }


_HELDOUT_CELLS = {  # the noise ceiling has rho100 alone
    **dict.fromkeys(("proxy", "variant", "quantizer"), str),
    **{"n": int, "rho100": float, "lo": float, "hi": float},
    **dict.fromkeys(("rho20", "lo20", "hi20", "rho50", "lo50", "hi50", "binned_n", "seconds"), float | None),
    **dict.fromkeys(("partial_rho", "partial_lo", "partial_hi", "binned_rho", "binned_lo", "binned_hi"), float | None),
    **dict.fromkeys(("kendall", "weighted_tau", "logit_pearson", "search_fitness", "heldout_fitness"), float | None),
}


def load_heldout(profile: Profile, quantizer: str | None = None) -> pd.DataFrame:
    """Return a study's held-out table for one quantizer, by default the profile's."""
    table = load_table(profile, HELDOUT, _HELDOUT_CELLS, unique=("proxy", "quantizer"))
    return table[table["quantizer"] == (quantizer or profile.quantizer)].reset_index(drop=True)
