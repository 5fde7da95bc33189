"""Images that are broken, of another form or in odd folders are refused by name, or read rightly."""

import dataclasses
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from emq_lib.core import datasets, images
from emq_lib.core.datasets import Inputs, Split
from emq_lib.core.errors import DatasetMismatchError, DatasetNotFoundError, InvalidParameterError


def _cifar_arrays(count=20):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 10
    return arrays


def _load(root, monkeypatch, dataset="cifar10", *, validation=5, calibration=5):
    monkeypatch.setenv("EMQ_DATA_ROOT", str(root))
    rng = np.random.default_rng(0)
    return datasets.load_images(dataset, validation_images=validation, calibration_images=calibration, rng=rng)


def _npz(path, **changes):
    np.savez(path, **{name: value for name, value in (_cifar_arrays() | changes).items() if value is not None})


OTHER_ARRAYS = {
    "no test images": {"x_test": None},
    "no training labels": {"y_train": None},
    "float images": {"x_train": np.zeros((20, 32, 32, 3))},
    "int64 images": {"x_train": np.zeros((20, 32, 32, 3), dtype=np.int64)},
    "channels first": {"x_train": np.zeros((20, 3, 32, 32), dtype=np.uint8)},
    "grey images": {"x_train": np.zeros((20, 32, 32), dtype=np.uint8)},
    "flat images": {"x_train": np.zeros((20, 3072), dtype=np.uint8)},
    "larger images": {"x_train": np.zeros((20, 64, 64, 3), dtype=np.uint8)},
    "no images": {"x_train": np.zeros((0, 32, 32, 3), dtype=np.uint8), "y_train": np.zeros(0, dtype=np.int64)},
    "one number": {"x_train": np.uint8(3)},
    "objects": {"x_train": np.array([None] * 20, dtype=object)},
    "negative labels": {"y_train": np.full(20, -1)},
    "huge labels": {"y_train": np.full(20, 2**62)},
    "unsigned huge labels": {"y_train": np.full(20, 2**64 - 1, dtype=np.uint64)},
    "label 10": {"y_train": np.arange(20) % 11},
    "NaN labels": {"y_train": np.full(20, np.nan)},
    "float labels": {"y_train": np.zeros(20)},
    "text labels": {"y_train": np.array(["cat"] * 20)},
    "boolean labels": {"y_train": np.zeros(20, dtype=bool)},
    "labels in columns": {"y_train": np.zeros((20, 1), dtype=np.int64)},
    "one-hot labels": {"y_train": np.eye(20, dtype=np.int64)},
    "too few labels": {"y_train": np.zeros(19, dtype=np.int64)},
    "too many test labels": {"y_test": np.zeros(21, dtype=np.int64)},
}


@pytest.mark.parametrize("case", OTHER_ARRAYS)
def test_an_npz_file_of_other_arrays_is_named(case, tmp_path, monkeypatch):
    path = tmp_path / "cifar10.npz"
    _npz(path, **OTHER_ARRAYS[case])
    before = path.read_bytes()
    with pytest.raises(DatasetMismatchError, match=r"cifar10\.npz"):
        _load(tmp_path, monkeypatch)
    assert path.read_bytes() == before


def _archive(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _whole():
    file = io.BytesIO()
    _npz(file)
    return file.getvalue()


def _array_file():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def _lying_header():
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 32, 32, 3), }"
    array = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + b"\0" * 64
    return _archive({f"{name}.npy": array for name in _cifar_arrays()})


