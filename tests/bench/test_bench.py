"""The bench: equality with the plain loop, its samples, extension, the table, named errors."""

import collections
import dataclasses
import itertools
import json
import subprocess
import types

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from book.places import REPOSITORY
from book.studies import bench
from book.studies.bench import load_bench
from book.studies.networks import build_network, fresh_model, layer_table, load_checkpoint, load_folded
from book.studies.study import has_study, manifest_of, new_file, study_folder
from emq_lib.bench import engine as engine_module
from emq_lib.bench import remote, sampling
from emq_lib.bench.engine import MEMORY, _blocks, _CapturedEngine, measure, planned_macs
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.configs import slot_names
from emq_lib.core.costs import CostTable, size_cost, weight_bytes
from emq_lib.core.errors import (
    ConfigLengthError,
    ConfigNotFoundError,
    CorruptArtefactError,
    InfeasibleBudgetError,
    InvalidBitsError,
    InvalidParameterError,
    MissingArtefactError,
)
from emq_lib.core.files import sha256
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.models import predict
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.profiles import get_profile, profile_names
from emq_lib.core.quantizers import choose_activation_ranges, fake_quantize
from emq_lib.quantization import adaround


def test_sampled_configurations_are_distinct_valid_and_extend():
    few, many = (sampling.sample_configs(6, (2, 3, 4), n, rng=np.random.default_rng(1)) for n in (50, 200))
    assert many.shape == (203, 6)
    assert len({tuple(row) for row in many}) == 203
    assert set(np.unique(many)) == {2, 3, 4}
    np.testing.assert_array_equal(many[:53], few)
    np.testing.assert_array_equal(many[:3], [[2] * 6, [3] * 6, [4] * 6])


def test_more_configurations_than_there_are_is_an_error():
    with pytest.raises(InvalidParameterError, match="only 6 are not uniform"):
        sampling.sample_configs(3, (2, 3), 7, rng=np.random.default_rng(0))


@pytest.mark.slow
def test_measuring_agrees_with_the_plain_loop_image_by_image(study, profile, data):
    """Quantize every layer afresh for each configuration, run one forward pass, no sharing, no bank."""
    network, layers = build_network(profile, data)
    configs = sampling.sample_configs(6, profile.choices, 12, rng=np.random.default_rng(2))
    measured = [item for block in measure(network, data.test, configs, batch_size=300) for item in block]
    assert {item.config for item in measured} == {tuple(map(int, config)) for config in configs}
    searchable = list(layers.loc[layers["searchable"], "name"])
    for item in measured[::5]:
        model = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
        ranges = choose_activation_ranges(model, layers, data.calibration, bits=8)
        for name, bits in [*zip(searchable, item.config, strict=True), *profile.pinned]:
            layer = model.get_submodule(name)
            layer.weight.data = fake_quantize(layer.weight.data, bits)
            layer.register_forward_pre_hook(lambda _, x, r=ranges[name]: (r.fake_quantize(x[0]),))
        with torch.inference_mode():
            logits = torch.cat([model(data.test[:300].inputs()), model(data.test[300:].inputs())])
        np.testing.assert_array_equal(item.correct, (logits.argmax(1) == data.test.labels).numpy())
        assert item.loss == pytest.approx(F.cross_entropy(logits.double(), data.test.labels).item(), rel=1e-3)


@pytest.mark.slow
def test_sharing_computation_changes_no_bit(study, profile, data):
    network, _ = build_network(profile, data)
    configs = sampling.sample_configs(6, profile.choices, 40, rng=np.random.default_rng(4))
    split = data.test[:100]
    for block in measure(network, split, configs, batch_size=33):
        for item in block[::4]:
            logits = predict(network.select(item.config), split, batch_size=77)
            np.testing.assert_array_equal(item.correct, (logits.argmax(1) == split.labels).numpy())
            truth = F.cross_entropy(logits.double(), split.labels).item()
            assert item.loss == pytest.approx(truth, rel=1e-14)


