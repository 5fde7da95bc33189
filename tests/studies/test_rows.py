"""What a measured row is known by: everything that it depends on, and nothing else; and the file of finished rows."""

import dataclasses
import json

import numpy as np
import pytest

from book.studies import rows
from book.studies.rows import PARTIAL, PartialRows, row_keys
from book.studies.study import new_file
from emq_lib.bench.table import MEASURED
from emq_lib.core import sources
from emq_lib.core.errors import CorruptArtefactError, MissingArtefactError
from emq_lib.core.profiles import EvolutionBudget

CONFIGS = np.array([[3] * 6, [2] * 6], dtype=np.int8)


@pytest.fixture
def version(tmp_path, monkeypatch):
    """Return a function: quantizer and an edit (module, text, other text) of the code -> version of the rows then."""
    path, read, described = sources._path, sources._read, sources._described
    edited = tmp_path / "edited.py"

    def found(quantizer, module="", before="", after=""):
        if module:
            text = path(module).read_text()
            assert text.count(before) >= 1, f"{module} does not say {before!r}"
            edited.write_text(text.replace(before, after))
        with monkeypatch.context() as patch:
            patch.setattr(sources, "_path", lambda name: edited if name == module else path(name))
            other = read.__wrapped__(module) if module else None
            patch.setattr(sources, "_read", lambda name: other if name == module else read(name))
            patch.setattr(
                sources,
                "_described",
                lambda place, *name: (described.__wrapped__ if place == module else described)(place, *name),
            )
            return rows.rows_version.__wrapped__(quantizer)

    return found


DECIDE = [
    ("emq_lib.core.quantizers", "SHRINKS = 80", "SHRINKS = 81"),
    ("emq_lib.core.quantizers", "1 - step / 100", "1 - step / 200"),
    ("emq_lib.core.quantizers", "2**bits - 1)", "2**bits - 2)"),
    ("emq_lib.core.quantizers", "torch.aminmax(inputs[0])", "torch.aminmax(inputs[0][:1])"),
    ("emq_lib.core.networks", "integers = weight.integers()", "integers = weight.integers() + 1"),
    ("emq_lib.core.networks", ".add_(self.bias)", ""),
    ("emq_lib.core.networks", "2**seen.bits - 1.25", "2**seen.bits - 3.25"),
    ("emq_lib.core.datasets", ".div_(255)", ".div_(256)"),
    ("emq_lib.core.bank", "int(layer.pinned_bits)", "8"),
    ("emq_lib.bench.engine", "logits.double()", "logits.half().double()"),
    ("book.studies.rows", "len(item.correct) // 2", "len(item.correct) // 3"),
]
LEARNED = [
    (
        "emq_lib.quantization.adaround",
        "ITERATIONS, LEARNING_RATE, WARM_UP = 500",
        "ITERATIONS, LEARNING_RATE, WARM_UP = 5",
    ),
    (
        "emq_lib.quantization.adaround",
        "ITERATIONS, LEARNING_RATE, WARM_UP = 500, 3e-2",
        "ITERATIONS, LEARNING_RATE, WARM_UP = 500, 1e-2",
    ),
    ("emq_lib.quantization.adaround", "STRETCH = (-0.1, 1.1)", "STRETCH = (-0.2, 1.2)"),
    ("emq_lib.quantization.adaround", "ANNEALING = (20.0, 2.0)", "ANNEALING = (20.0, 3.0)"),
    ("emq_lib.quantization.adaround", "PULL = 0.1", "PULL = 0.2"),
    ("emq_lib.quantization.adaround", "self.up() >= 0.5", "self.up() > 0.6"),
]
NEUTRAL = [
    ("emq_lib.core.quantizers", "SHRINKS = 80", "SHRINKS = 80  # ranges"),
    ("emq_lib.core.quantizers", "SHRINKS = 80", "SHRINKS = (\n    80\n)"),
    ("emq_lib.core.quantizers", '"""Uniform affine quantization', '"""Another title'),
    ("emq_lib.core.quantizers", '"""Round a weight to nearest', '"""Round it to nearest'),
    ("emq_lib.core.quantizers", "def fake_quantize(weight: torch.Tensor", "def fake_quantize(weight: object"),
    ("emq_lib.core.quantizers", "\ndef fake_quantize(", "UNRELATED = 1\n\n\ndef fake_quantize("),
    ("emq_lib.bench.engine", "BLOCK = 32", "BLOCK = 16"),
    ("emq_lib.bench.engine", '"cpu": 25', '"cpu": 250'),
    ("book.studies.rows", 'PARTIAL = "measured', 'PARTIAL = "rows'),
]


@pytest.mark.parametrize(("module", "before", "after"), DECIDE)
def test_code_and_constants_that_decide_numbers_count(version, module, before, after):
    for quantizer in ("rtn", "adaround"):
        assert version(quantizer, module, before, after) != version(quantizer)


@pytest.mark.parametrize(("module", "before", "after"), LEARNED)
def test_what_learned_rounding_depends_on_counts_there_alone(version, module, before, after):
    assert version("adaround", module, before, after) != version("adaround")
    assert version("rtn", module, before, after) == version("rtn")


@pytest.mark.parametrize(("module", "before", "after"), NEUTRAL)
def test_what_changes_no_number_does_not_count(version, module, before, after):
    for quantizer in ("rtn", "adaround"):
        assert version(quantizer, module, before, after) == version(quantizer)