BROKEN_FILES = {
    "empty": lambda: b"",
    "text": lambda: b"these are no images",
    "cut in the middle": lambda: _whole()[: len(_whole()) // 2],
    "cut at the end": lambda: _whole()[:-10],
    "a byte changed": lambda: _whole()[:5_000] + b"\xff\x00" + _whole()[5_002:],
    "an npy file": _array_file,
    "a pickle": lambda: pickle.dumps({"x_train": 3}),
    "an empty archive": lambda: _archive({}),
    "texts in an archive": lambda: _archive({f"{name}.npy": b"text" for name in _cifar_arrays()}),
    "a header that lies": _lying_header,
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_npz_file_is_named(case, tmp_path, monkeypatch):
    path = tmp_path / "cifar10.npz"
    path.write_bytes(BROKEN_FILES[case]())
    with pytest.raises(DatasetMismatchError, match=r"cifar10\.npz"):
        _load(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "content", [None, b"", pickle.dumps({"data": 3}), b"text"], ids=["absent", "empty", "pickle", "text"]
)
def test_broken_batches_are_named(content, tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(DatasetMismatchError, match="cifar-10-batches-py is incomplete or altered"):
        _load(tmp_path, monkeypatch)


@pytest.fixture
def tree(tmp_path):
    """Return the root of a tree of CIFAR-10's form with two random images per class."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in images.CIFAR10_CLASSES:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path


def _encoded(kind, shape=(32, 32, 3)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)).save(file, kind)
    return file.getvalue()


BROKEN_IMAGES = {
    "zero bytes.png": lambda: b"",
    "text.jpg": lambda: b"no image",
    "cut.jpg": lambda: _encoded("JPEG")[:-300],
    "cut.png": lambda: _encoded("PNG")[:-900],
    "damaged.png": lambda: _encoded("PNG")[:400] + b"\0" * 60 + _encoded("PNG")[460:],
    "header alone.png": lambda: _encoded("PNG")[:20],
    "larger.png": lambda: _encoded("PNG", (32, 33, 3)),
    "smaller.jpeg": lambda: _encoded("JPEG", (31, 32, 3)),
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_a_broken_image_is_named(name, tree, monkeypatch):
    (tree / "test" / "frog" / name).write_bytes(BROKEN_IMAGES[name]())
    with pytest.raises(DatasetMismatchError, match=rf"frog/{name}"):
        _load(tree, monkeypatch)


def test_a_dangling_link_is_named(tree, monkeypatch):
    (tree / "train" / "cat" / "gone.png").symlink_to(tree / "nowhere.png")
    with pytest.raises(DatasetMismatchError, match=r"cat/gone\.png cannot be read as an image"):
        _load(tree, monkeypatch)


@pytest.mark.parametrize("kind", ["empty", "file", "link to itself"])
def test_folders_without_images_are_named(kind, tree, monkeypatch):
    folder = tree / "train" / "cat"
    for path in folder.iterdir():
        path.unlink()
    if kind != "empty":
        folder.rmdir()
    if kind == "file":
        folder.write_bytes(b"")
    if kind == "link to itself":
        folder.symlink_to(folder)
    with pytest.raises((DatasetNotFoundError, DatasetMismatchError), match="train.*cat"):
        _load(tree, monkeypatch)


def test_trees_list_as_torchvision_does(tree):
    nested = tree / "train" / "cat" / "more" / "0"
    nested.mkdir(parents=True)
    for name in ("10.png", "9.PNG", "b.jpeg", "notes.txt"):
        (nested / name).write_bytes(b"")
    truth = ImageFolder(str(tree / "train"))
    found = images.find_images(tree / "train")
    assert list(found.classes) == truth.classes
    assert [(str(path), label) for path, label in found.samples] == truth.samples


def test_hidden_folders_and_files_count_for_nothing(tree):
    before = images.find_images(tree / "train")
    for hidden in (tree / "train" / ".cache", tree / "train" / "cat" / ".thumbnails"):
        hidden.mkdir()
        (hidden / "0.png").write_bytes(b"")
    (tree / "train" / "cat" / "._0.png").write_bytes(b"")
    assert images.find_images(tree / "train") == before


def test_links_are_followed_and_nothing_counts_twice(tree):
    before = images.find_images(tree / "train")
    cat = tree / "train" / "cat"
    (cat / "again").symlink_to(cat)  # a loop
    (cat / "up").symlink_to(tree / "train" / "cat" / "again")
    (cat / "same.png").symlink_to(cat / "1.png")
    found = images.find_images(tree / "train")
    assert found == before
    elsewhere = tree / "elsewhere"
    elsewhere.mkdir()
    os.rename(cat / "1.png", elsewhere / "1.png")
    (cat / "same.png").unlink()
    (cat / "linked").symlink_to(elsewhere)
    assert len(images.find_images(tree / "train").samples) == len(before.samples)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_levels_of_16_bits_keep_their_high_byte(ending, tmp_path):
    levels = np.arange(256 * 4).reshape(32, 32).astype(np.uint16) * 64
    path = tmp_path / f"grey.{ending}"
    Image.fromarray(levels).save(path)
    found = np.asarray(images.open_image(path))
    assert found.shape == (32, 32, 3)
    np.testing.assert_array_equal(found, np.repeat((levels // 256)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I"])
def test_other_modes_are_read_as_pillow_shows_them(mode, tmp_path):
    grey = np.random.default_rng(3).integers(0, 2, (8, 8)).astype(np.uint8) * 255
    image = Image.fromarray(grey).convert(mode) if mode != "I" else Image.fromarray((grey.astype(np.int32)) * 257)
    path = tmp_path / f"image.{'tif' if mode in ('CMYK', 'I') else 'png'}"
    image.save(path)
    np.testing.assert_array_equal(np.asarray(images.open_image(path))[:, :, 0], grey)


@pytest.mark.parametrize(
    "pixels",
    [np.full((4, 4), 0.5, dtype=np.float32), np.full((4, 4), 2**20, dtype=np.int32), -np.ones((4, 4), dtype=np.int32)],
)
def test_pixels_of_no_8_or_16_bits_are_refused(pixels, tmp_path):
    path = tmp_path / "odd.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(DatasetMismatchError, match=r"odd\.tif cannot be read as an image \(its pixels"):
        images.open_image(path)


@pytest.fixture
def imagenet(tmp_path):
    """Return the root of a tree of ImageNet's form: two classes of two images in either part."""
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            folder = tmp_path / "imagenet" / part / name
            folder.mkdir(parents=True)
            for index in range(2):
                (folder / f"{index}.JPEG").write_bytes(_encoded("JPEG", (40 + index, 60, 3)))
    return tmp_path


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "cut"])
def test_a_broken_image_of_imagenet_is_named(part, content, imagenet, monkeypatch):
    path = imagenet / "imagenet" / part / "n02" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:-400] if content is None else content)
    with pytest.raises(DatasetMismatchError, match=rf"{part}/n02/1\.JPEG cannot be read"):
        _load(imagenet, monkeypatch, "imagenet", calibration=4)


