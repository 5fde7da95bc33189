"""Seconds to load 10,000 rows through `load_bench`, against pandas alone on the same file.

The file has the form and the columns of a published bench: its rows, repeated under other configurations. `load_bench`
also checks the file against the manifest.

    python benchmarks/loading.py

writes ``benchmarks/loading.json``.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import tempfile
import time

import pandas as pd
from engine import hardware

from book.studies.bench import load_bench, load_layers
from book.studies.files import BENCH, LAYERS
from book.studies.study import checked_path, new_file, study_folder
from emq_lib.bench.sampling import sample_configs
from emq_lib.core.configs import bits_text
from emq_lib.core.profiles import get_profile

RESULTS = pathlib.Path(__file__).with_suffix(".json")
ROWS, REPEATS = 10_000, 7


def main() -> None:
    """Write the file, check that both ways read the same, time them in turn, and write the result."""
    profile = get_profile("cifar10-resnet20")
    layers = load_layers(profile)
    published = pd.read_parquet(checked_path(profile, "bench.parquet"))
    slots = len(published["bits"].iloc[0])
    configs = sample_configs(slots, profile.choices, ROWS, rng=profile.rng("benchmark"))[-ROWS:]
    table = published.sample(ROWS, replace=True, random_state=0).reset_index(drop=True)
    table = table.assign(bits=list(configs), config_id=list(map(bits_text, configs)), quantizer=profile.quantizer)
    with tempfile.TemporaryDirectory() as root:
        os.environ["EMQ_STUDY_ROOT"] = root
        with new_file(profile, LAYERS, seconds=0.0, rows=len(layers)) as path:
            layers.to_csv(path, index=False)
        with new_file(profile, BENCH, seconds=0.0, rows=ROWS) as path:
            table.to_parquet(path, index=False)
        path = study_folder(profile) / BENCH
        ways = {
            "load_bench": lambda: load_bench(profile).to_pandas(),
            "pandas.read_parquet": lambda: pd.read_parquet(path),
        }
        pd.testing.assert_frame_equal(*(read() for read in ways.values()))
        seconds = {way: [_seconds(read) for _ in range(REPEATS)] for way, read in ways.items()}
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    result = {"rows": ROWS, "median seconds": medians, "seconds": seconds, "hardware": hardware()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{ROWS:,} rows: " + ", ".join(f"{way} {median:.3f} s" for way, median in medians.items()))


def _seconds(read) -> float:
    started = time.perf_counter()
    read()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
