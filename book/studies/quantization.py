"""What each method's bits are worth: the same configurations under every quantizer, over several seeds.

Explained in chapter 05.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from book.studies import rows as measured_rows
from book.studies.allocation import load_quantization
from book.studies.bench import load_bench, load_layers
from book.studies.checks import with_calibration
from book.studies.files import BENCH, COMPARISON, NEUTRAL
from book.studies.images import load_dataset
from book.studies.margins import FLOAT, images_of_half_a
from book.studies.networks import build_network, layer_table, load_folded
from book.studies.roundings import remove_roundings
from book.studies.rows import PartialRows, measure_resumably, row_keys
from book.studies.study import load_table, manifest_of, new_file, seconds_of, sole_writer, study_folder
from book.studies.workers import share
from emq_lib.allocation.approximate import random_within
from emq_lib.allocation.exact import budget_for_average_bits
from emq_lib.bench.engine import measure
from emq_lib.core.configs import bits_text, parse_bits
from emq_lib.core.costs import bops_cost, size_cost
from emq_lib.core.datasets import ImageData
from emq_lib.core.errors import CorruptArtefactError, MissingArtefactError
from emq_lib.core.files import read_table, vouched_path
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import QUANTIZERS, Profile
from emq_lib.core.sources import code_hash
from emq_lib.core.training import tensors_digest
from emq_lib.quantization.brecq import LAPTOP, Settings, reconstruct_in_order
from emq_lib.quantization.qat import QatRecipe, train_quantized

BUDGETS = (2.25, 2.5, 3.0, 3.5)
COMPARED = ("uniform", "random", "bit sum", "HAWQ-V2", "OMPQ", "one-layer KL", "evolved", "evolved for allocation")
BEST_OF_RANDOM = "best of random"
PARTIAL = "comparison.partial.jsonl"
RECONSTRUCTED, TRAINED = ("brecq", "qat")  # these cost a run for every configuration
TRAINED_METHODS, TRAINED_BUDGETS = (("uniform", "one-layer KL", "evolved for allocation"), (2.25, 3.0))
IN_FULL = {"quantizers": (*QUANTIZERS, RECONSTRUCTED, TRAINED), "epochs": 10}  # what the book shows
KEPT = ["top1", "loss", "correct", "quantize_seconds"]
_CELLS = {
    **dict.fromkeys(("proxy", "bits", "quantizer", "key"), str),
    **dict.fromkeys(("average_bits", "search_seconds", "quantize_seconds", "top1", "loss"), float),
    **dict.fromkeys(("seed", "images", "size_bytes", "bops"), int),
    "correct": None,
}


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
    rest = sorted(set(BUDGETS) - {row["average_bits"] for row in rows})
    if not rest:
        return pd.DataFrame(rows)
    network, _ = build_network(profile, data, folder=study_folder(profile))
    images = min(images_of_half_a(profile), len(data.test))
    for average in rest:
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
    """Return the best random choices of the present table, drawn for the present bench, that were measured as now."""
    table, entries = _present_table(profile), manifest_of(profile)
    bench = entries.get(BENCH, {}).get("sha256")
    if table is None or entries.get(COMPARISON, {}).get("inputs", {}).get(BENCH) != bench:
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
        wanted = _wanted(choose(profile, data), quantizers, seeds)
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
        table = _described(profile, data, wanted.join(pd.DataFrame([rows[key] for key in wanted["key"]])[KEPT]))
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
        remove_roundings(folder)


def _wanted(chosen: pd.DataFrame, quantizers: Sequence[str], seeds: int) -> pd.DataFrame:
    """Return the rows to measure: every choice under every quantizer and seed, for "qat" some of them."""
    trained = chosen["proxy"].isin(TRAINED_METHODS) & chosen["average_bits"].isin(TRAINED_BUDGETS)
    parts = [
        chosen[chosen["seed"].isin((-1, seed)) & (trained | (quantizer != TRAINED))].assign(
            quantizer=quantizer, seed=seed
        )
        for quantizer, seed in itertools.product(quantizers, range(seeds))
    ]
    return pd.concat(parts, ignore_index=True)


def _described(profile: Profile, data: ImageData, table: pd.DataFrame) -> pd.DataFrame:
    """Return measured rows with what they cost, and the float network below them."""
    model = load_folded(profile, data.test.images.device)
    layers, choices = layer_table(model, profile), profile.choices
    configs = np.array([parse_bits(bits) for bits in table["bits"]], dtype=np.int8)
    bops = bops_cost(layers, choices, activation_bits=profile.activation_bits)
    table = table.assign(
        correct=table["correct"].map(base64.b64decode),
        size_bytes=size_cost(layers, choices).total(configs, choices).astype(np.int64),
        bops=bops.total(configs, choices).astype(np.int64),
    )
    return pd.concat([table, _float_row(model, layers, data)], ignore_index=True).assign(images=len(data.test))


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
    network, layers = build_network(variant, drawn, folder=study_folder(profile))
    configs = np.array([parse_bits(bits) for bits in job.configs], dtype=np.int8)
    ranges, generator = network.activation_ranges, profile.generator(_stream(job.seed))
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
        also = [quantizer, *_also(profile, data, quantizer, seed, effort=effort)]
        found = row_keys(variant, with_calibration(data, seed), len(data.test), configs, also=also)
        keys |= dict(zip(group.index, found, strict=True))
    return [keys[index] for index in wanted.index]


def _also(profile: Profile, data: ImageData, quantizer: str, seed: int, *, effort: Effort | None) -> list[object]:
    """Return what the rows of a quantizer that learns depend on besides what all rows do."""
    stream = profile.seed_of(_stream(seed))
    if quantizer == RECONSTRUCTED:
        code = code_hash("emq_lib.quantization.brecq:reconstruct_in_order", neutral=NEUTRAL)
        return [dataclasses.asdict(effort.settings), code, stream]
    if quantizer == TRAINED:
        code = code_hash("emq_lib.quantization.qat:train_quantized", neutral=NEUTRAL)
        return [dataclasses.asdict(effort.recipe), code, stream, tensors_digest(data.train.images, data.train.labels)]
    return []


def _stream(seed: int) -> str:
    """Return the name of the random stream that batches of reconstruction and training are drawn from."""
    return f"comparison, seed {seed}"


def _present_table(profile: Profile) -> pd.DataFrame | None:
    """Return the study's present table, which may be out of date: its rows hold or not one by one, by their keys."""
    try:
        return _checked(read_table(vouched_path(study_folder(profile), COMPARISON), _CELLS), profile)
    except MissingArtefactError:
        return None
    except CorruptArtefactError as error:
        warnings.warn(f"{error} Its rows are measured anew.", stacklevel=2)
        return None