def test_imagenet_with_links_and_hidden_folders(imagenet, monkeypatch):
    before = _load(imagenet, monkeypatch, "imagenet", calibration=4)
    (imagenet / "imagenet" / "train" / ".cache").mkdir()
    (imagenet / "imagenet" / "val" / "n01" / "loop").symlink_to(imagenet / "imagenet" / "val")
    found = _load(imagenet, monkeypatch, "imagenet", calibration=4)
    assert len(found.calibration) == 4
    assert len(found.test) == len(before.test) + 2  # the link makes images of n02 into images of n01


@pytest.mark.parametrize("count", [0, -5, 2.5, "all", None, True, float("nan")])
@pytest.mark.parametrize("which", ["validation_images", "calibration_images"])
@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet"])
def test_numbers_of_images_that_are_none_are_refused(dataset, which, count):
    given = {"validation_images": 4, "calibration_images": 4} | {which: count}
    with pytest.raises(InvalidParameterError, match=f"{which} must be a whole number"):
        datasets.load_images(dataset, **given, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    "numbers", [{"validation": 10**9}, {"calibration": 10**9}, {"validation": 700, "calibration": 600}]
)
def test_more_images_than_there_are_are_refused(numbers, tmp_path, monkeypatch):
    with pytest.raises(InvalidParameterError, match=r"are more than the 1198 training images"):
        _load(tmp_path, monkeypatch, "digits", **numbers)


@pytest.mark.parametrize("dataset", ["mnist", "", None, 3, ["digits"]])
def test_an_unknown_dataset_is_refused(dataset, tmp_path, monkeypatch):
    with pytest.raises(InvalidParameterError, match="unknown dataset"):
        _load(tmp_path, monkeypatch, dataset)


@pytest.mark.parametrize("rng", [None, 0, np.random, torch.Generator()])
def test_the_source_of_randomness_is_checked(rng, imagenet, monkeypatch):
    monkeypatch.setenv("EMQ_DATA_ROOT", str(imagenet))
    with pytest.raises(InvalidParameterError, match="rng must be"):
        datasets.load_images("imagenet", validation_images=1, calibration_images=2, rng=rng)


