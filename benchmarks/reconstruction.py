"""Reconstruction in order (BRECQ): `emq_lib.quantization.brecq` against a plain loop.

Both learn the rounding of the weights of one configuration block after block, on the same batches from the same seed.
The plain loop keeps nothing between steps: for every batch the float network and the quantized blocks before are run
from the images. Ours keeps the inputs and the wanted outputs of the block at hand. First the outcome is compared: the
share of weights rounded the same way, and the mean squared change of the logits. Both grow in proportion to the steps
of a block, so what the paper's settings take is predicted from the measured times.

    python benchmarks/reconstruction.py

writes ``benchmarks/reconstruction.json``, one entry per profile.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from engine import hardware
from torch.func import functional_call

from book.studies.images import load_dataset
from book.studies.networks import build_network, load_folded
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.graphs import segments
from emq_lib.core.models import predict
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.profiles import get_profile
from emq_lib.quantization.adaround import Rounding, learn_rounding
from emq_lib.quantization.brecq import PAPER, Settings, reconstruct_in_order

RESULTS = pathlib.Path(__file__).with_suffix(".json")
AGREEMENT, SIMILAR = 0.98, 0.05  # sums in another order now and then tip a rounding


def plainly(model, layers, config, images, ranges, *, generator, settings) -> QuantizedNetwork:
    """Reconstruct the weights of one configuration, running both networks from the images in every step."""
    model = copy.deepcopy(model).requires_grad_(False)
    pieces = segments(model, list(layers["name"]))
    bank = build_weight_bank(model, layers, sorted(set(map(int, config))))
    widths, weights = bank.widths(config), dict(bank.weights)

    def run(piece, names, rounded, x):
        now = {name: weights[name, widths[name]].dequantize() for name in names} | rounded
        return functional_call(piece, {f"{name}.weight": weight for name, weight in now.items()}, (x,))

    def error(batch, place, rounded):
        exact = changed = batch
        with torch.no_grad():
            for piece, names in pieces[:place]:
                exact, changed = piece(exact), run(piece, names, {}, changed)
            piece, names = pieces[place]
            exact = piece(exact)
        return F.mse_loss(run(piece, names, rounded, changed), exact)

    inputs = images.inputs()
    for place, (_, names) in enumerate(pieces):
        free = {
            name: Rounding(model.get_submodule(name).weight, widths[name]) for name in names if name in bank.searchable
        }
        if not free:
            continue
        with torch.no_grad():
            worst = np.mean([error(part, place, {}).item() for part in inputs.split(256)])

        def step(rounded, place=place, free=free):
            rows = torch.randint(len(inputs), (settings.batch,), generator=generator)
            return error(inputs[rows], place, dict(zip(free, rounded, strict=True)))

        learn_rounding(list(free.values()), step, float(worst), settings.iterations)
        weights |= {(name, widths[name]): rounding.hardened() for name, rounding in free.items()}
    return QuantizedNetwork(model, dataclasses.replace(bank, weights=weights), ranges).select(config)


def run(name: str, *, iterations: tuple[int, int]) -> dict:
    """Compare, time, and return what was measured."""
    profile = get_profile(name)
    data = load_dataset(profile)
    network, layers = build_network(profile, data)
    model, images = load_folded(profile, "cpu"), data.calibration
    config = [profile.choices[slot % len(profile.choices)] for slot in range(network.bank.slot_count)]
    exact, few, found = predict(model, images), min(iterations), {}
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for steps in (1, *iterations):  # the first so that nothing is timed that happens once
        settings = Settings(iterations=steps, activation_iterations=0)
        for label, reconstruct in (("plain", plainly), ("ours", reconstruct_in_order)):
            generator, started = torch.Generator().manual_seed(0), time.perf_counter()
            found[label] = reconstruct(
                model, layers, config, images, network.activation_ranges, generator=generator, settings=settings
            )
            if steps > 1:
                seconds[label].append(time.perf_counter() - started)
        if steps == few:
            agreement = check(found, exact, images)
    rate = {label: (spent[1] - spent[0]) / (iterations[1] - iterations[0]) for label, spent in seconds.items()}
    fixed = {label: spent[0] - iterations[0] * rate[label] for label, spent in seconds.items()}
    whole = {label: fixed[label] + PAPER.iterations * rate[label] for label in rate}
    return {
        "images": len(images),
        "iterations": list(iterations),
        "seconds": seconds,
        "milliseconds per step of all blocks": {label: 1e3 * value for label, value in rate.items()},
        "same roundings": agreement,
        "predicted hours at the paper's iterations": {label: value / 3600 for label, value in whole.items()},
        "ratio": seconds["plain"][1] / seconds["ours"][1],
        "ratio at the paper's iterations": whole["plain"] / whole["ours"],
        "hardware": hardware(),
    }


def check(found: dict[str, QuantizedNetwork], exact: torch.Tensor, images) -> float:
    """Return the share of weights that both rounded alike; stop if it or the change of the logits differs too much."""
    codes = {
        label: torch.cat([layer.weight.codes.flatten() for layer in network.layers.values()])
        for label, network in found.items()
    }
    alike = (codes["plain"] == codes["ours"]).double().mean().item()
    change = {label: (predict(network, images) - exact).square().mean().item() for label, network in found.items()}
    if alike < AGREEMENT or abs(change["plain"] / change["ours"] - 1) > SIMILAR:
        raise SystemExit(f"{alike:.4f} of the weights are rounded alike, logits change by {change}: not the same.")
    return alike


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cifar10-resnet20")
    parser.add_argument("--iterations", type=int, nargs=2, default=(20, 100), help="of two runs: a line through both")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[options.profile] = run(options.profile, iterations=tuple(options.iterations))
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(json.dumps(results[options.profile], indent=1))


if __name__ == "__main__":
    main()