def _present_rows(profile: Profile) -> tuple[dict[str, dict], float]:
    """Return key -> row of the study's present table, and the wall time it took."""
    table = _present_table(profile)
    if table is None:
        return {}, 0.0
    table = table.drop_duplicates("key").set_index("key").drop(index=FLOAT, errors="ignore")
    table["correct"] = table["correct"].map(lambda packed: base64.b64encode(packed).decode())
    return table[KEPT].to_dict("index"), seconds_of(profile, COMPARISON)


def _checked(table: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return a table after checking that each row holds one bit for each image."""
    for correct, images in zip(table["correct"], table["images"], strict=True):
        if not isinstance(correct, bytes) or len(correct) != -(-images // 8):
            raise CorruptArtefactError(
                f"{COMPARISON} of {profile.name!r} lacks images of a row. Restore or rebuild it."
            )
    return table


def load_comparison(profile: Profile) -> pd.DataFrame:
    """Return the study's table of :func:`build_comparison`, with `hits`: bool arrays, one entry per test image."""
    table = load_table(profile, COMPARISON, _CELLS, unique=("proxy", "average_bits", "seed", "quantizer"))
    _checked(table, profile)
    measured_rows.check_measured(table[table["quantizer"] != FLOAT], COMPARISON)
    hits = [
        np.unpackbits(np.frombuffer(row.correct, np.uint8), count=row.images).astype(bool) for row in table.itertuples()
    ]
    table = table.drop(columns="correct").assign(hits=hits)
    if not np.allclose(table["top1"], [100 * row.mean() for row in hits]):
        raise CorruptArtefactError(f"{COMPARISON} has a top-1 that its images do not give. Restore or rebuild it.")
    return table
