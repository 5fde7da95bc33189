"""Which file of a study is made from what: its inputs, the settings of the profile and the code that decide it."""

from __future__ import annotations

from dataclasses import dataclass

MODEL, LAYERS, BENCH, CHECKS = "model.safetensors", "layers.csv", "bench.parquet", "checks.csv"
STATISTICS, SCORES, TABLES, HELDOUT = "statistics.safetensors", "proxies.parquet", "proxies.json", "heldout.csv"
EVOLUTION_LOG, SEARCHES, ENUMERATION = "evolution.jsonl", "searches.csv", "enumeration.jsonl"
TRANSFER, CHOICES, COMPARISON, RUNTIMES = "transfer.jsonl", "quantization.csv", "comparison.parquet", "runtimes.csv"

_NETWORK = ("dataset", "model", "seed", "validation_images")
_LAYERS = ("choices", "pinned", "tied")
_ROUNDED = (*_LAYERS, "activation_bits", "calibration_images")
DECIDES_ROWS = (
    "emq_lib.core.graphs:fold_batchnorm",
    "emq_lib.core.quantizers:quantize",
    "emq_lib.core.quantizers:choose_activation_ranges",
    "emq_lib.core.networks:QuantizedLayer.forward",
    "book.studies.rows:row_of",
)
_STATISTICS = ("emq_lib.proxies.layer_statistics:measure_statistics", "emq_lib.proxies.released:measure_released")
_SEARCH = ("emq_lib.evolution.search", "emq_lib.evolution.fitness", "emq_lib.evolution.evaluator:Evaluator")


@dataclass(frozen=True)
class File:
    """One file of a study.

    Attributes:
        name: inside the study's folder.
        inputs: the files of the study that it is computed from; those that are absent when it is made do not count.
        settings: fields of the profile that decide it.
        code: what decides its numbers, as :func:`emq_lib.core.sources.code_hash` takes it. The engine around that code
            does not count: how work is shared changes no number, which the tests check.
    """

    name: str
    inputs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


FILES = {
    file.name: file
    for file in (
        File(MODEL, (), (*_NETWORK, "training"), ("emq_lib.core.training:train", "emq_lib.core.models:MODELS")),
        File(LAYERS, (MODEL,), ("pinned", "tied"), ("emq_lib.core.graphs:describe_layers",)),
        File(BENCH, (MODEL, LAYERS), (*_ROUNDED, "bench_images"), (*DECIDES_ROWS, "emq_lib.quantization.adaround")),
        File(CHECKS, (MODEL, BENCH), _ROUNDED, (*DECIDES_ROWS, "emq_lib.quantization.brecq:reconstruct_in_order")),
        File(STATISTICS, (MODEL,), (*_LAYERS, "calibration_images", "seed"), _STATISTICS),
        File(SCORES, (BENCH, STATISTICS), ("choices",), ("emq_lib.proxies.handmade", "emq_lib.proxies.scores")),
        File(TABLES, (STATISTICS,), ("choices",), ("emq_lib.proxies.handmade",)),
        File(
            EVOLUTION_LOG,
            (MODEL, BENCH, STATISTICS),
            ("evolution", "seed"),
            (*_SEARCH, "book.studies.evolution:METHODS"),
        ),
        File(TRANSFER, (), ("evolution", "seed"), (*_SEARCH, "book.studies.evolution:TRANSFERRED")),
        File(
            ENUMERATION, (MODEL, BENCH, STATISTICS), ("evolution", "seed"), (*_SEARCH, "book.studies.evolution:SMALL")
        ),
        File(SEARCHES, (EVOLUTION_LOG, BENCH, STATISTICS), (), ("book.studies.evolution:build_searches",)),
        File(
            HELDOUT,
            (BENCH, STATISTICS, TABLES, EVOLUTION_LOG, TRANSFER),
            ("seed",),
            ("book.studies.heldout", "emq_lib.proxies.ranking", "emq_lib.proxies.intervals", "emq_lib.proxies.oracles"),
        ),
        File(
            CHOICES,
            (MODEL, BENCH, STATISTICS, TABLES, EVOLUTION_LOG, TRANSFER, SEARCHES),
            (*_ROUNDED, "budgets", "bench_images", "seed"),
            (*DECIDES_ROWS, "book.studies.allocation:choose_configurations"),
        ),
        File(
            COMPARISON,
            (MODEL, BENCH, CHOICES),
            (*_ROUNDED, "bench_images", "seed"),
            (
                *DECIDES_ROWS,
                "emq_lib.quantization.adaround",
                "emq_lib.quantization.brecq",
                "emq_lib.quantization.qat",
            ),
        ),
        File(RUNTIMES, (MODEL, CHOICES), _ROUNDED, (*DECIDES_ROWS, "emq_lib.quantization.onnx_export")),
    )
}
