"""Which file of a study is made from what: its inputs, the settings of the profile and the code that decide it."""

from __future__ import annotations

from dataclasses import dataclass

MODEL, LAYERS, BENCH, CHECKS = "model.safetensors", "layers.csv", "bench.parquet", "checks.csv"
STATISTICS, SCORES, TABLES, HELDOUT = "statistics.safetensors", "proxies.parquet", "proxies.json", "heldout.csv"
EVOLUTION_LOG, SEARCHES, ENUMERATION = "evolution.jsonl", "searches.csv", "enumeration.jsonl"
TRANSFER, CHOICES, COMPARISON, RUNTIMES = "transfer.jsonl", "quantization.csv", "comparison.parquet", "runtimes.csv"

NEUTRAL = (  # how files are kept and work is shared changes no number, which the tests check
    "book.places",
    "book.studies.files",
    "book.studies.origins",
    "book.studies.roundings",
    "book.studies.study",
    "book.studies.workers",
    "emq_lib.bench.engine",
    "emq_lib.bench.remote",
    "emq_lib.core.checks",
    "emq_lib.core.errors",
    "emq_lib.core.files",
    "emq_lib.core.journal",
    "emq_lib.core.profiles",
    "emq_lib.core.sources",
)
DECIDES_ROWS = (  # of the bench; what is called as a method stands here by name
    "book.studies.networks:layer_table",
    "book.studies.rows:row_of",
    "emq_lib.bench.engine:judged",
    "emq_lib.core.bank:WeightBank",
    "emq_lib.core.bank:build_weight_bank",
    "emq_lib.core.datasets:Split.inputs",
    "emq_lib.core.graphs:fold_batchnorm",
    "emq_lib.core.networks:QuantizedNetwork",
    "emq_lib.core.quantizers:choose_activation_ranges",
)
_METHODS = (
    "emq_lib.core.datasets:Split.inputs",
    "emq_lib.core.profiles:Profile.rng",
    "emq_lib.core.profiles:Profile.seed_of",
)
_LAYERS = ("choices", "pinned", "tied")
_ROWS = (*_LAYERS, "activation_bits", "bench_images", "calibration_images", "seed")
_SAMPLES = ("bench_configs", "stratified_configs", "one_bit_configs")
_SCORES = ("book.studies.proxies:build_proxies", "emq_lib.proxies.handmade")  # a registry that decorators fill
_SEARCHED = (MODEL, LAYERS, BENCH, STATISTICS)
_SEARCH = ("book.studies.evolution:_build", "book.studies.methods:searches", "book.studies.methods:transfers")


@dataclass(frozen=True)
class File:
    """One file of a study.

    Attributes:
        name: inside the study's folder.
        builder: "module:function" that makes it.
        inputs: the files of the study that it is computed from; one that is absent when it is made counts too.
        settings: fields of the profile that decide it, beyond those that decide its inputs.
        decided_by: what decides its numbers where it is not all that the builder does.
    """

    name: str
    builder: str
    inputs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    decided_by: tuple[str, ...] = ()

    @property
    def code(self) -> tuple[str, ...]:
        """What decides its numbers, as :func:`emq_lib.core.sources.code_hash` takes it, beside :data:`NEUTRAL`."""
        return (*(self.decided_by or (self.builder,)), *_METHODS)


FILES = {  # in an order in which they can be made
    file.name: file
    for file in (
        File(
            MODEL,
            "book.studies.checkpoints:build_checkpoint",
            (),
            ("dataset", "model", "seed", "training", "validation_images"),
        ),
        File(LAYERS, "book.studies.bench:build_bench", (MODEL,), _LAYERS, ("book.studies.networks:layer_table",)),
        File(
            BENCH,
            "book.studies.bench:build_bench",
            (MODEL, LAYERS),
            (*_ROWS, *_SAMPLES),
            ("book.studies.bench:build_bench", *DECIDES_ROWS),
        ),
        File(
            CHECKS,
            "book.studies.checks:build_checks",
            (MODEL, LAYERS, BENCH),
            _ROWS,
            ("book.studies.checks:build_checks", *DECIDES_ROWS),
        ),
        File(
            STATISTICS,
            "book.studies.proxies:build_statistics",
            (MODEL,),
            (*_LAYERS, "calibration_images", "seed"),
        ),
        File(SCORES, "book.studies.proxies:build_proxies", (MODEL, BENCH, STATISTICS), _LAYERS, _SCORES),
        File(TABLES, "book.studies.proxies:build_proxies", (MODEL, BENCH, STATISTICS), _LAYERS, _SCORES),
        File(
            EVOLUTION_LOG,
            "book.studies.evolution:build_evolution",
            _SEARCHED,
            ("evolution", "quantizer", "seed"),
            _SEARCH,
        ),
        File(
            SEARCHES,
            "book.studies.evolution:build_searches",
            (*_SEARCHED, EVOLUTION_LOG),
            ("quantizer",),
        ),
        File(
            TRANSFER,
            "book.studies.evolution:build_transfer",
            (),
            ("calibration_images", "evolution", "quantizer", "seed"),
            _SEARCH,
        ),
        File(
            ENUMERATION,
            "book.studies.evolution:build_enumeration",
            _SEARCHED,
            ("evolution", "quantizer", "seed"),
        ),
        File(
            HELDOUT,
            "book.studies.heldout:build_heldout",
            (*_SEARCHED, SCORES, TABLES, EVOLUTION_LOG, TRANSFER),
            ("quantizer", "seed"),
        ),
        File(
            CHOICES,
            "book.studies.allocation:build_quantization",
            (*_SEARCHED, SCORES, TABLES, EVOLUTION_LOG, SEARCHES, TRANSFER),
            (*_ROWS, "budgets", "quantizer"),
            (
                "book.studies.allocation:build_quantization",
                "book.studies.heldout:load_tables",
                "book.studies.heldout:load_searched",
                *DECIDES_ROWS,
            ),
        ),
        File(
            COMPARISON,
            "book.studies.quantization:build_comparison",
            (MODEL, LAYERS, BENCH, CHOICES),
            (*_ROWS, "quantizer"),
            (
                "book.studies.quantization:build_comparison",
                "book.studies.quantization:IN_FULL",
                *DECIDES_ROWS,
            ),
        ),
        File(RUNTIMES, "book.studies.runtimes:build_runtimes", (MODEL, CHOICES), (*_ROWS, "quantizer")),
    )
}
