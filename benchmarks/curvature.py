"""Hessian traces of all layers at equal standard error: `emq_lib.proxies.curvature` against curvlinops and PyHessian.

All estimate the trace of each searchable layer's block of the Hessian on the same images. Ours is timed with two random
combinations of classes per image; its standard error, over repetitions with other combinations, is the target. The
others run random probes layer by layer, a few of which give the time and the variance of one; how many reach the target
follows from that. First every estimate is compared with the exact trace. Also the time of all statistics of a study.

    python benchmarks/curvature.py

writes ``benchmarks/curvature.json``, one entry per profile.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from engine import hardware
from pyhessian import hessian
from torch import nn

from book.studies.files import STATISTICS
from book.studies.images import load_dataset
from book.studies.networks import layer_table, load_checkpoint
from book.studies.study import checked_path, manifest_of
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.profiles import get_profile
from emq_lib.proxies import curvature

RESULTS = pathlib.Path(__file__).with_suffix(".json")
REPEATS = 10


def with_curvlinops(model: nn.Module, weight: nn.Parameter, batch, probes: int) -> np.ndarray:
    """Return one layer's estimates v' H v, one per probe."""
    data = [(batch.inputs(), batch.labels)]
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), [weight], data, check_deterministic=False)
    signs = 2.0 * torch.randint(0, 2, (probes, weight.numel())) - 1
    return np.array([(v @ (operator @ v)).item() for v in signs])


def with_pyhessian(model: nn.Module, weight: nn.Parameter, batch, probes: int) -> np.ndarray:
    """Return one layer's estimates, all other weights frozen, since PyHessian takes all that are not."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    found = hessian(model, nn.CrossEntropyLoss(), data=(batch.inputs(), batch.labels), cuda=False)
    estimates = found.trace(maxIter=probes, tol=0.0)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return np.array(estimates)


def run(name: str, *, images: int, probes: int) -> dict:
    """Compare, time, and return what was measured."""
    profile = get_profile(name)
    data = load_dataset(profile)
    batch = data.calibration[:images]
    model = fold_batchnorm(load_checkpoint(profile, checked_path(profile, "model.safetensors")))
    layers = layer_table(model, profile)
    names = list(layers.loc[layers["searchable"], "name"])
    generator = torch.Generator().manual_seed(0)
    exact, image_error = curvature.hessian_traces(model, names, batch, combinations=None, generator=generator)
    ours, seconds = [], []
    for seed in range(REPEATS):
        generator, started = torch.Generator().manual_seed(seed), time.perf_counter()
        ours.append(curvature.hessian_traces(model, names, batch, generator=generator)[0])
        seconds.append(time.perf_counter() - started)
    target = np.std(ours, axis=0, ddof=1)
    _check("ours", np.mean(ours, axis=0), target / REPEATS**0.5, exact)
    result = {
        "images": images,
        "probes": probes,
        "layers": len(names),
        "seconds": float(np.median(seconds)),
        "relative standard error of probing": float(np.median(target / exact)),
        "relative standard error over images": float(np.median(image_error / exact)),
    }
    others = {"curvlinops": with_curvlinops, "pyhessian": with_pyhessian}
    needed = dict.fromkeys(others, 0.0)
    for layer, error, truth in zip(names, target, exact, strict=True):
        weight = model.get_submodule(layer).weight
        found, spent = {}, {}
        for label, estimate in others.items():
            estimate(model, weight, batch, 1)  # so that nothing is timed that happens once
            torch.manual_seed(0)
            started = time.perf_counter()
            found[label] = estimate(model, weight, batch, probes)
            spent[label] = (time.perf_counter() - started) / probes
            _check(f"{label}, {layer}", found[label].mean(), found[label].std(ddof=1) / probes**0.5, truth)
        variance = np.mean([values.var(ddof=1) for values in found.values()])  # both draw the same kind of probe
        for label in others:
            needed[label] += variance / error**2 * spent[label]
    for label, total in needed.items():
        result[label] = {"seconds at equal error": total, "ratio": total / result["seconds"]}
    result["seconds of all statistics"] = manifest_of(profile)[STATISTICS]["costs"]
    result["hardware"] = hardware()
    return result


def _check(label: str, estimate: np.ndarray, error: np.ndarray, truth: np.ndarray) -> None:
    """Stop unless an estimate lies within six of its standard errors of the truth."""
    if (np.abs(estimate - truth) > 6 * error).any():
        raise SystemExit(f"{label}: {estimate} is not the trace {truth}: nothing was timed.")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cifar10-resnet20")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--probes", type=int, default=12, help="of the other libraries, per layer")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[options.profile] = run(options.profile, images=options.images, probes=options.probes)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(json.dumps(results[options.profile], indent=1))


if __name__ == "__main__":
    main()
