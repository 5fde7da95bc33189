"""What cannot be measured, sampled or looked up is refused by name, at once, and nothing is changed."""

import dataclasses
import hashlib

import numpy as np
import pandas as pd
import pytest
import torch

from book.studies.bench import load_bench, load_layers
from book.studies.networks import build_network
from emq_lib.bench import engine
from emq_lib.bench.engine import measure, planned_macs
from emq_lib.bench.remote import measure_anywhere
from emq_lib.bench.sampling import one_bit_configs, one_off_configs, sample_configs, stratified_configs
from emq_lib.bench.table import read_bench
from emq_lib.core.costs import CostTable, size_cost
from emq_lib.core.datasets import Split
from emq_lib.core.errors import (
    ConfigLengthError,
    ConfigNotFoundError,
    CorruptArtefactError,
    EMQError,
    InfeasibleBudgetError,
    InvalidBitsError,
    InvalidParameterError,
    InvalidScoreError,
    UnsupportedModelError,
)

CONFIG = [3, 3, 3, 3, 3, 3]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def measurable(built_study, profile, data):
    """Return the digits' quantized network and ten of the test images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMQ_STUDY_ROOT", str(built_study))
        return build_network(profile, data)[0], data.test[:10]


def _labelled(label):
    return lambda split: dataclasses.replace(split, labels=torch.tensor([0] * 9 + [label]))


IMAGES = {
    "none": (lambda split: split[:0], "no images"),
    "three channels": (
        lambda split: Split(split.images.repeat(1, 3, 1, 1), split.labels, split.mean.repeat(3), split.std.repeat(3)),
        r"does not take images of shape \(3, 16, 16\)",
    ),
    "label 10": (_labelled(10), r"shape \(1, 10\); they lie in 0 to 10"),
    "label 99": (_labelled(99), "0 to 99"),
    "label 2**40": (_labelled(2**40), "0 to 1099511627776"),
    "label -1": (_labelled(-1), "-1 to 0"),
    "label -100": (_labelled(-100), "-100 to 0"),
    "std 0": (lambda split: dataclasses.replace(split, std=torch.zeros(1)), "std of the images must be positive"),
    "mean NaN": (
        lambda split: dataclasses.replace(split, mean=torch.tensor([NAN])),
        "mean of the images must be finite",
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_cannot_be_measured(measurable, case):
    network, split = measurable
    change, message = IMAGES[case]
    with pytest.raises(InvalidParameterError, match=message):
        measure(network, change(split), [CONFIG])
    with pytest.raises(InvalidParameterError, match=message):
        next(measure_anywhere(network, change(split), [CONFIG], scheduler="tcp://127.0.0.1:1"))  # which nobody calls
    assert not any(layer._forward_hooks for layer in network.layers.values())


@pytest.mark.parametrize("batch_size", [-1, 0, -25, 2.5, NAN, "5", True, [5], 10**400 * 0])
def test_batch_sizes_that_are_none(measurable, batch_size):
    with pytest.raises(InvalidParameterError, match="batch_size must be a whole number, 1 or more"):
        measure(*measurable, [CONFIG], batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 9, 10, 11, 10_000, np.int64(4)])
def test_any_batch_size_gives_the_same_answers(measurable, batch_size):
    ((expected,),) = measure(*measurable, [CONFIG])
    ((found,),) = measure(*measurable, [CONFIG], batch_size=batch_size)
    np.testing.assert_array_equal(found.correct, expected.correct)
    assert found.loss == expected.loss


CONFIGS = {
    "empty list": ([], EMQError),
    "no rows": (np.empty((0, 6), dtype=np.int8), InvalidParameterError),
    "short": ([[3, 3]], ConfigLengthError),
    "long": ([[3] * 7], ConfigLengthError),
    "three axes": ([[CONFIG]], ConfigLengthError),
    "a number": (3, ConfigLengthError),
    "ragged": ([CONFIG, [3]], ConfigLengthError),
    "8 bits": ([[3, 3, 3, 3, 3, 8]], InvalidBitsError),
    "0 bits": ([[0] * 6], InvalidBitsError),
    "-3 bits": ([[-3] * 6], InvalidBitsError),
    "2.5 bits": ([[2.5] * 6], InvalidBitsError),
    "NaN": ([[NAN] * 6], InvalidBitsError),
    "10**30": ([[10**30] * 6], InvalidBitsError),
    "text": ([["3"] * 6], InvalidBitsError),
    "one text": ("333333", InvalidBitsError),
    "None": ([[None] * 6], InvalidBitsError),
    "truth values": ([[True] * 6], InvalidBitsError),
    "complex": ([[3 + 0j] * 6], InvalidBitsError),
    "doubled": ([CONFIG, [2] * 6, CONFIG], InvalidParameterError),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_cannot_be_measured(measurable, case):
    configs, error = CONFIGS[case]
    with pytest.raises(error):
        measure(*measurable, configs)


def test_logits_that_are_none_are_not_counted_as_wrong(measurable, monkeypatch):
    network, split = measurable
    run = engine._Engine._run
    for value in (NAN, INF):
        odd = lambda *args, value=value: run(*args).clone().index_fill_(1, torch.tensor([4]), value)  # noqa: E731
        monkeypatch.setattr(engine._Engine, "_run", odd)
        with pytest.raises(UnsupportedModelError, match="NaN or infinite under the configurations.*333333"):
            list(measure(network, split, [CONFIG]))


def _rng():
    return np.random.default_rng(0)


COST = CostTable("size", "bytes", 0.0, np.arange(18.0).reshape(6, 3) + 1)
SAMPLERS = {
    "random": lambda slots=6, choices=(2, 3, 4), count=5, rng=None: sample_configs(
        slots, choices, count, rng=_rng() if rng is None else rng
    ),
    "one-bit": lambda slots=6, choices=(2, 3, 4), count=5, rng=None: one_bit_configs(
        slots, choices, count, rng=_rng() if rng is None else rng
    ),
    "stratified": lambda slots=6, choices=(2, 3, 4), count=5, rng=None: stratified_configs(
        dataclasses.replace(COST, table=COST.table[:slots] if isinstance(slots, int) else COST.table),
        choices,
        count,
        rng=_rng() if rng is None else rng,
    ),
}
NUMBERS = (-1, 2.5, NAN, INF, "5", None, True, [5])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("count", [*NUMBERS, 10**30])
def test_numbers_of_configurations_that_are_none(sampler, count):
    with pytest.raises(InvalidParameterError, match=r"count must be a whole number|asked for"):
        SAMPLERS[sampler](count=count)


@pytest.mark.parametrize("sampler", ["random", "one-bit"])
@pytest.mark.parametrize("slots", [*NUMBERS, 0])
def test_numbers_of_layers_that_are_none(sampler, slots):
    with pytest.raises(InvalidParameterError, match="slots must be a whole number"):
        SAMPLERS[sampler](slots=slots)
    with pytest.raises(InvalidParameterError, match="slots must be a whole number"):
        one_off_configs(slots, (2, 3, 4))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "choices", [(), (4, 3, 2), (2, 2, 3), (2.5, 3, 4), (True, 2, 3), (0, 1, 2), (2, 3, 9), 3, "234"]
)
def test_choices_that_are_none(sampler, choices):
    with pytest.raises(InvalidBitsError, match="choices"):
        SAMPLERS[sampler](choices=choices)
    with pytest.raises(InvalidBitsError, match="choices"):
        one_off_configs(6, choices)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("rng", [0, np.random, "seed", np.random.RandomState(0)])
def test_generators_that_are_none(sampler, rng):
    with pytest.raises(InvalidParameterError, match="rng must be"):
        SAMPLERS[sampler](rng=rng)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_configurations_are_asked_for(sampler):
    found = SAMPLERS[sampler](count=0)
    assert found.dtype == np.int8
    assert found.shape == (3 if sampler == "random" else 0, 6)


def test_other_impossible_samples():
    with pytest.raises(InvalidBitsError, match="must not hold 1"):
        one_bit_configs(6, (1, 2), 3, rng=_rng())
    with pytest.raises(InvalidBitsError, match="known for 3 widths"):
        stratified_configs(COST, (2, 3), 3, rng=_rng())
    with pytest.raises(ConfigLengthError, match="6 bit widths"):
        stratified_configs(COST, (2, 3, 4), 3, rng=_rng(), exclude=[(3, 3)])
    with pytest.raises(InvalidParameterError, match="too many"):
        stratified_configs(COST, (2, 3, 4), 3**6, rng=_rng(), exclude=[CONFIG])


QUERIES = {
    "two rows": ([CONFIG, CONFIG], ConfigLengthError),
    "one row in a table": ([CONFIG], ConfigLengthError),
    "2x3": ("2x3", InvalidBitsError),
    "text": ("333333", InvalidBitsError),
    "list of text": (list("333333"), InvalidBitsError),
    "None": (None, InvalidBitsError),
    "a number": (3, ConfigLengthError),
    "empty": ([], EMQError),
    "halves": ([2.5] * 6, InvalidBitsError),
    "1 bit": ([1] * 6, InvalidBitsError),
    "ragged": ([[3], [3, 3]], ConfigLengthError),
}


@pytest.mark.parametrize("case", QUERIES)
def test_queries_that_are_none(study, profile, case):
    config, error = QUERIES[case]
    with pytest.raises(error):
        load_bench(profile).query(config)


@pytest.mark.parametrize("count", [*NUMBERS, 10**9])
def test_samples_of_the_bench_that_are_none(study, profile, count):
    with pytest.raises(InvalidParameterError, match=r"count must be a whole number|asked for 1000000000"):
        load_bench(profile).sample(count, rng=_rng())


def test_names_that_are_none(study, profile):
    bench = load_bench(profile)
    for name in ("latin", "", None, 3):
        with pytest.raises(InvalidParameterError, match="no sample.*it has one-off, random, stratified, uniform"):
            bench.select(name)
        with pytest.raises(InvalidParameterError, match="no sample"):
            bench.split(name)
        with pytest.raises(InvalidParameterError, match="unknown cost.*size and BOPs"):
            bench.cost(name)
    with pytest.raises(InvalidParameterError, match="rng must be"):
        bench.sample(3, rng=0)


@pytest.mark.parametrize("size", [(5, 1), (1,), (1, 2, 3), 5, "ab", (None, 3), (NAN, 5), (1, NAN)])
def test_ranges_that_are_none(study, profile, size):
    with pytest.raises((InvalidParameterError, InvalidScoreError), match="range of size_bytes"):
        load_bench(profile).within(size=size)


@pytest.mark.parametrize("size", [NAN, "5", [1, 2]])
def test_budgets_that_are_none(study, profile, size):
    with pytest.raises((InvalidParameterError, InvalidScoreError), match="range of"):
        load_bench(profile).best(size=size)
    with pytest.raises(InfeasibleBudgetError):
        load_bench(profile).best(size=-1)


def test_configurations_with_one_bit_are_found(study, profile):
    """A bench holds rows with 1 bit although no proxy chooses from it."""
    bench = load_bench(profile)
    odd = bench.table.iloc[:1].assign(bits=[np.array([1, 3, 3, 3, 3, 3])], config_id="133333", sample="one-bit")
    wider = dataclasses.replace(bench, table=pd.concat([bench.table, odd], ignore_index=True))
    assert wider.query([1, 3, 3, 3, 3, 3])["config_id"] == "133333"
    assert wider.choices == (2, 3, 4)
    with pytest.raises(ConfigNotFoundError):
        wider.query([3, 1, 3, 3, 3, 3])
    assert wider.cost("BOPs").total(bench.configs, bench.choices) == pytest.approx(bench.table["bops"])


ALTERED = {
    "no rows": lambda table: table.iloc[:0],
    "no top-1": lambda table: table.drop(columns="top1"),
    "NaN top-1": lambda table: table.assign(top1=NAN),
    "text top-1": lambda table: table.assign(top1="high"),
    "top-1 as text": lambda table: table.assign(top1=table["top1"].astype(str)),
    "another top-1": lambda table: table.assign(top1=table["top1"] + 1),
    "infinite loss": lambda table: table.assign(loss=INF),
    "more right than images": lambda table: table.assign(correct_a=table["n_a"] + 1),
    "fewer than none": lambda table: table.assign(correct_b=-1),
    "no images": lambda table: table.assign(n_a=0, n_b=0, correct_a=0, correct_b=0),
    "doubled": lambda table: pd.concat([table, table.iloc[:1]]),
    "other widths": lambda table: table.assign(bits=[np.array([2] * 6)] * len(table)),
    "9 bits": lambda table: table.assign(bits=[np.array([9] * 6)] * len(table), config_id="999999").iloc[:1],
    "fractions": lambda table: table.assign(bits=[np.array([2.5] * 6)] * len(table)),
    "no widths": lambda table: table.assign(bits=[np.array([], dtype=int)] * len(table)),
    "another length": lambda table: table.assign(bits=[*table["bits"][:-1], np.array([2])]),
    "unknown sample": lambda table: table.assign(sample="latin"),
    "no sizes": lambda table: table.assign(size_bytes=NAN),
    "text sizes": lambda table: table.assign(bops="many"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_altered_tables_are_refused(study, profile, tmp_path, case):
    path = tmp_path / "bench.parquet"
    ALTERED[case](load_bench(profile).table).to_parquet(path)
    before = hashlib.sha256(path.read_bytes()).digest()
    with pytest.raises(CorruptArtefactError, match=r"bench\.parquet.*Restore it, or make it again"):
        read_bench(path)
    assert hashlib.sha256(path.read_bytes()).digest() == before


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table", b"\x00" * 100])
def test_files_that_are_no_table(tmp_path, content):
    (tmp_path / "bench.parquet").write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="is not a table"):
        read_bench(tmp_path / "bench.parquet")


def test_planned_work_of_impossible_configurations(study, profile, measurable):
    network, _ = measurable
    layers = load_layers(profile)
    assert size_cost(layers, profile.choices).table.shape == (6, 3)
    for configs, error in ([[2.5] * 6], InvalidBitsError), ([[3]], ConfigLengthError):
        with pytest.raises(error):
            planned_macs(network.model, layers, configs)
