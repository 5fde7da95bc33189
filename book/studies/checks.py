"""What a row of the bench depends on besides the bits: the calibration images, and the order of reconstruction.

Explained in chapter 01.
"""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from book.studies.bench import load_bench
from book.studies.files import CHECKS, NEUTRAL
from book.studies.networks import build_network, layer_table, load_folded
from book.studies.roundings import remove_roundings
from book.studies.rows import PARTIAL, PartialRows, check_measured, measure_resumably, row_keys, row_of
from book.studies.study import checked_path, load_table, new_file, sole_writer, study_folder
from emq_lib.bench.engine import measure
from emq_lib.core.configs import bits_text
from emq_lib.core.datasets import ImageData
from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.profiles import QUANTIZERS, Profile
from emq_lib.core.quantizers import choose_activation_ranges
from emq_lib.core.sources import code_hash
from emq_lib.quantization.brecq import WEIGHTS_ONLY, reconstruct_in_order

DRAWS, CONFIGS, IN_ORDER = 3, 50, 20
_HOW_IN_ORDER = "emq_lib.quantization.brecq:reconstruct_in_order"
COLUMNS = ("quantizer", "draw", "bits", "top1", "loss", "correct_a", "correct_b", "n_a", "n_b")


def build_checks(profile: Profile, data: ImageData) -> None:
    """Measure some random configurations of the bench again, differently, and write ``checks.csv``.

    The first 50 under each quantizer, with three draws of the calibration images: draw 0 is the bench's own, the others
    are disjoint from it and from each other. The first 20 also reconstructed block after block (quantizer "in order",
    see :mod:`emq_lib.quantization.brecq`). Can be interrupted and called again.

    Args:
        profile: the study; its bench must exist.
        data: its images.

    Raises:
        InvalidParameterError: there are too few training images for the draws.
    """
    configs = load_bench(profile).select("random").configs[:CONFIGS]
    known = pd.read_parquet(checked_path(profile, "bench.parquet")).set_index("key").to_dict("index")
    folder = study_folder(profile)
    with sole_writer(profile):
        tables = []
        for quantizer, draw in itertools.product(QUANTIZERS, range(DRAWS)):
            variant, drawn = (dataclasses.replace(profile, quantizer=quantizer), with_calibration(data, draw))
            network, _ = build_network(variant, drawn, folder=folder)
            rows, _ = measure_resumably(variant, network, drawn, configs, images=profile.bench_images, known=known)
            tables.append(rows.assign(quantizer=quantizer, draw=draw, bits=list(map(bits_text, configs))))
        rows, seconds = _measure_in_order(profile, data, configs[:IN_ORDER])
        tables.append(rows.assign(quantizer="in order", draw=0, bits=list(map(bits_text, configs[:IN_ORDER]))))
        table = pd.concat(tables, ignore_index=True)[list(COLUMNS)]
        with new_file(profile, CHECKS, seconds=seconds, rows=len(table)) as path:
            table.to_csv(path, index=False)
        (folder / PARTIAL).unlink(missing_ok=True)
        remove_roundings(folder)


def load_checks(profile: Profile) -> pd.DataFrame:
    """Return a study's ``checks.csv``; `bits` is text."""
    whole, parts = ("draw", "correct_a", "correct_b", "n_a", "n_b"), ("top1", "loss")
    cells = dict.fromkeys(COLUMNS, str) | dict.fromkeys(whole, int) | dict.fromkeys(parts, float)
    return check_measured(load_table(profile, CHECKS, cells, unique=("quantizer", "draw", "bits")), CHECKS)


def with_calibration(data: ImageData, draw: int) -> ImageData:
    """Return the data with another draw of calibration images, all draws disjoint; draw 0 is the study's own.

    Raises:
        InvalidParameterError: there are too few training images.
    """
    count = len(data.calibration)
    if (draw + 1) * count > len(data.train):
        raise InvalidParameterError(f"draw {draw} of {count} calibration images needs more than {len(data.train)}.")
    return dataclasses.replace(data, calibration=data.train[draw * count : (draw + 1) * count])


def _measure_in_order(profile: Profile, data: ImageData, configs: np.ndarray) -> tuple[pd.DataFrame, float]:
    """Reconstruct and measure configurations one by one, keeping every finished one on disk; columns as in the bench.

    Also returns the wall time in seconds of everything that was kept on disk.
    """
    model = load_folded(profile, data.test.images.device)
    layers = layer_table(model, profile)
    ranges = choose_activation_ranges(model, layers, data.calibration, bits=profile.activation_bits)
    split = data.test[: profile.bench_images or len(data.test)]
    finished = PartialRows(study_folder(profile) / PARTIAL)
    rows = finished.read()
    how = [
        "in order",
        dataclasses.asdict(WEIGHTS_ONLY),
        profile.seed_of("in order"),
        code_hash(_HOW_IN_ORDER, neutral=NEUTRAL),
    ]
    keys = row_keys(profile, data, len(split), configs, also=how)
    for key, config in zip(keys, tqdm(configs, desc="in order", unit="config"), strict=True):
        if key not in rows:
            started = time.perf_counter()
            generator = profile.generator("in order")
            network = reconstruct_in_order(
                model, layers, config, data.calibration, ranges, generator=generator, settings=WEIGHTS_ONLY
            )
            [[found]] = measure(network, split, config[None])
            rows[key] = row_of(found)
            finished.append({key: rows[key]}, seconds=time.perf_counter() - started)
    return pd.DataFrame([rows[key] for key in keys]), finished.seconds