SPLIT = Split(
    torch.arange(4 * 3 * 5 * 5, dtype=torch.uint8).view(4, 3, 5, 5),
    torch.tensor([0, 1, 2, 1]),
    torch.tensor([0.4, 0.5, 0.6]),
    torch.tensor([0.2, 0.25, 0.3]),
)


@pytest.mark.parametrize(
    ("field", "value"),
    [("images", value) for value in (None, np.zeros((4, 3, 5, 5), np.uint8), SPLIT.images.float(), SPLIT.images[0])]
    + [("images", value) for value in (SPLIT.images[:3], SPLIT.images[:, :2], SPLIT.images[:, :, :0])]
    + [("labels", torch.tensor(value)) for value in ([0, 1, 2], [0, 1, 2, -1], [0, 1, -100, 2], [0.0, 1, 2, 1], [])]
    + [("labels", value) for value in (None, [0, 1, 2, 1], SPLIT.labels[None], SPLIT.labels.int())]
    + [(name, torch.tensor(value)) for name in ("mean", "std") for value in ([0.5], [], [0.5, 0.5, float("nan")], 0.5)]
    + [(name, torch.full((3,), float("inf"))) for name in ("mean", "std")]
    + [("std", torch.tensor(value)) for value in ([0.2, 0.0, 0.2], [0.2, -0.1, 0.2])]
    + [("mean", None), ("std", [0.2, 0.2, 0.2])],
)  # fmt: skip
def test_a_split_of_impossible_parts_is_refused(field, value):
    with pytest.raises(InvalidParameterError, match=r"images|labels|mean|std"):
        dataclasses.replace(SPLIT, **{field: value})


BAD_INDICES = [0, -1, None, ..., "all", [0, 1], (slice(2), 0), 1.5, True, np.array([0, 1])]
BAD_INDICES += [torch.tensor(value) for value in (0, True, [0, 4], [-5], [True] * 3, [True] * 5, [0.5], [[0, 1]])]
BAD_INDICES += [torch.tensor([1, 0, 1, 0], dtype=torch.uint8), slice("a"), slice(None, None, -1), slice(None, None, 0)]


@pytest.mark.parametrize("index", BAD_INDICES, ids=str)
@pytest.mark.parametrize("of", [SPLIT, Inputs(torch.zeros(4, 3))], ids=["split", "inputs"])
def test_an_index_that_selects_no_images_is_refused(of, index):
    with pytest.raises(InvalidParameterError, match="images"):
        of[index]


@pytest.mark.parametrize(
    "index",
    [slice(1, 3), slice(9, 12), torch.tensor([3, 0, 0]), torch.tensor([-1]), SPLIT.labels == 1, SPLIT.labels > 9],
)
def test_selected_images_are_those_of_a_loop(index):
    found = SPLIT[index]
    rows = torch.arange(4)[index].tolist()
    assert len(found) == len(rows)
    inputs = [
        [(SPLIT.images[row, channel].double() / 255 - SPLIT.mean[channel]) / SPLIT.std[channel] for channel in range(3)]
        for row in rows
    ]
    truth = torch.stack([torch.stack(channels) for channels in inputs]).float() if rows else torch.zeros(0, 3, 5, 5)
    torch.testing.assert_close(found.inputs(), truth)
    assert found.labels.tolist() == [SPLIT.labels[row].item() for row in rows]


@pytest.mark.parametrize("tensor", [None, [[1.0]], np.zeros((2, 3)), torch.tensor(3.0), "images"])
def test_inputs_that_are_none_are_refused(tensor):
    with pytest.raises(InvalidParameterError, match="inputs must be"):
        Inputs(tensor)


def test_inputs_may_be_written_to():
    inputs = Inputs(torch.ones(2, 3))
    inputs.inputs().zero_()
    inputs[:1].inputs().zero_()
    assert (inputs.tensor == 1).all()


@pytest.mark.parametrize("part", ["train", "validation", "calibration", "test"])
def test_labels_outside_the_classes_are_named(part):
    parts = dict.fromkeys(("train", "validation", "calibration", "test"), SPLIT)
    odd = dataclasses.replace(SPLIT, labels=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(DatasetMismatchError, match=f"The {part} images have labels up to 3, but there are 3 classes"):
        datasets.ImageData(**parts | {part: odd}, digest="", classes=3)