def test_less_memory_means_fewer_images_at_once_and_the_same_answers(study, profile, data, monkeypatch):
    network, _ = build_network(profile, data)
    config = np.array([[2, 3, 4, 4, 3, 2]])
    split = data.test[:100]
    ((plenty,),) = measure(network, split, config)
    seen = []
    next(iter(network.layers.values())).register_forward_hook(lambda _layer, inputs, _output: seen.append(len(*inputs)))
    widest = 8 * 16 * 16 * 4  # bytes that an image takes after the first layer
    monkeypatch.setitem(MEMORY, "cpu", 3 * widest + widest // 2)
    ((little,),) = measure(network, split, config)
    assert max(seen) == 3
    np.testing.assert_array_equal(little.correct, plenty.correct)
    assert little.loss == plenty.loss


def _same(found, expected):
    """Check that two lists of measured blocks hold the same answers and losses."""
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert ours.config == theirs.config
        np.testing.assert_array_equal(ours.correct, theirs.correct)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)


@pytest.mark.slow
def test_recorded_steps_give_the_same_answers(study, profile, data, monkeypatch):
    """What a GPU does, with steps that are computed again instead of replayed."""
    network, _ = build_network(profile, data)
    configs, split = sampling.sample_configs(6, profile.choices, 40, rng=np.random.default_rng(6)), data.test[:70]
    expected = list(measure(network, split, configs))
    recorded = []

    def record(step, _another):
        bits = {name: layer.bits for name, layer in network.layers.items()}
        number = step.args[0]
        recorded.append((number, tuple(bits[name] for name in network.pieces[number][1])))

        def replay():
            for name in network.pieces[number][1]:
                network.layers[name].bits = bits[name]
            step()

        return types.SimpleNamespace(replay=replay)

    monkeypatch.setattr(engine_module, "_record", record)
    engine = _CapturedEngine(network, 30)  # the last batch is not a whole one
    _same([engine.measure(split, block) for block in _blocks(network, configs)], expected)
    assert len(recorded) == len(set(recorded)) < 43 * len(network.pieces) / 2  # once each


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_answers(study, profile, data):
    network, layers = build_network(profile, data)
    folded = load_folded(profile, "cuda")
    bank = build_weight_bank(folded, layers, profile.choices)
    there = QuantizedNetwork(folded, bank, network.activation_ranges)
    configs = sampling.sample_configs(6, profile.choices, 40, rng=np.random.default_rng(6))
    found = measure(there, data.test.to("cuda"), configs, batch_size=100)
    _same(found, measure(network, data.test, configs))


def test_the_planned_work_is_what_runs(study, profile, data):
    network, layers = build_network(profile, data)
    configs = sampling.sample_configs(6, profile.choices, 60, rng=np.random.default_rng(5))
    macs, ran = layers.set_index("name")["macs"], []
    for name, layer in network.layers.items():
        layer.register_forward_hook(lambda _layer, _inputs, _output, name=name: ran.append(macs[name]))
    blocks = measure(network, data.test[:4], configs, batch_size=4)
    ran.clear()  # one image has shown that the network takes such
    assert sum(map(len, blocks)) == 63
    fresh = fold_batchnorm(load_checkpoint(profile, study / "model.safetensors"))
    assert planned_macs(fresh, layers, configs) == sum(ran) < 63 * macs.sum()


def test_rows_are_what_the_words_say(study, profile):
    table = load_bench(profile).table
    assert len(table) > profile.bench_configs + profile.stratified_configs + 3
    np.testing.assert_allclose(
        table["top1"], 100 * (table["correct_a"] + table["correct_b"]) / (table["n_a"] + table["n_b"])
    )
    layers = bench.load_layers(profile)
    row = table.iloc[7]
    widths = iter(row["bits"].tolist())
    bits = [next(widths) if layer.searchable else layer.pinned_bits for layer in layers.itertuples()]
    size = sum(
        weight_bytes(layer.parameters, b) + 5 * layer.channels + 4 * layer.biases
        for layer, b in zip(layers.itertuples(), bits, strict=True)
    )
    assert row["size_bytes"] == size
    assert row["bops"] == sum(8 * b * layer.macs for layer, b in zip(layers.itertuples(), bits, strict=True))


