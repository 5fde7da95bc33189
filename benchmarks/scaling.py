"""How the engine's time and memory grow with the network: every profile, with random weights on random images.

What a network answers does not decide how long it takes, so this needs neither checkpoints nor images, and ImageNet's
networks can be timed by anybody. Nothing is said about accuracy.

    python benchmarks/scaling.py [--profiles imagenet-resnet50 ...]

writes ``benchmarks/scaling.json``, one entry per profile.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import pathlib
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from engine import hardware, peak_memory

from book.studies.networks import fresh_model, layer_table
from emq_lib.bench import engine
from emq_lib.bench.sampling import sample_configs
from emq_lib.core import networks, quantizers
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.datasets import Split
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.models import INPUT_SHAPES
from emq_lib.core.profiles import get_profile, profile_names

RESULTS = pathlib.Path(__file__).with_suffix(".json")
WORK, REPEATS = 4e11, 3  # multiply-accumulates of one repeat, before sharing


def run(name: str, configs: int) -> dict[str, object]:
    """Time preparation and measuring of one profile, in a process of its own."""
    profile = get_profile(name)
    model = fold_batchnorm(fresh_model(profile))
    layers = layer_table(model, profile)
    macs = int(layers["macs"].sum())
    count = int(min(1_000, max(engine.BATCH["cpu"], WORK // (macs * configs))))
    images = torch.randint(256, (count, *INPUT_SHAPES[profile.dataset]), generator=torch.Generator().manual_seed(0))
    channels = images.shape[1]
    split = Split(images.byte(), torch.zeros(count).long(), torch.full((channels,), 0.5), torch.full((channels,), 0.25))
    started = time.perf_counter()
    bank = build_weight_bank(model, layers, profile.choices)
    some = split[: engine.BATCH["cpu"]]
    ranges = quantizers.choose_activation_ranges(model, layers, some, bits=profile.activation_bits)
    network = networks.QuantizedNetwork(copy.deepcopy(model), bank, ranges)
    prepared = time.perf_counter() - started
    drawn = sample_configs(bank.slot_count, profile.choices, configs, rng=profile.rng("benchmark"))[-configs:]
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        measured = sum(len(block) for block in engine.measure(network, split, drawn))
        seconds.append(time.perf_counter() - started)
    return {
        "MACs per image": macs,
        "layers": len(layers),
        "slots": bank.slot_count,
        "images": count,
        "configurations": measured,
        "planned MACs per image": engine.planned_macs(model, layers, drawn),
        "seconds of preparation": prepared,
        "seconds": statistics.median(seconds),
        "seconds of each repeat": seconds,
        "peak memory in MiB": peak_memory(),
        "hardware": hardware(),
    }


def main() -> None:
    """Run the benchmark and enter it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", nargs="*", default=profile_names())
    parser.add_argument("--configs", type=int, default=engine.BLOCK)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.profiles:
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as process:
            results[name] = found = process.submit(run, name, options.configs).result()
        rate = found["images"] * found["planned MACs per image"] / found["seconds"]
        memory = found["peak memory in MiB"]
        print(f"{name}: {found['seconds']:.1f} s, {rate / 1e9:.0f} GMACs per second, {memory:.0f} MiB", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
