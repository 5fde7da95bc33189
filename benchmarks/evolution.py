"""The search: one candidate against the released way of scoring it, a thousand iterations, candidates per second.

The released way runs the network forward and backward for every configuration and then evaluates the formula. Here the
gradients are computed once, and a formula becomes a score table. Both score bit-weighted SNIP on the same batch, and
the scores are compared before anything is timed. Then how long the paper's thousand iterations take, and how many
candidates per second are judged on networks of different sizes.

    python benchmarks/evolution.py

writes ``benchmarks/evolution.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import numpy as np
from engine import hardware

from book.studies import evolution, methods
from book.studies.bench import load_bench
from book.studies.images import load_dataset
from book.studies.networks import layer_table, load_checkpoint
from book.studies.proxies import load_statistics
from book.studies.study import checked_path, has_study
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.profiles import EvolutionBudget, get_profile, profile_names
from emq_lib.evolution import fitness, search
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.genotypes import KNOWN
from emq_lib.evolution.spaces import Space
from emq_lib.proxies import curvature
from emq_lib.proxies.layer_statistics import sampled

RESULTS = pathlib.Path(__file__).with_suffix(".json")
CONFIGURATIONS, IMAGES, REPEATS, CANDIDATES, POPULATION = 425, 128, 5, 400, 50


def against_released_way(name: str) -> dict:
    """Score all configurations by one formula both ways, compare, and return the times."""
    profile = get_profile(name)
    model = fold_batchnorm(load_checkpoint(profile, checked_path(profile, "model.safetensors")))
    layers = layer_table(model, profile)
    names = list(layers.loc[layers["searchable"], "name"])
    weight_of = {layer: model.get_submodule(layer).weight for layer in names}
    batch = load_dataset(profile).calibration[:IMAGES]
    configs = load_bench(profile).select("random").configs[:CONFIGURATIONS]
    measured = load_statistics(profile)

    def plain(config: np.ndarray) -> float:
        total = 0.0
        gradients = curvature.loss_gradients(model, weight_of, batch)
        for bits, weight, gradient in zip(config, weight_of.values(), gradients, strict=True):
            product = sampled((bits * weight.detach() * gradient.detach()).flatten(1))
            total += product.abs().mean().item() * weight.numel()
        return total

    def ours() -> np.ndarray:
        evaluator = Evaluator(dataclasses.replace(measured, gradients=gradients))
        return evaluator.score(KNOWN["bit-SNIP"], configs)

    found = curvature.loss_gradients(model, weight_of, batch)
    gradients = tuple(sampled(gradient.detach().flatten(1)) for gradient in found)
    started = time.perf_counter()
    slow = np.array([plain(config) for config in configs])
    seconds = time.perf_counter() - started
    if not np.allclose(ours(), slow, rtol=1e-4):
        raise SystemExit("the two ways do not give the same scores: nothing was timed.")
    times = [_timed(ours) for _ in range(REPEATS)]
    return {
        "configurations": len(configs),
        "images": IMAGES,
        "seconds of the released way": seconds,
        "seconds of a score table": statistics.median(times),
        "ratio": seconds / statistics.median(times),
    }


def thousand_iterations(name: str) -> dict:
    """Run the paper's search three times and return the median time."""
    profile, method = get_profile(name), methods.METHODS[methods.EVOLUTION]
    space, times, judged = method.space("branched"), [], []
    for seed in range(3):
        problems = [
            dataclasses.replace(problem, evaluator=Evaluator(load_statistics(profile)))
            for problem in evolution.load_problems(profile)
        ]
        judge = method.judge(problems)
        run = search.evolve(judge, space, budget=EvolutionBudget(POPULATION, 1_000), rng=np.random.default_rng(seed))
        times.append(_timed(lambda run=run: list(run)))
        judged.append(judge.evaluations + judge.rejected + judge.duplicates)
    return {"population": POPULATION, "iterations": 1_000, "seconds": statistics.median(times), "candidates": judged}


def candidates_per_second(name: str, device: str) -> dict:
    """Judge random branched formulas, a population at a time, nothing remembered from before."""
    profile = get_profile(name)
    measured = load_statistics(profile)
    problem = dataclasses.replace(evolution.load_problems(profile)[0], evaluator=Evaluator(measured, device=device))
    space, rng, judge = Space("branched"), np.random.default_rng(0), fitness.Judge([problem])
    populations = [[space.random(rng) for _ in range(POPULATION)] for _ in range(CANDIDATES // POPULATION)]
    judge.judge_many(populations[0][:1])
    seconds = _timed(lambda: list(map(judge.judge_many, populations)))
    return {
        "layers": len(measured.names),
        "weights": int(measured.parameters.sum()),
        "sampled weights": sum(gradient.numel() for gradient in measured.gradients),
        "configurations": len(problem.configs),
        "candidates per second": CANDIDATES / seconds,
    }


def _timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cifar10-resnet20")
    parser.add_argument("--device", default="cpu", help="where random formulas are judged: cpu or cuda")
    options = parser.parse_args()
    benched = [
        name for name in profile_names() if has_study(get_profile(name), "statistics.safetensors", "bench.parquet")
    ]
    results = {
        "profile": options.profile,
        "against the released way": against_released_way(options.profile),
        "a thousand iterations": thousand_iterations(options.profile),
        "growth": {name: candidates_per_second(name, options.device) for name in benched},
        "hardware": hardware(options.device),
    }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
