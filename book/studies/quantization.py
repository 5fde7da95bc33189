"""What each method's bits are worth: the same configurations under every quantizer, over several seeds.

Explained in chapter 05.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from tqdm.auto import tqdm

from book.studies import rows as measured_rows
from book.studies.allocation import load_quantization
from book.studies.bench import load_bench, load_layers
from book.studies.checks import with_calibration
from book.studies.files import COMPARISON
from book.studies.images import load_dataset
from book.studies.networks import build_network, layer_table, load_folded
from book.studies.rows import PartialRows, measure_resumably, row_keys
from book.studies.study import load_table, new_file, seconds_of, sole_writer, study_folder
from book.studies.workers import share
from emq_lib.allocation.approximate import random_within
from emq_lib.allocation.exact import budget_for_average_bits
from emq_lib.bench.engine import measure
from emq_lib.core.configs import bits_text, parse_bits
from emq_lib.core.costs import bops_cost, size_cost
from emq_lib.core.datasets import ImageData
from emq_lib.core.errors import CorruptArtefactError, MissingArtefactError
from emq_lib.core.files import read_table, to_json, vouched_path
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import QUANTIZERS, Profile
from emq_lib.core.sources import code_hash
from emq_lib.proxies.intervals import holm
from emq_lib.quantization.brecq import LAPTOP, Settings, reconstruct_in_order
from emq_lib.quantization.qat import QatRecipe, train_quantized

BUDGETS = (2.25, 2.5, 3.0, 3.5)
COMPARED = ("uniform", "random", "bit sum", "HAWQ-V2", "OMPQ", "one-layer KL", "evolved", "evolved for allocation")
BEST_OF_RANDOM, FLOAT = "best of random", "float"
PARTIAL = "comparison.partial.jsonl"
RECONSTRUCTED, TRAINED = ("brecq", "qat")  # these cost a run for every configuration
TRAINED_METHODS, TRAINED_BUDGETS = (("uniform", "one-layer KL", "evolved for allocation"), (2.25, 3.0))
KEPT = ["top1", "loss", "correct", "quantize_seconds"]


@dataclass(frozen=True)
class Effort:
    """How much "brecq" and "qat" spend on a network."""

    settings: Settings
    recipe: QatRecipe


@dataclass(frozen=True)
class Job:
    """One quantizer with one draw of calibration images, applied to some configurations given as text."""

    quantizer: str
    seed: int
    configs: tuple[str, ...]


def choose(profile: Profile, data: ImageData) -> pd.DataFrame:
    """Return the configurations to compare.

    Those that the methods chose in :mod:`book.studies.allocation`, a random one per seed, and the best random one.

    Returns:
        columns proxy, average_bits, seed, bits (text), search_seconds; seed is -1 where the choice has none.
    """
    chosen = load_quantization(profile).rename(columns={"seconds": "search_seconds"})
    chosen = chosen[chosen["proxy"].isin(COMPARED) & chosen["average_bits"].isin(BUDGETS)]
    chosen = chosen.assign(seed=chosen["seed"].where(chosen["proxy"] == "random", -1))
    columns = ["proxy", "average_bits", "seed", "bits", "search_seconds"]
    return pd.concat([chosen[columns], _best_of_random(profile, data)[columns]], ignore_index=True)


def _best_of_random(profile: Profile, data: ImageData) -> pd.DataFrame:
    """Draw random configurations of each budget's size, as many as the search looked at; keep the best on half A."""
    rows = _known_best(profile, data)
    network, _ = build_network(profile, data)
    images, rest = ((profile.bench_images or len(data.test)) // 2, set(BUDGETS) - {row["average_bits"] for row in rows})
    for average in sorted(rest):
        started = time.perf_counter()
        texts = drawn_at_random(profile, average)
        configs = np.array([parse_bits(text) for text in texts], dtype=np.int8)
        measured, _ = measure_resumably(profile, network, data, configs, images=images)
        best = texts[measured["top1"].argmax()]
        seconds = time.perf_counter() - started
        row = {"proxy": BEST_OF_RANDOM, "average_bits": average, "seed": -1}
        rows.append(row | {"bits": best, "search_seconds": seconds})
    return pd.DataFrame(rows)


def _known_best(profile: Profile, data: ImageData) -> list[dict]:
    """Return the best random choices of the present table whose measurement still holds."""
    table = _present_table(profile)
    if table is None:
        return []
    found = table[(table["proxy"] == BEST_OF_RANDOM) & (table["quantizer"] == QUANTIZERS[0]) & (table["seed"] == 0)]
    found = found[found["key"] == _keys(profile, data, found, None)]
    return found.assign(seed=-1)[["proxy", "average_bits", "seed", "bits", "search_seconds"]].to_dict("records")


def drawn_at_random(profile: Profile, average: float) -> list[str]:
    """Return random configurations (text) of one budget's size, drawn as often as the search looked at one.

    Args:
        profile: the study; its bench must exist.
        average: the budget in average bits.
    """
    size = size_cost(load_layers(profile), profile.choices)
    budget, rng = (budget_for_average_bits(average, size, profile.choices), profile.rng(f"many random at {average}"))
    count = len(load_bench(profile).split("stratified")[0])
    drawn = (random_within(size, budget, profile.choices, rng=rng) for _ in range(count))
    return list(dict.fromkeys(map(bits_text, drawn)))


def build_comparison(
    profile: Profile,
    data: ImageData,
    *,
    settings: Settings = LAPTOP,
    epochs: int = 1,
    seeds: int = 3,
    quantizers: Sequence[str] = (*QUANTIZERS, RECONSTRUCTED),
    images: int | None = None,
    workers: int | None = None,
) -> None:
    """Quantize every method's choice by every quantizer from several seeds; write ``comparison.parquet``.

    A seed draws the calibration images (seed 0: the study's), the batches of reconstruction, and the random
    configuration. Can be interrupted and called again; rows of an earlier table that still hold are taken over, so that
    more seeds or quantizers extend it.

    Args:
        profile: the study; ``quantization.csv`` must exist.
        data: its images.
        settings: of "brecq".
        epochs: of "qat", which otherwise takes batches and augmentation from the training of the checkpoint.
        seeds: how many.
        quantizers: which; "qat", which trains, takes the choices of three methods at two budgets only.
        images: test images to measure on, the first ones in canonical order; all by default.
        workers: processes that share the work, one thread each; None: one per processor. With 1 this process works.

    Raises:
        StudyBusyError: another run is writing the study.
        DiskFullError: no room; what was measured is kept.
    """
    data = _with_test_images(data, images)
    with sole_writer(profile) as folder:
        started = time.perf_counter()
        chosen = choose(profile, data)
        trained = chosen["proxy"].isin(TRAINED_METHODS) & chosen["average_bits"].isin(TRAINED_BUDGETS)
        wanted = pd.concat(
            [
                chosen[chosen["seed"].isin((-1, seed)) & (trained | (quantizer != TRAINED))].assign(
                    quantizer=quantizer, seed=seed
                )
                for quantizer, seed in itertools.product(quantizers, range(seeds))
            ],
            ignore_index=True,
        )
        finished = PartialRows(folder / PARTIAL)
        before, seconds_before = _present_rows(profile)
        rows = before | finished.read()
        effort = Effort(settings, QatRecipe.like(profile.training or QatRecipe(), epochs))
        wanted["key"] = _keys(profile, data, wanted, effort)
        missing = wanted[~wanted["key"].isin(rows)].drop_duplicates("key")
        jobs = _jobs(missing)
        key_of = missing.set_index(["quantizer", "seed", "bits"])["key"].to_dict()
        with tqdm(total=len(missing), desc=f"{profile.name}, comparison", unit="network") as progress:
            for job, found in _run(profile, data, effort, jobs, workers):
                new = {key_of[job.quantizer, job.seed, bits]: row for bits, row in found.items()}
                finished.append(new, seconds=sum(row["quantize_seconds"] for row in new.values()))
                rows |= new
                progress.update(len(new))
        table = wanted.join(pd.DataFrame([rows[key] for key in wanted["key"]])[KEPT])
        table["correct"] = table["correct"].map(base64.b64decode)
        model = load_folded(profile, data.test.images.device)
        layers = layer_table(model, profile)
        configs = np.array([parse_bits(bits) for bits in table["bits"]], dtype=np.int8)
        bops = bops_cost(layers, profile.choices, activation_bits=profile.activation_bits)
        table["size_bytes"] = size_cost(layers, profile.choices).total(configs, profile.choices).astype(np.int64)
        table["bops"] = bops.total(configs, profile.choices).astype(np.int64)
        table = pd.concat([table, _float_row(model, layers, data)], ignore_index=True).assign(images=len(data.test))
        spent = {
            RECONSTRUCTED: f"{settings.iterations} steps per block, {settings.activation_iterations} for its inputs",
            TRAINED: f"{epochs} epochs",
        }
        note = "; ".join(f"{quantizer}: {what}" for quantizer, what in spent.items() if quantizer in quantizers)
        seconds = seconds_before + time.perf_counter() - started
        with new_file(profile, COMPARISON, seconds=seconds, rows=len(table), note=note) as path:
            table.to_parquet(path, index=False, compression="zstd")
        for name in (PARTIAL, measured_rows.PARTIAL):
            (folder / name).unlink(missing_ok=True)


def _float_row(model: torch.nn.Module, layers: pd.DataFrame, data: ImageData) -> pd.DataFrame:
    """Return the row of the float network: method and quantizer "float", 32 bits."""
    logits = predict(model, data.test)
    row = {
        "proxy": FLOAT,
        "quantizer": FLOAT,
        "average_bits": 32.0,
        "seed": 0,
        "bits": "",
        "search_seconds": 0.0,
        "quantize_seconds": 0.0,
        "key": FLOAT,
        "top1": top1(logits, data.test.labels),
        "loss": F.cross_entropy(logits.double(), data.test.labels).item(),
        "correct": np.packbits((logits.argmax(dim=1) == data.test.labels).cpu().numpy()).tobytes(),
        "size_bytes": 4 * sum(parameter.numel() for parameter in model.parameters()),
        "bops": 32 * 32 * int(layers["macs"].sum()),
    }
    return pd.DataFrame([row])


def _jobs(missing: pd.DataFrame) -> list[Job]:
    """Return the work: a job for every configuration where each costs a run, or one for all of them."""
    jobs = []
    for (quantizer, seed), group in missing.groupby(["quantizer", "seed"], sort=False):
        configs = tuple(group["bits"])
        parts = [(bits,) for bits in configs] if quantizer in (RECONSTRUCTED, TRAINED) else [configs]
        jobs += [Job(quantizer, seed, part) for part in parts]
    return jobs


def _run(
    profile: Profile, data: ImageData, effort: Effort, jobs: Sequence[Job], workers: int | None
) -> Iterator[tuple[Job, dict]]:
    """Yield the jobs with their rows, in order."""
    if workers == 1:
        work = functools.partial(quantize_and_measure, profile, data, effort)
    else:  # processes load the images themselves
        work = functools.partial(_work, profile, effort, len(data.test))
    yield from zip(jobs, share(work, jobs, workers), strict=True)


def _work(profile: Profile, effort: Effort, images: int, job: Job) -> dict[str, dict]:
    return quantize_and_measure(profile, _with_test_images(_images(profile), images), effort, job)


_images = functools.lru_cache(maxsize=1)(load_dataset)


def _with_test_images(data: ImageData, count: int | None) -> ImageData:
    return dataclasses.replace(data, test=data.test[:count])


def quantize_and_measure(profile: Profile, data: ImageData, effort: Effort, job: Job) -> dict[str, dict]:
    """Return the rows of a job: bits (text) -> top1, loss, correct (which images, packed, in base64), quantize_seconds.

    Args:
        profile: the study.
        data: its images.
        effort: of "brecq" and "qat".
        job: what to do.
    """
    started = time.perf_counter()
    drawn = with_calibration(data, job.seed)
    variant = dataclasses.replace(profile, quantizer=job.quantizer if job.quantizer in QUANTIZERS else QUANTIZERS[0])
    network, layers = build_network(variant, drawn)
    configs = np.array([parse_bits(bits) for bits in job.configs], dtype=np.int8)
    ranges, generator = (network.activation_ranges, profile.generator(f"comparison, seed {job.seed}"))
    if job.quantizer in (RECONSTRUCTED, TRAINED):
        model = load_folded(profile, data.test.images.device)
    if job.quantizer == RECONSTRUCTED:
        network = reconstruct_in_order(
            model, layers, configs[0], drawn.calibration, ranges, generator=generator, settings=effort.settings
        )
    if job.quantizer == TRAINED:
        network = train_quantized(
            model, layers, configs[0], data.train, ranges, generator=generator, recipe=effort.recipe
        )
    seconds = time.perf_counter() - started
    rows = {}
    for item in itertools.chain.from_iterable(measure(network, data.test, configs)):
        correct = base64.b64encode(np.packbits(item.correct)).decode()
        facts = {"top1": item.top1, "loss": item.loss, "correct": correct}
        rows[bits_text(item.config)] = facts | {"quantize_seconds": seconds / len(configs)}
    return rows


def _keys(profile: Profile, data: ImageData, wanted: pd.DataFrame, effort: Effort | None) -> list[str]:
    """Return a key per row: a hash of everything that it depends on; rounding to nearest has no effort."""
    keys = {}
    for (quantizer, seed), group in wanted.groupby(["quantizer", "seed"]):
        variant = dataclasses.replace(profile, quantizer=quantizer if quantizer in QUANTIZERS else QUANTIZERS[0])
        configs = np.array([parse_bits(bits) for bits in group["bits"]])
        plain = row_keys(variant, with_calibration(data, seed), len(data.test), configs)
        how = (
            {}
            if effort is None
            else {
                RECONSTRUCTED: [dataclasses.asdict(effort.settings), code_hash("emq_lib.quantization.brecq")],
                TRAINED: [dataclasses.asdict(effort.recipe), code_hash("emq_lib.quantization.qat")],
            }
        )
        text = to_json(how[quantizer]) if quantizer in how else ""
        for index, key in zip(group.index, plain, strict=True):
            keys[index] = hashlib.blake2b(f"{quantizer} {text} {key}".encode(), digest_size=12).hexdigest()
    return [keys[index] for index in wanted.index]


def _present_table(profile: Profile) -> pd.DataFrame | None:
    """Return the study's present table, which may be out of date: its rows hold or not one by one, by their keys."""
    try:
        path = vouched_path(study_folder(profile), COMPARISON)
    except MissingArtefactError:
        return None
    return read_table(path, dict.fromkeys(("proxy", "quantizer", "seed", "key", *KEPT)))


def _present_rows(profile: Profile) -> tuple[dict[str, dict], float]:
    """Return key -> row of the study's present table, and the wall time it took."""
    table = _present_table(profile)
    if table is None:
        return {}, 0.0
    table = table.drop_duplicates("key").set_index("key").drop(index=FLOAT, errors="ignore")
    table["correct"] = table["correct"].map(lambda packed: base64.b64encode(packed).decode())
    return table[KEPT].to_dict("index"), seconds_of(profile, COMPARISON)


_CELLS = {
    **dict.fromkeys(("proxy", "bits", "quantizer", "key"), str),
    **dict.fromkeys(("average_bits", "search_seconds", "quantize_seconds", "top1", "loss"), float),
    **dict.fromkeys(("seed", "images", "size_bytes", "bops"), int),
    "correct": None,
}


def _packs(correct: object, images: int) -> bool:
    """Return whether bytes hold one bit for each image."""
    return isinstance(correct, bytes) and len(correct) == -(-images // 8)


def load_comparison(profile: Profile) -> pd.DataFrame:
    """Return the study's table of :func:`build_comparison`, with `hits`: bool arrays, one entry per test image."""
    table = load_table(profile, COMPARISON, _CELLS, unique=("proxy", "average_bits", "seed", "quantizer"))
    if not all(map(_packs, table["correct"], table["images"])):
        raise CorruptArtefactError(f"{COMPARISON} of {profile.name!r} lacks images of a row. Restore or rebuild it.")
    hits = [
        np.unpackbits(np.frombuffer(row.correct, np.uint8), count=row.images).astype(bool) for row in table.itertuples()
    ]
    return table.drop(columns="correct").assign(hits=hits)


@dataclass(frozen=True)
class Mean:
    """A mean over images and seeds, in points: the estimate, its 95 % interval, and the p-value of being zero."""

    value: float
    lo: float
    hi: float
    p_value: float
    images: int
    seeds: int


def mean_of(values: np.ndarray) -> Mean:
    """Estimate the mean of a table of seeds by images, both of which are samples.

    The variance of the mean is that over images of each image's mean, plus that over seeds of each seed's mean, each
    divided by their number; degrees of freedom as by Welch and Satterthwaite. With one seed only images count.

    Args:
        values: shape (seeds, images): hits, or differences of hits of two methods on the same images.

    >>> mean_of(np.array([[1.0, 0.0, 1.0, 1.0]])).value
    75.0
    """
    values = 100 * np.atleast_2d(np.asarray(values, dtype=np.float64))
    seeds, images = values.shape
    parts = [(values.mean(axis=0).var(ddof=1) / images, images - 1)]
    if seeds > 1:
        parts.append((values.mean(axis=1).var(ddof=1) / seeds, seeds - 1))
    variance, value = sum(part for part, _ in parts), float(values.mean())
    if variance == 0:
        return Mean(value, value, value, float(value == 0), images, seeds)
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    margin = stats.t.ppf(0.975, freedom) * variance**0.5
    p_value = 2 * stats.t.sf(abs(value) / variance**0.5, freedom)
    return Mean(value, value - margin, value + margin, float(p_value), images, seeds)


def held_out_hits(profile: Profile, table: pd.DataFrame) -> pd.Series:
    """Return each method's hits, 0 or 1, on images that no search has seen, shape (seeds, images).

    Evolution and the best random configuration were chosen on half A of the bench's images; the others are left.

    Args:
        profile: the study.
        table: of :func:`load_comparison`.

    Returns:
        series of arrays, index (quantizer, average_bits, proxy).
    """
    groups = table.sort_values("seed").groupby(["quantizer", "average_bits", "proxy"], sort=False)
    first = (profile.bench_images or int(table["images"].iloc[0])) // 2
    return groups.apply(lambda rows: np.stack(rows["hits"])[:, first:].astype(np.float64))


def compare_methods(profile: Profile, table: pd.DataFrame, method: str) -> pd.DataFrame:
    """Return by how much one method's choices are above the others', image by image.

    Args:
        profile: the study.
        table: of :func:`load_comparison`.
        method: the one that the others are compared with.

    Returns:
        columns quantizer, average_bits, proxy (the other), value, lo, hi, p_value (two-sided), holm (the p-values of
        one quantizer and budget adjusted by Holm's method), images, seeds.
    """
    hits, rows = held_out_hits(profile, table), []
    hits = hits[hits.index.get_level_values("quantizer") != FLOAT]
    for (quantizer, average), group in hits.groupby(level=[0, 1], sort=False):
        by_proxy = group.droplevel([0, 1])
        if method in by_proxy:
            own = by_proxy[method]
            for proxy, other in by_proxy.drop(method).items():
                shared = min(len(own), len(other))
                found = dataclasses.asdict(mean_of(own[:shared] - other[:shared]))
                rows.append({"quantizer": quantizer, "average_bits": average, "proxy": proxy} | found)
    found = pd.DataFrame(rows)
    adjusted = found.groupby(["quantizer", "average_bits"], sort=False)["p_value"].transform(lambda p: holm(list(p)))
    return found.assign(holm=adjusted)
