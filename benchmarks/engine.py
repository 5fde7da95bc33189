"""Configurations per second: the bank and the shared prefixes of `emq_lib.bench.engine` against the plain way.

The plain way is what the released code does: for every configuration, search the range of every layer's weight, round
it, and run the network with its batch norms in place. Both see the same images in the same process, and their answers
are compared.

    python benchmarks/engine.py --profile cifar10-resnet20

writes ``benchmarks/engine.json``, one entry per profile, and with ``--device cuda`` one more for the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from distributed import LocalCluster
from torch import nn

from book.studies import networks
from book.studies.images import load_dataset
from book.studies.networks import layer_table, load_checkpoint
from book.studies.study import checked_path
from emq_lib.bench import remote, sampling
from emq_lib.bench.engine import BLOCK
from emq_lib.core import quantizers
from emq_lib.core.datasets import Split
from emq_lib.core.models import predict
from emq_lib.core.profiles import get_profile

RESULTS = pathlib.Path(__file__).with_suffix(".json")
DIFFERENT = 3e-3  # share of answers that may differ: an 8-bit code within a float sum's rounding of the next one flips


def plain(profile, ranges: dict, split: Split, layers, configs: np.ndarray) -> np.ndarray:
    """Return the predicted classes (N, images), every configuration quantized and run from the start."""
    predicted = np.empty((len(configs), len(split)), dtype=np.int64)
    for row, config in enumerate(configs):
        model = load_checkpoint(profile, checked_path(profile, "model.safetensors")).to(split.images.device)
        for layer in layers.itertuples():
            bits = int(config[layer.slot]) if layer.searchable else layer.pinned_bits
            module = model.get_submodule(layer.name)
            module.weight.data = quantizers.fake_quantize(module.weight.data, bits)
            module.register_forward_pre_hook(_torchs_fake_quantize(ranges[layer.name]))
        predicted[row] = predict(model, split).argmax(dim=1).cpu().numpy()
    return predicted


def _torchs_fake_quantize(activation_range: quantizers.ActivationRange) -> Callable:
    scale, zero, top = activation_range.scale, activation_range.zero_point, 2**activation_range.bits - 1

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, 0, top),)

    return hook


def engine(profile, data, split: Split, configs: np.ndarray, scheduler: str | None = None) -> np.ndarray:
    """Return whether each image is classified correctly (N, images), bank and ranges built first."""
    network, _ = networks.build_network(profile, data)
    blocks = remote.measure_anywhere(profile, network, split, configs, scheduler)
    found = {item.config: item.correct for block in blocks for item in block}
    return np.stack([found[tuple(map(int, config))] for config in configs])


def two_workers(profile, data, split: Split, configs: np.ndarray) -> tuple[float, np.ndarray]:
    """Return wall seconds and the answers of two started workers of one thread each, which build the network first."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        engine(profile, data, split[:1], configs[: 2 * BLOCK], cluster.scheduler_address)  # they import
        return timed(engine, profile, data, split, configs, cluster.scheduler_address)


def timed(function: Callable, *arguments: object) -> tuple[float, np.ndarray]:
    """Return wall seconds and the result."""
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def run(
    name: str, device: str, *, images: int, configs: int, growth: tuple[int, ...], workers: int, repeats: int
) -> dict:
    """Check that both ways agree, time them in turn, and return what was measured; two workers on the CPU only."""
    profile = get_profile(name)
    data = load_dataset(profile).to(device)
    split = data.test[:images]
    model = networks.load_folded(profile, device)
    layers = layer_table(model, profile)
    ranges = quantizers.choose_activation_ranges(model, layers, data.calibration, bits=profile.activation_bits)
    slots = layers["slot"].max() + 1
    drawn = sampling.sample_configs(
        slots, profile.choices, max(configs, workers, *growth), rng=profile.rng("benchmark")
    )
    drawn = drawn[len(profile.choices) :]  # random ones only
    few, labels = drawn[:configs], split.labels.cpu().numpy()
    seconds: dict[str, list[float]] = {"plain": [], "engine": []}
    for _ in range(repeats):
        spent, predicted = timed(plain, profile, ranges, split, layers, few)
        seconds["plain"].append(spent)
        spent, correct = timed(engine, profile, data, split, few)
        seconds["engine"].append(spent)
        differ = int(((predicted == labels) != correct).sum())
        if differ > DIFFERENT * correct.size:
            raise SystemExit(f"The two ways disagree on {differ} of {correct.size} answers: nothing was timed.")
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    grown = []
    for count in growth:
        spent, _ = timed(engine, profile, data, split, drawn[:count])
        grown.append({"configurations": count, "seconds": spent, "peak memory so far in MiB": peak_memory()})
    found = {
        "images": len(split),
        "configurations": configs,
        "answers that differ": differ,
        "answers": len(few) * len(split),
        "configurations per second": {way: configs / value for way, value in medians.items()},
        "ratio": medians["plain"] / medians["engine"],
        "seconds of each repeat": seconds,
        "growth": grown,
        "MACs per image": int(layers["macs"].sum()),
        "layers": len(layers),
    }
    if device == "cpu":
        spent, correct = timed(engine, profile, data, split, drawn[:workers])
        shared, distributed = two_workers(profile, data, split, drawn[:workers])
        if not np.array_equal(correct, distributed):
            raise SystemExit("Two workers give other answers than one process.")
        found["two workers"] = {"configurations": workers, "seconds": shared, "seconds of one process": spent}
    return found


def peak_memory() -> float:
    """Return the most memory that this process has held, in MiB; loaded libraries and images count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def hardware(device: str = "cpu") -> dict[str, object]:
    """Describe the machine."""
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """Return the processor's name where the system tells it, else the kind of machine."""
    information = pathlib.Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def main() -> None:
    """Run the benchmark and enter it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="digits-resnet8")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--configs", type=int, default=32)
    parser.add_argument("--growth", type=int, nargs="*", default=(10, 100, 1_000))
    parser.add_argument("--workers", type=int, default=128, help="configurations that two workers share")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("images", "configs", "workers", "repeats")}
    found = run(options.profile, options.device, growth=tuple(options.growth), **sizes)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    name = options.profile if options.device == "cpu" else f"{options.profile} on a GPU"
    results[name] = found | {"hardware": hardware(options.device)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    rates = found["configurations per second"]
    print(f"{name}: {found['ratio']:.1f} x ({rates['engine']:.3f} against {rates['plain']:.3f} per second)")
    print(f"{found['answers that differ']} of {found['answers']} answers differ")


if __name__ == "__main__":
    main()
