"""The bench of a study: its configurations measured, and its layer table.

Explained in chapter 01.
"""

from __future__ import annotations

import dataclasses
import time
import warnings

import numpy as np
import pandas as pd

from book.studies.networks import build_network
from book.studies.roundings import remove_roundings
from book.studies.rows import PARTIAL, measure_resumably
from book.studies.study import checked_path, new_file, seconds_of, sole_writer, study_folder
from emq_lib.bench.sampling import one_bit_configs, one_off_configs, sample_configs, stratified_configs
from emq_lib.bench.table import BENCH, COLUMNS, LAYERS, MEASURED, Bench, read_bench, read_layers
from emq_lib.core.configs import bits_text
from emq_lib.core.costs import bops_cost, size_cost
from emq_lib.core.datasets import ImageData
from emq_lib.core.errors import CorruptArtefactError, MissingArtefactError
from emq_lib.core.files import vouched_path
from emq_lib.core.profiles import QUANTIZERS, Profile, get_profile


def design(profile: Profile, layers: pd.DataFrame) -> pd.DataFrame:
    """Return the configurations of a profile's bench, columns sample and bits; no configuration stands twice.

    Samples: "uniform", "random", "one-off" (one layer of the middle uniform configuration changed), "stratified"
    (evenly spread in size) and, if the profile asks for it and rounding is learned, "one-bit" (one to three layers at
    1 bit, the others random).
    """
    size = size_cost(layers, profile.choices)
    slots = len(size.table)
    random = sample_configs(slots, profile.choices, profile.bench_configs, rng=profile.rng("bench"))
    samples = {"uniform": random[: len(profile.choices)], "random": random[len(profile.choices) :]}
    samples["one-off"] = one_off_configs(slots, profile.choices)
    taken = np.concatenate(list(samples.values()))
    samples["stratified"] = stratified_configs(
        size, profile.choices, profile.stratified_configs, rng=profile.rng("stratified"), exclude=taken
    )
    if widths(profile) != profile.choices:
        count, rng = profile.one_bit_configs, profile.rng("one-bit")
        samples["one-bit"] = one_bit_configs(slots, profile.choices, count, rng=rng)
    rows = pd.DataFrame([(sample, config) for sample, configs in samples.items() for config in configs])
    rows.columns = ["sample", "bits"]
    return rows[~rows["bits"].map(bits_text).duplicated()].reset_index(drop=True)


def widths(profile: Profile) -> tuple[int, ...]:
    """Return the widths that a profile's bench measures: its choices, and 1 bit if it has the sample "one-bit"."""
    wider = profile.quantizer == "adaround" and profile.one_bit_configs > 0
    return tuple(sorted({1, *profile.choices})) if wider else profile.choices


def build_bench(
    profile: Profile, data: ImageData, *, quantizer: str | None = None, scheduler: str | None = None
) -> None:
    """Measure the profile's configurations on test images; write ``layers.csv`` and ``bench.parquet``.

    Can be interrupted and called again: see :func:`book.studies.rows.measure_resumably`. Rows of an earlier bench that
    still hold are taken over, so a profile that asks for more configurations extends what is there. Rows of other
    quantizers stay.

    Args:
        profile: the study; its checkpoint must exist.
        data: its images.
        quantizer: "rtn" or "adaround"; by default the profile's.
        scheduler: address of a ``dask.distributed`` scheduler; by default this process measures.

    Raises:
        StudyBusyError: another run is writing the study.
        DiskFullError: no room; what was measured is kept.
    """
    profile = dataclasses.replace(profile, quantizer=quantizer or profile.quantizer)
    with sole_writer(profile) as folder:
        started = time.perf_counter()
        choices = widths(profile)
        network, layers = build_network(dataclasses.replace(profile, choices=choices), data, folder=folder)
        preparation = time.perf_counter() - started
        rows = design(profile, layers)
        configs = np.stack(rows["bits"].to_numpy())
        before, seconds_before = _present_table(profile)
        known = before.dropna(subset="key").set_index("key")[list(MEASURED)].to_dict("index") if "key" in before else {}
        measured, seconds = measure_resumably(
            profile, network, data, configs, images=profile.bench_images, known=known, scheduler=scheduler
        )
        size = size_cost(layers, choices)
        bit_operations = bops_cost(layers, choices, activation_bits=profile.activation_bits)
        table = measured.assign(
            config_id=rows["bits"].map(bits_text),
            quantizer=profile.quantizer,
            sample=rows["sample"],
            bits=list(configs),
            size_bytes=size.total(configs, choices).astype(np.int64),
            bops=bit_operations.total(configs, choices).astype(np.int64),
        )
        others = before[before["quantizer"] != profile.quantizer]
        tables = [table, others] if profile.quantizer == QUANTIZERS[0] else [others, table]
        table = pd.concat([part for part in tables if len(part)])  # an empty one would take the columns' types away
        seconds += preparation + seconds_before
        with new_file(profile, LAYERS, seconds=0.0, rows=len(layers)) as path:
            layers.to_csv(path, index=False)
        with new_file(profile, BENCH, seconds=seconds, rows=len(table)) as path:
            table[list(COLUMNS)].to_parquet(path, index=False)
        (folder / PARTIAL).unlink(missing_ok=True)
        remove_roundings(folder)


def _present_table(profile: Profile) -> tuple[pd.DataFrame, float]:
    """Return the study's present bench, all quantizers, and the wall time it took; an empty one if there is none.

    It may be out of date: its rows are taken over one by one, those whose keys still hold.
    """
    try:
        table = read_bench(vouched_path(study_folder(profile), BENCH))
    except MissingArtefactError:
        return pd.DataFrame(columns=list(COLUMNS)), 0.0
    except CorruptArtefactError as error:
        warnings.warn(f"{error} Its rows are measured anew.", stacklevel=2)
        return pd.DataFrame(columns=list(COLUMNS)), 0.0
    return table, seconds_of(profile, BENCH)


def load_bench(profile: Profile | str, quantizer: str | None = None) -> Bench:
    """Load a study's bench after checking it against the manifest.

    Args:
        profile: the study or its name.
        quantizer: "rtn" or "adaround"; by default the profile's.

    Raises:
        UnknownProfileError: no such profile.
        MissingArtefactError: the bench was not built, or not with this quantizer.
        CorruptArtefactError, StaleArtefactError: the file is truncated, altered or out of date.
    """
    profile = get_profile(profile) if isinstance(profile, str) else profile
    checked_path(profile, BENCH)
    return Bench.read(study_folder(profile), quantizer or profile.quantizer)


def load_layers(profile: Profile) -> pd.DataFrame:
    """Return the study's layer table."""
    return read_layers(checked_path(profile, LAYERS))