@pytest.mark.parametrize(
    "change",
    [
        {"quantizer": "adaround"},
        {"activation_bits": 4},
        {"pinned": (("conv1", 8), ("fc", 4))},
        {"tied": (("layer2.0.conv1", "layer1.0.conv2"),)},
    ],
)
def test_how_the_network_is_quantized_counts(study, profile, data, change):
    other = dataclasses.replace(profile, **change)
    assert not set(row_keys(other, data, 50, CONFIGS)) & set(row_keys(profile, data, 50, CONFIGS))


@pytest.mark.parametrize(
    "change",
    [
        {"bench_configs": 3, "stratified_configs": 3, "one_bit_configs": 3},
        {"budgets": (3.0,)},
        {"evolution": EvolutionBudget(population=10)},
    ],
)
def test_what_else_is_measured_does_not_count(study, profile, data, change):
    assert row_keys(dataclasses.replace(profile, **change), data, 50, CONFIGS) == row_keys(profile, data, 50, CONFIGS)


def _another(split, name):
    tensor = getattr(split, name).clone()
    tensor.view(-1)[0] += 1
    return dataclasses.replace(split, **{name: tensor})


@pytest.mark.parametrize("name", ["images", "labels", "mean", "std"])
def test_every_image_and_label_counts(study, profile, data, name):
    before = row_keys(profile, data, 50, CONFIGS)
    assert row_keys(profile, dataclasses.replace(data, test=_another(data.test, name)), 50, CONFIGS) != before
    other = dataclasses.replace(data, calibration=_another(data.calibration, name))
    assert (row_keys(profile, other, 50, CONFIGS) != before) == (name != "labels")  # nobody reads those


def test_the_checkpoint_the_images_and_the_widths_count(own_study, profile, data):
    before = row_keys(profile, data, 50, CONFIGS)
    assert before == row_keys(profile, data, 50, CONFIGS)
    assert len(set(before)) == 2
    assert not set(before) & set(row_keys(profile, data, 51, CONFIGS))
    assert not set(before) & set(row_keys(profile, data, 50, CONFIGS, also=["in order"]))
    with new_file(profile, "model.safetensors", seconds=0.0) as path:
        path.write_bytes((own_study / "model.safetensors").read_bytes() + b" ")
    assert not set(before) & set(row_keys(profile, data, 50, CONFIGS))
    (own_study / "model.safetensors").unlink()
    with pytest.raises(MissingArtefactError):
        row_keys(profile, data, 50, CONFIGS)


def _lines(*lines):
    return "".join(f"{line}\n" for line in lines)


ROW = {"top1": 50.0, "loss": 1.0, "correct_a": 1, "correct_b": 1, "n_a": 2, "n_b": 2}
GOOD = json.dumps({"rows": {"0" * 24: ROW}, "seconds": 1.5})
HEAD = json.dumps({"journal": {"rows of": PARTIAL}})


def _with_row(**change):
    return json.dumps({"rows": {"0" * 24: ROW | change}, "seconds": 1.5})


BROKEN = {
    "another head": _lines("{}", GOOD),
    "no head": _lines(GOOD),
    "empty object": _lines(HEAD, "{}"),
    "blank": _lines(HEAD, "", GOOD),
    "no JSON": _lines(HEAD, "rows", GOOD),
    "list": _lines(HEAD, "[]"),
    "number": _lines(HEAD, "3"),
    "rows are a list": _lines(HEAD, '{"rows": [], "seconds": 1}'),
    "a row is a number": _lines(HEAD, '{"rows": {"0": 3}, "seconds": 1}'),
    "a row is empty": _lines(HEAD, '{"rows": {"0": {}}, "seconds": 1}'),
    "seconds are text": _lines(HEAD, '{"rows": {}, "seconds": "1"}'),
    "seconds are NaN": _lines(HEAD, '{"rows": {}, "seconds": NaN}'),
    "seconds are below 0": _lines(HEAD, '{"rows": {}, "seconds": -1}'),
    "no seconds": _lines(HEAD, '{"rows": {}}'),
    "seconds are true": _lines(HEAD, '{"rows": {}, "seconds": true}'),
    "top-1 is text": _lines(HEAD, _with_row(top1="50")),
    "top-1 is NaN": _lines(HEAD, _with_row(top1=float("nan"))),
    "top-1 is null": _lines(HEAD, _with_row(top1=None)),
    "loss is missing": _lines(HEAD, GOOD.replace('"loss": 1.0, ', "")),
    "not UTF-8": _lines(HEAD).encode() + b"\xff\xfe\n",
    "deep": _lines(HEAD, "[" * 100_000),
}


@pytest.mark.parametrize("case", BROKEN)
def test_finished_rows_that_no_run_wrote(tmp_path, case):
    path, content = tmp_path / PARTIAL, BROKEN[case]
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    with pytest.raises(CorruptArtefactError, match=PARTIAL):
        PartialRows(path, MEASURED)
    assert path.read_bytes() == content


def test_finished_rows_are_read_back_whatever_the_last_line_lost(tmp_path):
    """A killed run may leave any part of its last line."""
    whole = _lines(HEAD, GOOD, GOOD.replace("0" * 24, "1" * 24))
    for cut in range(len(whole)):
        path = tmp_path / PARTIAL
        path.write_text(whole[:cut])
        rest = PartialRows(path)
        assert len(rest.read()) == max(0, whole[:cut].count("\n") - 1)
        rest.append({"2" * 24: ROW}, seconds=0.5)
        again = PartialRows(path)
        assert again.read() == rest.read()
        assert list(again.read())[-1] == "2" * 24
        assert again.seconds == 1.5 * (len(again.read()) - 1) + 0.5
