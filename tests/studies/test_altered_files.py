"""Files of a study that were altered while their hashes match: every loader names them, and none returns a table."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load, save

from book.places import REPOSITORY
from book.studies import allocation, bench, checks, evolution, files, heldout, networks, proxies, quantization, runtimes
from book.studies.study import keep, manifest_of, read_facts
from emq_lib.core.errors import CorruptArtefactError
from emq_lib.core.files import MANIFEST, sha256
from emq_lib.core.profiles import get_profile

pytestmark = pytest.mark.slow
DIGITS = get_profile("digits-resnet8")
LOADERS = {
    files.MODEL: lambda: networks.load_folded(DIGITS, "cpu"),
    files.LAYERS: lambda: bench.load_layers(DIGITS),
    files.BENCH: lambda: bench.load_bench(DIGITS),
    files.CHECKS: lambda: checks.load_checks(DIGITS),
    files.STATISTICS: lambda: proxies.load_statistics(DIGITS),
    files.SCORES: lambda: proxies.load_proxies(DIGITS),
    files.TABLES: lambda: proxies.load_proxies(DIGITS),
    files.EVOLUTION_LOG: lambda: evolution.load_evolution(DIGITS),
    files.TRANSFER: lambda: evolution.load_evolution(DIGITS, files.TRANSFER),
    files.ENUMERATION: lambda: evolution.load_evolution(DIGITS, files.ENUMERATION),
    files.SEARCHES: lambda: evolution.load_searches(DIGITS),
    files.HELDOUT: lambda: heldout.load_heldout(DIGITS),
    files.CHOICES: lambda: (allocation.load_quantization(DIGITS), allocation.load_search_choices(DIGITS)),
    files.COMPARISON: lambda: quantization.load_comparison(DIGITS),
    files.RUNTIMES: lambda: runtimes.load_runtimes(DIGITS),
}
CSV = [files.LAYERS, files.CHECKS, files.SEARCHES, files.HELDOUT, files.CHOICES, files.RUNTIMES]
PARQUET = [files.BENCH, files.SCORES, files.COMPARISON]
LOGS = [files.EVOLUTION_LOG, files.TRANSFER, files.ENUMERATION]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a folder of studies with the published digits, each file entered as what today's code makes."""
    root = tmp_path_factory.mktemp("published")
    shutil.copytree(REPOSITORY / "data" / DIGITS.name, root / DIGITS.name)
    path = root / DIGITS.name / MANIFEST
    entries = json.loads(path.read_text())
    kept = {
        name: {key: entry[key] for key in entry if key not in ("inputs", "outdated")} for name, entry in entries.items()
    }
    path.write_text(json.dumps(kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMQ_STUDY_ROOT", str(root))
        for filename in files.FILES:
            keep(DIGITS, filename, "for this test")
    return root


@pytest.fixture
def folder(published, tmp_path, monkeypatch):
    root = shutil.copytree(published, tmp_path / "studies")
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(root))
    return root / DIGITS.name


def _alter(folder, filename, content):
    """Write a file, and its hash into the manifest and wherever the file is an input."""
    before = manifest_of(DIGITS)
    (folder / filename).write_bytes(content)
    digest = sha256(folder / filename)
    text = json.dumps(before).replace(before[filename]["sha256"], digest)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CorruptArtefactError, match="(?s).+(Restore|rebuild|Rebuild|make it again)"):
        LOADERS[filename]()
    if filename in (files.MODEL, files.STATISTICS):
        return
    assert (folder / filename).read_bytes() == content


@pytest.mark.parametrize("filename", LOADERS)
def test_what_is_published_is_loaded(folder, filename):
    LOADERS[filename]()