def _count_measured(monkeypatch):
    """Let every call of measure enter the number of its configurations into the list that is returned."""
    measure, seen = remote.measure, []

    def counting(network, split, configs, **kwargs):
        seen.append(len(configs))
        return measure(network, split, configs, **kwargs)

    monkeypatch.setattr(remote, "measure", counting)
    return seen


@pytest.mark.slow
def test_a_bench_of_other_rows_is_extended(own_study, profile, data, monkeypatch):
    whole = load_bench(profile).table
    fewer = dataclasses.replace(profile, bench_configs=50, stratified_configs=10)
    bench.build_bench(fewer, data)
    assert len(load_bench(fewer)) < len(whole)
    seen = _count_measured(monkeypatch)
    bench.build_bench(profile, data)
    pd.testing.assert_frame_equal(load_bench(profile).table, whole)
    assert 0 < sum(seen) <= len(whole) - 50  # what the smaller bench holds is not measured again


def test_stratified_configurations_are_evenly_spread_in_size(study, profile):
    layers = bench.load_layers(profile)
    size, choices = size_cost(layers, profile.choices), profile.choices
    configs = sampling.stratified_configs(size, choices, 120, rng=np.random.default_rng(3))
    assert len({tuple(config) for config in configs}) == 120
    share = (size.total(configs, choices) - size.smallest) / np.ptp(size.total([[2] * 6, [4] * 6], choices))
    np.testing.assert_allclose(share, (np.arange(120) + 0.5) / 120, atol=0.06)
    random = sampling.sample_configs(6, choices, 120, rng=np.random.default_rng(3))[3:]
    spread = (size.total(random, choices) - size.smallest) / np.ptp(size.total([[2] * 6, [4] * 6], choices))
    assert np.std(share) > 1.3 * np.std(spread)


@pytest.mark.slow
def test_draws_within_a_strip_of_size_are_uniform():
    """Three layers of one size: configurations of the middle size are drawn equally often."""
    cost = CostTable("size", "bytes", 0.0, np.tile([2.0, 3.0, 4.0], (3, 1)))
    draws = [sampling.stratified_configs(cost, (2, 3, 4), 1, rng=np.random.default_rng(seed)) for seed in range(700)]
    found = np.concatenate(draws)
    assert set(found.sum(axis=1)) == {9} or found.sum(axis=1).min() >= 6
    middle = [tuple(row) for row in found if sum(row) == 9]
    counts = np.array(list(collections.Counter(middle).values()))
    assert len(counts) == 7  # 333 and the six orders of 234
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_stratified_sample_can_be_all_there_is():
    cost = CostTable("size", "bytes", 0.0, np.array([[2.0, 3.0, 4.0], [20.0, 30.0, 40.0], [1.0, 9.0, 10.0]]))
    found = sampling.stratified_configs(cost, (2, 3, 4), 26, rng=np.random.default_rng(0), exclude=[(3, 3, 3)])
    assert len({tuple(config) for config in found} | {(3, 3, 3)}) == 27


def test_one_off_configurations_change_one_layer_of_the_middle_uniform_one():
    configs = sampling.one_off_configs(4, (2, 3, 4))
    assert configs.shape == (8, 4)
    assert ((configs != 3).sum(axis=1) == 1).all()
    assert len({tuple(config) for config in configs}) == 8


def test_no_configuration_stands_twice(study, profile):
    table = load_bench(profile).table
    assert table["config_id"].is_unique
    assert table["key"].is_unique
    assert set(table["sample"]) == {"uniform", "random", "one-off", "stratified"}


