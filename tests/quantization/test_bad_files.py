"""Packed files that sign for what no network is, places that cannot be written, resume files of something else."""

import dataclasses
import errno
import json
import os
import pathlib
import pickle
import stat

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch import nn

from emq_lib.core.datasets import Inputs, Split
from emq_lib.core.errors import (
    CorruptArtefactError,
    DiskFullError,
    InvalidParameterError,
    MissingArtefactError,
    UnwritablePathError,
)
from emq_lib.core.graphs import describe_layers, fold_batchnorm
from emq_lib.core.quantizers import ActivationRange, choose_activation_ranges
from emq_lib.quantization import packed, qat
from emq_lib.quantization.onnx_export import save_onnx
from emq_lib.quantization.quantize import quantize_model


class Network(nn.Module):
    """A layer of 5 bits, one of 3, and one that stays in floating point."""

    def __init__(self):
        super().__init__()
        self.c1, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.norm(self.c1(x)).relu().mean((2, 3)))


def _built(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network().eval()


IMAGES = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(1))
QUANTIZED = quantize_model(_built(), IMAGES, bits={"c1": 5, "fc": 3}, verbose=False)


@pytest.fixture
def path(tmp_path):
    place = tmp_path / "network.safetensors"
    packed.save_network(place, QUANTIZED, metadata={"note": "a"})
    return place


def _read(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    signed = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["emq-packed"])
    return {key: value for key, value in signed.items() if key != "sha256"}, load(content)["payload"].copy()


def _sign(path, description, payload, *, digest=None):
    """Write what a forger would: a file that vouches for itself."""
    digest = packed._digest(description, payload) if digest is None else digest
    text = json.dumps(description | {"sha256": digest}, sort_keys=True)
    path.write_bytes(save({"payload": payload}, metadata={"emq-packed": text}))


def _layer(place, value):
    def change(description, payload):
        description["layers"][0][place] = value
        return description, payload

    return change


def _tensor(place, value):
    def change(description, payload):
        description["rest"][0][place] = value
        return description, payload

    return change


def _whole(**changed):
    return lambda description, payload: (description | changed, payload)


def _payload(first, content):
    """Change bytes of the payload; it begins with c1: 68 bytes of codes, 4 scales, 4 zero points, 4 biases."""

    def change(description, payload):
        payload[first : first + len(content)] = np.frombuffer(content, np.uint8)
        return description, payload

    return change


def _float(value):
    return np.float32(value).tobytes()


