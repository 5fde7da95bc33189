"""Data cards: what a study holds, how it was measured, and what it cannot say, computed from its files."""

from __future__ import annotations

import pandas as pd

from book.studies.bench import load_bench, load_layers
from book.studies.study import has_study, manifest_of, read_facts, study_folder
from emq_lib.bench.table import SAMPLES, Bench
from emq_lib.core.errors import MissingArtefactError
from emq_lib.core.profiles import QUANTIZERS, Profile, get_profile
from emq_lib.proxies import intervals, oracles

LICENCE = "tables, checkpoint and this card: CC BY 4.0; code: MIT. Images are not included and keep their own terms."
CITATION = "CITATION.cff of this book, with the profile's name and the commit above"
REPEATABLE = (
    "every file is computed on one thread per process and has the same bytes in any process, whatever the number of "
    "workers; columns of seconds are measurements. On a processor with other instructions, or another version of "
    "PyTorch, the last bits of trained weights, of learned rounding and of statistics may differ, and what follows "
    "from them; accuracies of a given checkpoint and bank are sums of whole numbers and do not."
)
DATASETS = {
    "digits": "scikit-learn's handwritten digits, upsampled to 16 x 16",
    "cifar10": "CIFAR-10, 32 x 32",
    "imagenet": "the reader's own ImageNet, shorter side to 256, the middle 224 x 224",
}


def describe(profile: Profile) -> pd.DataFrame:
    """Return a study's card, columns "what" and "content"; intervals are 95 %.

    A profile without published files gets the rows that its definition alone answers.
    """
    rows = {"network": profile.model, "images": DATASETS[profile.dataset]}
    widths = ", ".join(map(str, profile.choices))
    rows["bits"] = f"weights {widths}; inputs of layers {profile.activation_bits}"
    if profile.pinned:
        rows["pinned"] = ", ".join(f"{name} at {bits}" for name, bits in profile.pinned)
    if profile.tied:
        rows["tied"] = ", ".join(f"{name} to {target}" for name, target in profile.tied)
    if has_study(profile, "layers.csv", "model.safetensors"):
        rows |= _network(profile)
    for quantizer in QUANTIZERS:
        try:
            rows |= _bench(load_bench(profile, quantizer=quantizer))
        except MissingArtefactError:
            continue
    if has_study(profile, "bench.parquet"):
        rows |= _provenance(profile)
    else:
        rows["published"] = "nothing: the profile is defined and tested, its tables are not measured yet"
    rows |= {"limits": limits(profile), "same again": REPEATABLE}
    rows |= {"licence": LICENCE, "cite": CITATION}
    return pd.DataFrame(rows.items(), columns=["what", "content"])


def limits(profile: Profile) -> str:
    """Return in words what a study cannot say."""
    found = ["one network, one training run"]
    if profile.training is not None:
        found[0] += f" of {profile.training.epochs} epochs"
    if profile.bench_images is not None:
        found.append(f"measured on the first {profile.bench_images:,} test images, so close accuracies are not ordered")
    found.append("one width for the inputs of all layers")
    found.append("ranges come from calibration images, not from training with quantization")
    return "; ".join(found) + "."


def _network(profile: Profile) -> dict[str, str]:
    """Describe the network and its checkpoint."""
    layers, facts = (load_layers(profile), read_facts(profile, "model.safetensors"))
    entry = manifest_of(profile)["model.safetensors"]
    kilobytes = (study_folder(profile) / "model.safetensors").stat().st_size / 2**10
    searchable, slots = layers["searchable"].sum(), layers["slot"].max() + 1
    return {
        "layers": f"{len(layers)}, of which {searchable} searchable in {slots} slots",
        "weights": f"{layers['parameters'].sum():,}; {layers['macs'].sum() / 1e6:,.1f} million MACs for one image",
        "float top-1": f"{facts['top1']:.2f} %",
        "checkpoint": f"{kilobytes:,.0f} KiB, epoch {facts['epoch']}; {entry['note']}",
    }


def _bench(bench: Bench) -> dict[str, str]:
    """Describe the rows of one quantizer."""
    table, name = bench.table, bench.quantizer
    counts = table["sample"].value_counts()
    images = int(table["n_a"].iloc[0] + table["n_b"].iloc[0])
    search, heldout = bench.split()
    oracle = oracles.additive_oracle(search.configs, search.half_a, heldout.configs, bench.choices)
    rho = intervals.bootstrap_rho(oracle.predictions, heldout.top1, rng=get_profile(bench.name).rng("card"))
    samples = ", ".join(f"{counts[sample]:,} {sample}" for sample in SAMPLES if sample in counts)
    rows = {f"{name}: rows": f"{samples}; each on {images:,} test images"}
    for sample in ("random", "one-bit"):
        if sample in counts:
            some = bench.select(sample)
            top1, ceiling = (
                some.top1,
                intervals.noise_ceiling(some.half_a, some.half_b, rng=get_profile(bench.name).rng("card")),
            )
            rows[f"{name}, {sample}: top-1"] = (
                f"{top1.min():.1f} to {top1.max():.1f} %, mean {top1.mean():.2f}, "
                f"standard deviation {top1.std(ddof=1):.2f}"
            )
            rows[f"{name}, {sample}: halves agree"] = (
                f"rho {_text(ceiling.halves)}; a perfect proxy would reach {_text(ceiling.perfect)}"
            )
    return rows | {f"{name}: additive oracle": f"rho {_text(rho)}, held-out half of the random ones"}


def _text(estimate: intervals.RankEstimate) -> str:
    return f"{estimate.value:.3f} [{estimate.lo:.3f}, {estimate.hi:.3f}], n = {estimate.n}"


def _provenance(profile: Profile) -> dict[str, str]:
    """Say how the bench was made."""
    manifest = manifest_of(profile)
    entry = manifest["bench.parquet"]
    training, measuring = (_duration(manifest[name]["seconds"]) for name in ("model.safetensors", "bench.parquet"))
    return {
        "made by": f"{entry['command']} at commit {entry['commit']}, seed {entry['seed']}",
        "time": f"{training} of training, {measuring} of measuring",
        "device": f"{entry['device']}; torch {entry['versions']['torch']}",
    }


def _duration(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