def test_configurations_with_one_bit_have_few_such_layers():
    configs = sampling.one_bit_configs(18, (2, 3, 4), 300, rng=np.random.default_rng(0))
    ones = (configs == 1).sum(axis=1)
    assert len(np.unique(configs, axis=0)) == 300
    assert np.bincount(ones, minlength=4)[1:].min() > 70
    assert ones.max() == 3
    assert set(np.unique(configs)) == {1, 2, 3, 4}
    np.testing.assert_array_equal(
        configs[:100], sampling.one_bit_configs(18, (2, 3, 4), 100, rng=np.random.default_rng(0))
    )
    with pytest.raises(InvalidParameterError, match="1 to 2 layers at 1 bit"):
        sampling.one_bit_configs(2, (2, 3), 5, rng=np.random.default_rng(0))


@pytest.mark.slow
def test_a_second_quantizer_stands_beside_the_first(own_study, profile, data, monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 100)
    few = dataclasses.replace(profile, bench_configs=30, stratified_configs=5, one_bit_configs=10)
    nearest = load_bench(profile).table
    with pytest.raises(MissingArtefactError, match="no rows of 'adaround', only of rtn"):
        load_bench(profile, quantizer="adaround")
    bench.build_bench(few, data, quantizer="adaround")
    pd.testing.assert_frame_equal(load_bench(few).table, nearest)
    reconstructed = load_bench(few, quantizer="adaround")
    both = reconstructed.table.merge(nearest, on="config_id", suffixes=("_ada", "_rtn"))
    assert len(both) > 30
    assert not set(both["key_ada"]) & set(both["key_rtn"])
    assert both["top1_ada"].mean() > both["top1_rtn"].mean()
    one_bit = reconstructed.select("one-bit")
    assert len(one_bit) == 10
    assert set(np.unique(one_bit.configs)) == {1, 2, 3, 4}
    assert set(np.unique(reconstructed.select("random").configs)) == {2, 3, 4}
    assert one_bit.top1.mean() < reconstructed.select("random").top1.mean()


def test_filtering_sampling_and_the_best_under_a_budget(study, profile):
    measured = load_bench(profile)
    table = measured.to_pandas()
    middle = table["size_bytes"].median()
    small = measured.within(size=(0, middle))
    assert set(small.table["config_id"]) == set(table.loc[table["size_bytes"] <= middle, "config_id"])
    truth = table[(table["size_bytes"] <= middle) & (table["bops"] <= table["bops"].median())]["top1"].max()
    assert measured.best(size=middle, bops=table["bops"].median())["top1"] == truth
    drawn = measured.sample(25, rng=np.random.default_rng(6)).table["config_id"]
    assert drawn.is_unique
    assert len(drawn) == 25
    assert list(drawn) == [name for name in table["config_id"] if name in set(drawn)]
    with pytest.raises(InvalidParameterError, match=f"asked for 9999 of {len(table)}"):
        measured.sample(9_999, rng=np.random.default_rng(6))
    with pytest.raises(InfeasibleBudgetError, match=f"smallest has {table['size_bytes'].min()} bytes"):
        measured.best(size=10)
    table.loc[0, "top1"] = -1.0
    assert measured.table.loc[0, "top1"] >= 0


def test_every_slot_has_one_name_whatever_shares_its_width():
    profile = get_profile("cifar10-resnet18")
    layers = layer_table(fold_batchnorm(fresh_model(profile).eval()), profile)
    names = slot_names(layers)
    assert len(names) == 18  # the paper's
    assert "layer2.0.conv2" in names
    assert not any("downsample" in name for name in names)
    assert list(names) == [name for name in layers["name"] if name in names]