CODES, SCALES = -(-4 * 27 * 5 // 8), 4 * 4
FORGED = {
    "unchanged layers as text": _whole(layers="c1"),
    "no layers": _whole(layers=None),
    "layers as numbers": _whole(layers=[1, 2]),
    "layers of one part": _whole(layers=[["c1"]]),
    "layers of many parts": _whole(layers=[["c1", [4], 5, True, None, 1]]),
    "no rest": _whole(rest=None),
    "metadata as list": _whole(metadata=["a"]),
    "metadata as number": _whole(metadata=3),
    "text as number": _whole(metadata={"a": 3}),
    "deep text": _whole(metadata={"a": [[[[[]]]]]}),
    "name as number": _layer(0, 3),
    "name as null": _layer(0, None),
    "name twice": _layer(0, "fc"),
    "float shape": _layer(1, [4.0, 3, 3, 3]),
    "text shape": _layer(1, "4333"),
    "shape of flags": _layer(1, [True, 3, 3, 3]),
    "negative shape": _layer(1, [-4, -3, 3, 3]),
    "empty shape": _layer(1, []),
    "zero shape": _layer(1, [4, 0, 3, 3]),
    "shape of nulls": _layer(1, [None]),
    "huge shape": _layer(1, [2**62, 2**62, 3, 3]),
    "another shape": _layer(1, [4, 3, 3, 4]),
    "text bits": _layer(2, "5"),
    "float bits": _layer(2, 5.0),
    "bits 0": _layer(2, 0),
    "bits 9": _layer(2, 9),
    "bits as flag": _layer(2, True),
    "no bits": _layer(2, None),
    "negative bits": _layer(2, -5),
    "bias as number": _layer(3, 1),
    "bias as text": _layer(3, "yes"),
    "no bias": _layer(3, False),
    "range as text": _layer(4, "0.1"),
    "range as number": _layer(4, 0.1),
    "short range": _layer(4, [0.1, 0]),
    "range scale 0": _layer(4, [0, 0, 8]),
    "range scale negative": _layer(4, [-0.1, 0, 8]),
    "range scale NaN": _layer(4, [float("nan"), 0, 8]),
    "range scale infinite": _layer(4, [float("inf"), 0, 8]),
    "range scale as text": _layer(4, ["0.1", 0, 8]),
    "range zero point negative": _layer(4, [0.1, -1, 8]),
    "range zero point far": _layer(4, [0.1, 10**9, 8]),
    "range zero point 16 of 4 bits": _layer(4, [0.1, 16, 4]),
    "range zero point as float": _layer(4, [0.1, 0.0, 8]),
    "range bits 99": _layer(4, [0.1, 0, 99]),
    "range bits 0": _layer(4, [0.1, 0, 0]),
    "range bits as text": _layer(4, [0.1, 0, "8"]),
    "tensor name": _tensor(0, None),
    "tensor name of a layer": _tensor(0, "c1"),
    "tensor shape negative": _tensor(1, [-4]),
    "tensor shape float": _tensor(1, [4.0]),
    "tensor shape text": _tensor(1, "4"),
    "tensor shape another": _tensor(1, [5]),
    "tensor type object": _tensor(2, "O"),
    "tensor type object of bytes": _tensor(2, "|O"),
    "tensor type text": _tensor(2, "<U1"),
    "tensor type void": _tensor(2, "|V4"),
    "tensor type record": _tensor(2, "i4,i4"),
    "tensor type unknown": _tensor(2, "bfloat16"),
    "tensor type number": _tensor(2, 4),
    "tensor type long double": _tensor(2, "<f16"),
    "scale 0": _payload(CODES, _float(0)),
    "scale negative": _payload(CODES, _float(-1)),
    "scale NaN": _payload(CODES, _float("nan")),
    "scale infinite": _payload(CODES, _float("inf")),
    "zero point 255 of 5 bits": _payload(CODES + SCALES, b"\xff"),
    "zero point 32 of 5 bits": _payload(CODES + SCALES + 3, b"\x20"),
    "bias NaN": _payload(CODES + SCALES + 4, _float("nan")),
    "bias infinite": _payload(CODES + SCALES + 4, _float("-inf")),
    "spare bits": _payload(CODES - 1, b"\xff"),
    "short payload": lambda description, payload: (description, payload[:-1]),
    "long payload": lambda description, payload: (description, np.append(payload, np.uint8(0))),
    "no payload": lambda description, payload: (description, payload[:0]),
    "later format": _whole(format_version=99),
    "format as text": _whole(format_version="2"),
    "no format": _whole(format_version=None),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_file_that_signs_for_no_network_is_refused(path, change):
    description, payload = _read(path)
    _sign(path, description, payload)
    packed.load_network(path, _built(1))  # the forger signs well
    _sign(path, *change(description, payload))
    before = path.read_bytes()
    for load_it in (packed.load_packed, lambda place: packed.load_network(place, _built(1))):
        with pytest.raises(CorruptArtefactError, match=r"network\.safetensors"):
            load_it(path)
    assert path.read_bytes() == before


def test_a_file_that_signs_for_deep_or_odd_json_is_refused(path):
    for text in (
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        "null",
        "3",
        '"text"',
        "",
        "{",
        "NaN",
    ):
        path.write_bytes(save({"payload": np.zeros(3, np.uint8)}, metadata={"emq-packed": text}))
        with pytest.raises(CorruptArtefactError):
            packed.load_packed(path)
    for digest in ("", "0" * 64, "no hash"):
        _sign(path, *_read_or_make(path), digest=digest)
        with pytest.raises(CorruptArtefactError, match="SHA-256"):
            packed.load_packed(path)


def _read_or_make(path):
    packed.save_network(path, QUANTIZED)
    return _read(path)


def test_a_file_of_another_network_is_refused(path):
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    for model in (other, nn.Sequential(), nn.Linear(3, 3)):
        with pytest.raises(InvalidParameterError, match="another architecture"):
            packed.load_network(path, model)
    for model in (None, Network, _built().state_dict()):
        with pytest.raises(InvalidParameterError, match="torch.nn.Module"):
            packed.load_network(path, model)


def _fields(**changed):
    weight = QUANTIZED.layers["c1"].weight
    return {"c1": dataclasses.replace(weight, **changed)}


SCALE, POINTS = QUANTIZED.layers["c1"].weight.scale, QUANTIZED.layers["c1"].weight.zero_point
UNPACKABLE = {
    "scale 0": (_fields(scale=SCALE * 0), {}, {}),
    "scale negative": (_fields(scale=-SCALE), {}, {}),
    "scale NaN": (_fields(scale=SCALE * float("nan")), {}, {}),
    "zero point": (_fields(zero_point=POINTS | 224), {}, {}),
    "no weights": (_fields(codes=torch.zeros(4, 0, dtype=torch.uint8)), {}, {}),
    "bias NaN": (_fields(), {"c1": torch.full((4,), float("nan"))}, {}),
    "range of nothing": (_fields(), {}, {"c2": ActivationRange(0.1, 0, 8)}),
}


@pytest.mark.parametrize(("weights", "biases", "inputs"), UNPACKABLE.values(), ids=UNPACKABLE)
def test_what_would_be_refused_on_reading_is_not_written(path, weights, biases, inputs):
    before = path.read_bytes()
    with pytest.raises(InvalidParameterError):
        packed.save_packed(path, weights, biases, inputs=inputs)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "network", [None, _built(), "network", QUANTIZED.model, {}], ids=lambda value: type(value).__name__
)
def test_what_is_no_quantized_network_is_not_packed(tmp_path, network):
    with pytest.raises(InvalidParameterError, match="network must be quantized"):
        packed.save_network(tmp_path / "network.safetensors", network)
    with pytest.raises(InvalidParameterError, match="metadata"):
        packed.save_network(tmp_path / "network.safetensors", QUANTIZED, metadata=["text"])
    assert not os.listdir(tmp_path)


WRITERS = {
    "packed": lambda path: packed.save_network(path, QUANTIZED),
    "onnx": lambda path: save_onnx(path, QUANTIZED, IMAGES[:1]),
}


@pytest.mark.parametrize("place", [None, 3, b"file", ["file"], "a\0b"])
@pytest.mark.parametrize("call", [*WRITERS.values(), packed.load_packed, packed.header_bytes])
def test_what_is_no_path_is_named(call, place):
    with pytest.raises(InvalidParameterError, match="path of a file"):
        call(place)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_places_that_cannot_be_written_are_named_and_nothing_is_left(tmp_path, write, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "folder", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(UnwritablePathError, match="cannot be written"):
            write(place)
    monkeypatch.setattr(pathlib.Path, "write_bytes", _full)
    with pytest.raises(DiskFullError, match="No room"):
        write(tmp_path / "file")
    monkeypatch.setattr(pathlib.Path, "write_bytes", _forbidden)
    with pytest.raises(UnwritablePathError, match="permission"):
        write(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def _full(path, content):
    path.open("wb").write(content[:10])
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def _forbidden(path, content):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_new_files_have_the_mode_that_the_user_asked_for(tmp_path, write):
    before = os.umask(0o022)
    try:
        write(tmp_path / "network")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "network").stat().st_mode) == 0o644


def test_reading_a_folder_or_nothing_is_named(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        for call in (packed.load_packed, packed.header_bytes):
            with pytest.raises(MissingArtefactError):
                call(place)


@pytest.mark.parametrize(
    "example",
    [
        None,
        "image",
        3,
        IMAGES[:0],
        IMAGES[:2],
        IMAGES[:1].double(),
        IMAGES[:1, :2],
        IMAGES[:1].flatten(1),
        IMAGES.numpy(),
    ]
    + [(IMAGES[:1],), torch.tensor(1.0), IMAGES[0]],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'shape', '')}",
)
def test_examples_that_the_network_does_not_take(tmp_path, example):
    with pytest.raises(InvalidParameterError, match="example"):
        save_onnx(tmp_path / "network.onnx", QUANTIZED, example)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("network", [None, "network", Network, {}])