BYTES = {
    "empty": lambda content: b"",
    "a newline": lambda content: b"\n",
    "its first half": lambda content: content[: len(content) // 2],
    "its first bytes": lambda content: content[:7],
    "without its last bytes": lambda content: content[:-9],
    "zeros": lambda content: bytes(len(content)),
    "random": lambda content: np.random.default_rng(0).bytes(1_000),
    "text": lambda content: b"No such file\n",
    "deep": lambda content: b"[" * 100_000,
    "not UTF-8": lambda content: (
        b"\xff\xfe\xfd" + content[3:] if content[:3] != b"PAR" else content[:-3] + b"\xff\xfe\xfd"
    ),
}


@pytest.mark.parametrize("how", BYTES)
@pytest.mark.parametrize("filename", LOADERS)
def test_other_bytes_are_named(folder, filename, how):
    _alter(folder, filename, BYTES[how]((folder / filename).read_bytes()))


@pytest.mark.parametrize("filename", LOADERS)
def test_another_file_in_its_place_is_named(folder, filename):
    endings = {name.rpartition(".")[2] for name in LOADERS} - {filename.rpartition(".")[2]}
    other = next(name for name in LOADERS if name.rpartition(".")[2] in endings and name not in (files.TABLES,))
    _alter(folder, filename, (folder / other).read_bytes())


def _read(path):
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_csv(path, dtype={"bits": str, "name": str}, keep_default_na=False, na_values=[""])


def _as_bytes(table, filename):
    buffer = io.BytesIO()
    write = table.to_parquet if filename.endswith(".parquet") else table.to_csv
    write(buffer, index=False)
    return buffer.getvalue()


def _number(table):
    return next(name for name in ("top1", "rho100", "goal", "macs", "bit sum") if name in table)


def _texts(table):
    return [name for name in ("proxy", "network", "bits", "method", "name", "config_id", "quantizer") if name in table]


TABLES = {
    "every row twice": lambda table: pd.concat([table, table]),
    "one row twice": lambda table: pd.concat([table, table.tail(1)]),
    "no rows": lambda table: table.iloc[:0],
    "a row gone": lambda table: table.iloc[1:],
    "NaN": lambda table: table.assign(**{_number(table): [np.nan, *table[_number(table)][1:]]}),
    "only NaN": lambda table: table.assign(**{_number(table): np.nan}),
    "infinity": lambda table: table.assign(**{_number(table): [np.inf, *table[_number(table)][1:]]}),
    "text": lambda table: table.assign(**{_number(table): "high"}),
    "one text": lambda table: table.assign(**{_number(table): ["high", *map(str, table[_number(table)][1:])]}),
    "a column gone": lambda table: table.drop(columns=_number(table)),
    "a name gone": lambda table: table.drop(columns=_texts(table)[0]),
    "a name empty": lambda table: table.assign(**{_texts(table)[0]: None}),
    "other columns": lambda table: pd.DataFrame({"x": range(len(table))}),
}


@pytest.mark.parametrize("how", TABLES)
@pytest.mark.parametrize("filename", [*CSV, *PARQUET])
def test_a_table_of_other_content_is_named(folder, filename, how):
    _alter(folder, filename, _as_bytes(TABLES[how](_read(folder / filename)), filename))


MEASURED = {
    "top-1 above 100": {"top1": 101.0},
    "more correct than images": {"correct_b": 10**6},
    "negative counts": {"correct_b": -1},
    "no images": {"n_b": 0, "n_a": 0},
    "a count with a fraction": {"correct_a": 1.5},
}


@pytest.mark.parametrize("how", MEASURED)
@pytest.mark.parametrize("filename", [files.BENCH, files.CHECKS, files.CHOICES])
def test_measurements_that_cannot_be_are_named(folder, filename, how):
    table = _read(folder / filename)
    for name, value in MEASURED[how].items():
        table[name] = table[name].astype(object).where(table.index > 0, value)
    table = table.astype(dict.fromkeys(MEASURED[how], float))
    _alter(folder, filename, _as_bytes(table, filename))


@pytest.mark.parametrize("bits", ["", "x", "3x3", "9" * 6, "333333333", "3"])
@pytest.mark.parametrize("filename", [files.CHECKS, files.CHOICES, files.COMPARISON])
def test_bits_that_are_none_are_named(folder, filename, bits):
    table = _read(folder / filename)
    table.loc[0, "bits"] = bits
    _alter(folder, filename, _as_bytes(table, filename))


LINES = {
    "a blank line": b"",
    "an empty line": b"{}",
    "a list": b"[]",
    "null": b"null",
    "half a line": b'{"method": "evolu',
    "not UTF-8": b'{"method": "\xff"}',
}


@pytest.mark.parametrize("how", [*LINES, "a line twice", "a line gone", "NaN", "text for a number", "no formula"])
@pytest.mark.parametrize("filename", LOGS)
def test_a_line_that_no_search_wrote_is_named(folder, filename, how):
    lines = (folder / filename).read_bytes().splitlines()
    first = json.loads(lines[0])
    changed = {
        "NaN": [json.dumps(first | {"fitness": float("nan")}).encode(), *lines[1:]],
        "text for a number": [json.dumps(first | {"fitness": "high"}).encode(), *lines[1:]],
        "no formula": [json.dumps(first | {"best": "W[0"}).encode(), *lines[1:]],
        "a line twice": [*lines, lines[-1]],
        "a line gone": lines[1:],
    } | {name: [*lines[:-1], line, lines[-1]] for name, line in LINES.items()}
    _alter(folder, filename, b"\n".join(changed[how]) + b"\n")


def _first(facts):
    return next(iter(facts))


FACTS = {
    "no proxies": lambda facts: {},
    "a list": lambda facts: list(facts),
    "numbers": lambda facts: dict.fromkeys(facts, 3),
    "no table": lambda facts: facts | {_first(facts): {"variant": "x", "seconds": 1.0}},
    "a text table": lambda facts: facts | {_first(facts): facts[_first(facts)] | {"table": "x"}},
    "a flat table": lambda facts: facts | {_first(facts): facts[_first(facts)] | {"table": [1.0, 2.0]}},
    "a ragged table": lambda facts: facts | {_first(facts): facts[_first(facts)] | {"table": [[1.0], [1.0, 2.0]]}},
    "a table of text": lambda facts: facts | {_first(facts): facts[_first(facts)] | {"table": [["a", "b"]]}},
    "NaN": lambda facts: facts | {_first(facts): facts[_first(facts)] | {"table": [[float("nan")] * 3] * 6}},
    "another shape": lambda facts: facts | {_first(facts): facts[_first(facts)] | {"table": [[1.0, 2.0]]}},
    "text seconds": lambda facts: facts | {_first(facts): facts[_first(facts)] | {"seconds": "long"}},
    "NaN seconds": lambda facts: facts | {_first(facts): facts[_first(facts)] | {"seconds": float("nan")}},
    "an unscored proxy": lambda facts: facts | {"new": facts[_first(facts)]},
}


@pytest.mark.parametrize("how", FACTS)
def test_proxies_that_are_none_are_named(folder, how):
    facts = json.loads((folder / files.TABLES).read_text())
    _alter(folder, files.TABLES, json.dumps(FACTS[how](facts)).encode())


TENSORS = {
    "one gone": lambda tensors: dict(list(tensors.items())[1:]),
    "none": lambda tensors: {},
    "others": lambda tensors: {"x": torch.zeros(3)},
    "another shape": lambda tensors: {name: torch.zeros(1) for name in tensors},
    "flat": lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()},
    "NaN": lambda tensors: {
        name: tensor * torch.nan if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    },
    "whole numbers": lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("how", TENSORS)
@pytest.mark.parametrize("filename", [files.MODEL, files.STATISTICS])
def test_tensors_of_something_else_are_named(folder, filename, how):
    tensors = TENSORS[how](load((folder / filename).read_bytes()))
    _alter(folder, filename, save(tensors, metadata={"facts": "{}"}))


@pytest.mark.parametrize("filename", [files.MODEL, files.STATISTICS])
def test_facts_of_a_file_that_was_cut_are_named(folder, filename):
    content = (folder / filename).read_bytes()
    (folder / filename).write_bytes(content[:50])
    text = (folder / MANIFEST).read_text().replace(manifest_of(DIGITS)[filename]["sha256"], sha256(folder / filename))
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CorruptArtefactError, match="is no file of a study"):
        read_facts(DIGITS, filename)