def test_query_finds_rows_and_names_bad_configurations(study, profile):
    measured = load_bench(profile)
    row = measured.table.iloc[11]
    assert measured.query(row["bits"])["config_id"] == row["config_id"]
    with pytest.raises(ConfigLengthError):
        measured.query([3])
    with pytest.raises(InvalidBitsError):
        measured.query([3, 3, 3, 3, 3, 8])
    unmeasured = next(
        c for c in np.ndindex(3, 3, 3, 3, 3, 3) if not (measured.configs == np.add(c, 2)).all(axis=1).any()
    )
    with pytest.raises(ConfigNotFoundError, match="Measure it"):
        measured.query(np.add(unmeasured, 2))
    with pytest.raises(InvalidParameterError, match="it has one-off, random, stratified, uniform"):
        measured.select("latin")


def test_halves_are_disjoint_and_complete(study, profile):
    measured = load_bench(profile)
    search, heldout = measured.split()
    ids, held = set(search.table["config_id"]), set(heldout.table["config_id"])
    assert not ids & held
    assert ids | held == set(measured.select("random").table["config_id"])
    assert min(len(ids), len(held)) >= 30


def test_missing_truncated_and_altered_benches_are_named(own_study, profile):
    path = own_study / "bench.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(CorruptArtefactError, match=r"SHA-256.*build digits-resnet8 bench.parquet"):
        load_bench(profile)
    manifest = manifest_of(profile)
    manifest["bench.parquet"]["sha256"] = sha256(path)
    (own_study / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtefactError, match="is not a table"):
        load_bench(profile)
    (own_study / "manifest.json").write_text("{")
    with pytest.raises(CorruptArtefactError, match="not valid JSON"):
        load_bench(profile)
    (own_study / "manifest.json").write_text("{}")
    with pytest.raises(MissingArtefactError, match="nothing vouches for it"):
        load_bench(profile)
    path.unlink()
    with pytest.raises(MissingArtefactError, match="does not exist"):
        load_bench(profile)


@pytest.mark.parametrize("name", profile_names())
def test_published_files_are_the_ones_of_the_manifest(name, monkeypatch):
    monkeypatch.delenv("EMQ_STUDY_ROOT", raising=False)
    profile = get_profile(name)
    manifest, folder = manifest_of(profile), study_folder(profile)
    tracked = subprocess.run(["git", "ls-files", folder], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    published = {path.rpartition("/")[2] for path in tracked.stdout.split()} - {"manifest.json"}
    assert published == set(manifest)
    for filename in published:
        assert sha256(folder / filename) == manifest[filename]["sha256"]
        assert {"rows", "command", "seed", "commit", "versions", "device", "seconds"} <= set(manifest[filename])


def test_published_studies_stay_small(monkeypatch):
    tracked = subprocess.run(["git", "ls-files", "data"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert sum((REPOSITORY / path).stat().st_size for path in tracked.stdout.split()) < 24e6


@pytest.mark.slow
def test_published_rows_are_measured_again_on_the_real_images(cifar10, monkeypatch):
    """Rounding ties may fall otherwise on another processor, so a few images may differ."""
    monkeypatch.delenv("EMQ_STUDY_ROOT", raising=False)
    profile, data = cifar10
    rows = load_bench(profile).table.iloc[[1, 200]]
    network, _ = build_network(profile, data)
    (measured,) = measure(network, data.test, np.stack(rows["bits"].to_numpy()))
    correct = {item.config: int(item.correct.sum()) for item in measured}
    for row in rows.itertuples():
        assert correct[tuple(row.bits)] == pytest.approx(row.correct_a + row.correct_b, abs=5)


def test_a_profile_without_a_study_has_none(study, profile):
    assert has_study(profile, "bench.parquet", "layers.csv")
    assert not has_study(dataclasses.replace(profile, name="nobody"), "bench.parquet")


def test_names_that_look_like_numbers_stay_names(own_study, profile):
    names = [f"{index}.0" for index in range(8)]
    with new_file(profile, "layers.csv", seconds=0.0) as path:
        bench.load_layers(profile).assign(name=names).to_csv(path, index=False)
    assert list(bench.load_layers(profile)["name"]) == names