def test_what_is_no_network_has_no_onnx(tmp_path, network):
    with pytest.raises(InvalidParameterError, match="torch.nn.Module"):
        save_onnx(tmp_path / "network.onnx", network, IMAGES[:1])


SPLIT = Split(
    torch.randint(0, 256, (12, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)),
    torch.arange(12) % 3,
    torch.full((3,), 0.5),
    torch.full((3,), 0.25),
)
RECIPE = qat.QatRecipe(epochs=2, batch_size=6, crop_padding=1, flip=False, precision="float32")
FOLDED = fold_batchnorm(_built())
LAYERS = describe_layers(FOLDED, IMAGES[:1], pinned={}, tied={})
RANGES = choose_activation_ranges(FOLDED, LAYERS, Inputs(SPLIT.inputs()), bits=8)


def _train(resume, **changed):
    given = {
        "model": FOLDED,
        "config": (3, 4),
        "images": SPLIT,
        "ranges": RANGES,
        "seed": 0,
        "recipe": RECIPE,
    } | changed
    return qat.train_quantized(
        given["model"],
        LAYERS,
        given["config"],
        given["images"],
        given["ranges"],
        generator=torch.Generator().manual_seed(given["seed"]),
        recipe=given["recipe"],
        resume=resume,
    )


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Return a resume file after one of two epochs."""
    epochs, run = [], qat.train_epoch

    def stops(*args, **kwargs):
        if epochs:
            raise KeyboardInterrupt
        epochs.append(1)
        run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(qat, "train_epoch", stops)
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path / "qat.resume")
    return tmp_path / "qat.resume"


def _spoil(name):
    parts = {field: getattr(SPLIT, field).clone() for field in ("images", "labels", "mean", "std")}
    parts[name].view(-1)[0] += 1
    return Split(**parts)


OTHERS = {
    "seed": {"seed": 1},
    **{name: {"images": _spoil(name)} for name in ("images", "labels", "mean", "std")},
    "fewer images": {"images": SPLIT[:6]},
    "order of images": {"images": SPLIT[torch.arange(12).flip(0)]},
    "ranges": {"ranges": RANGES | {"fc": dataclasses.replace(RANGES["fc"], scale=RANGES["fc"].scale * 2)}},
    "bits of ranges": {"ranges": RANGES | {"fc": dataclasses.replace(RANGES["fc"], bits=7)}},
    "weights": {"model": fold_batchnorm(_built(1))},
    "bits": {"config": (4, 3)},
    **{
        name: {"recipe": dataclasses.replace(RECIPE, **{name: value})}
        for name, value in {"max_lr": 1e-4, "distillation": 0.1, "epochs": 3, "flip": True, "batch_size": 4}.items()
    },
}


@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
def test_a_training_resumes_nothing_but_itself(interrupted, changed):
    before = interrupted.read_bytes()
    with pytest.raises(CorruptArtefactError, match="belongs to another training"):
        _train(interrupted, **changed)
    assert interrupted.read_bytes() == before


def test_a_training_resumes_no_other_code(interrupted, monkeypatch):
    monkeypatch.setattr(qat, "code_hash", lambda *_roots: "another")
    with pytest.raises(CorruptArtefactError, match="belongs to another training"):
        _train(interrupted)


def test_a_training_that_was_interrupted_ends_as_if_it_had_not_been(interrupted, tmp_path):
    expected = _train(None)
    assert torch.equal(_train(interrupted)(IMAGES), expected(IMAGES))
    assert os.listdir(tmp_path) == ["qat.resume"]


def _forged(path, **changed):
    torch.save(torch.load(path) | changed, path)


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no training"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"identity": os.system})),
    "list": lambda path: torch.save([1, 2], path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "empty dictionary": lambda path: torch.save({}, path),
    "packed network": lambda path: packed.save_network(path, QUANTIZED),
    "no student": lambda path: torch.save({k: v for k, v in torch.load(path).items() if k != "student"}, path),
    "student of another network": lambda path: _forged(path, student={"weight": torch.zeros(3)}),
    "optimizer of nothing": lambda path: _forged(path, optimizer={}),
    "generator as text": lambda path: _forged(path, generator="seed"),
    "results as number": lambda path: _forged(path, results=3),
    "seconds as text": lambda path: _forged(path, seconds="long"),
}


@pytest.mark.parametrize("spoil", FOREIGN.values(), ids=FOREIGN)
def test_resume_files_that_are_none_are_named(interrupted, spoil):
    spoil(interrupted)
    before = interrupted.read_bytes()
    with pytest.raises(CorruptArtefactError, match=r"qat\.resume"):
        _train(interrupted)
    assert interrupted.read_bytes() == before


def test_a_full_disk_keeps_the_epoch_before(interrupted, tmp_path, monkeypatch):
    before = interrupted.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", _full)
        with pytest.raises(DiskFullError, match=r"qat\.resume"):
            _train(interrupted)
    assert interrupted.read_bytes() == before
    assert os.listdir(tmp_path) == ["qat.resume"]
    assert torch.equal(_train(interrupted)(IMAGES), _train(None)(IMAGES))
