"""The exported files outside PyTorch: whether onnxruntime predicts the same, and whether it gets faster.

Explained in chapter 05.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time

import numpy as np
import onnxruntime
import pandas as pd
import torch

from book.studies.allocation import load_quantization
from book.studies.files import RUNTIMES
from book.studies.means import mean_with_interval
from book.studies.networks import build_network, fresh_model, load_folded
from book.studies.study import load_table, new_file, sole_writer
from emq_lib.core.configs import bits_text, parse_bits
from emq_lib.core.datasets import ImageData, Split
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import Profile
from emq_lib.quantization import onnx_export
from emq_lib.quantization.packed import load_network, save_network

MIXED, AVERAGE, WIDE = "evolved for allocation", 2.5, (4, 8)
ROUNDS, CALLS, BATCHES = 30, 10, (1, 32)


def run_onnx(path: pathlib.Path, images: Split, *, optimized: bool, batch_size: int = 500) -> torch.Tensor:
    """Return the logits (N, classes) that onnxruntime computes on the CPU.

    Args:
        path: an ONNX file of :func:`emq_lib.quantization.onnx_export.save_onnx`.
        images: the images.
        optimized: whether onnxruntime may rewrite the graph, which moves roundings.
        batch_size: images per call.
    """
    session = _session(path, optimized=optimized)
    parts = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    return torch.cat([torch.from_numpy(session.run(None, _feed(part))[0]) for part in parts])


def _session(path: pathlib.Path, *, optimized: bool) -> onnxruntime.InferenceSession:
    """Return a session of one thread, so that timings are those of the arithmetic."""
    levels, options = (onnxruntime.GraphOptimizationLevel, onnxruntime.SessionOptions())
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feed(images: Split) -> dict[str, np.ndarray]:
    return {"images": images.inputs().contiguous().numpy()}


def build_runtimes(profile: Profile, data: ImageData) -> None:
    """Export some configurations, compare predictions on all test images, time onnxruntime; write ``runtimes.csv``.

    Float, uniform 8 and 4 bits, and the choice of the evolved proxy at 2.5 bits on average. Columns network, bits
    (text), top1, file_bytes (ONNX), packed_bytes, images; how many images get PyTorch's class from the packed file
    (same_packed), from ONNX with exact sums (same_exact), from ONNX with scales in the QDQ nodes (same_qdq) and from
    that after graph optimizations (same_optimized); and for each batch size ms (per image), ratio (to float) and its
    95 % interval over rounds in which all networks take turns.

    Args:
        profile: the study; ``quantization.csv`` must exist.
        data: its images.
    """
    started = time.perf_counter()
    choices = load_quantization(profile).query("proxy == @MIXED and average_bits == @AVERAGE")
    mixed = parse_bits(choices["bits"].iloc[0])
    wide = dataclasses.replace(profile, choices=tuple(sorted({*profile.choices, *WIDE})))
    network, _ = build_network(wide, data)
    slots, example = network.bank.slot_count, data.test[:1].inputs()
    configs = {f"{width} bits": (width,) * slots for width in sorted(WIDE, reverse=True)} | {
        f"{MIXED}, {AVERAGE}": mixed
    }
    with sole_writer(profile), tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        plain = load_folded(profile, "cpu")
        files = {"float": root / "float.onnx"}
        onnx_export.save_onnx(files["float"], plain, example)
        truth = predict(plain, data.test)
        rows = [{"network": "float", "bits": "", **_agreement({"optimized": files["float"]}, truth, data.test)}]
        for name, config in configs.items():
            network.select(config)
            files[name], exact, packed = (root / f"{bits_text(config)}.{kind}" for kind in ("qdq", "exact", "packed"))
            onnx_export.save_onnx(files[name], network, example)
            onnx_export.save_onnx(exact, network, example, exact=True)
            save_network(packed, network)
            truth = predict(network, data.test)
            again = predict(load_network(packed, fresh_model(profile)), data.test)
            found = _agreement({"exact": exact, "qdq": files[name], "optimized": files[name]}, truth, data.test)
            facts = {"network": name, "bits": bits_text(config), "packed_bytes": packed.stat().st_size}
            rows.append(facts | {"same_packed": int((again == truth).all(dim=1).sum())} | found)
        table = pd.DataFrame(rows).assign(file_bytes=[files[row["network"]].stat().st_size for row in rows])
        for batch in BATCHES:
            timed = _time(files, data.test[:batch])
            table = table.merge(timed.add_suffix(f"_{batch}"), left_on="network", right_index=True)
    note = f"onnxruntime {onnxruntime.__version__}, one thread"
    with new_file(profile, RUNTIMES, seconds=time.perf_counter() - started, rows=len(table), note=note) as path:
        table.to_csv(path, index=False)


def load_runtimes(profile: Profile) -> pd.DataFrame:
    """Return the study's table of :func:`build_runtimes`."""
    times = (f"{what}_{batch}" for what in ("ms", "ratio", "lo", "hi") for batch in BATCHES)
    cells = {"network": str, "bits": str | None, "top1": float} | dict.fromkeys(times, float)
    cells |= dict.fromkeys(("images", "same_optimized", "file_bytes"), int)
    cells |= dict.fromkeys(("packed_bytes", "same_packed", "same_exact", "same_qdq"), float | None)  # not of the float
    return load_table(profile, RUNTIMES, cells, unique=("network",), keep_default_na=False, na_values=[""])


def _agreement(files: dict[str, pathlib.Path], truth: torch.Tensor, images: Split) -> dict[str, float | int]:
    """Return PyTorch's top-1, and for each way of running how many images get PyTorch's class."""
    wanted = truth.argmax(dim=1)
    found = {"top1": top1(truth, images.labels), "images": len(images)}
    for how, path in files.items():
        logits = run_onnx(path, images, optimized=how == "optimized")
        found[f"same_{how}"] = int((logits.argmax(dim=1) == wanted).sum())
    return found


def _time(files: dict[str, pathlib.Path], images: Split) -> pd.DataFrame:
    """Return milliseconds per image and the ratio to the float network, one row per network, all taking turns."""
    sessions, feed = ({name: _session(path, optimized=True) for name, path in files.items()}, _feed(images))
    spent = []
    for session in sessions.values():
        session.run(None, feed)  # so that nothing is timed that happens once
    for turn in range(ROUNDS):
        for name, session in sessions.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                session.run(None, feed)
            milliseconds = 1e3 * (time.perf_counter() - started) / CALLS / len(images)
            spent.append({"turn": turn, "network": name, "ms": milliseconds})
    table = pd.DataFrame(spent)
    base = table[table["network"] == "float"].set_index("turn")["ms"]
    ratios = mean_with_interval((table["ms"] / table["turn"].map(base)).groupby(table["network"]))
    ratios.columns = ["ratio", "lo", "hi", "rounds"]
    return ratios.drop(columns="rounds").assign(ms=table.groupby("network")["ms"].median())
