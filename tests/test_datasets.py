"""Images: canonical order, disjoint splits, named errors where they are missing or wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from emq_lib import datasets
from emq_lib.errors import DatasetMismatchError, DatasetNotFoundError
from emq_lib.profiles import get_profile


def _rows(split):
    return {image.numpy().tobytes() for image in split.images}


def test_digits_splits_are_disjoint_and_complete(data):
    sizes = [len(split) for split in (data.train, data.validation, data.calibration, data.test)]
    assert sizes == [1000, 198, 256, 599]
    assert data.classes == 10
    assert not _rows(data.train) & _rows(data.test)
    assert not _rows(data.train) & _rows(data.validation)
    assert _rows(data.calibration) <= _rows(data.train)


def test_inputs_are_normalized_by_the_training_images(data):
    inputs = data.train.inputs().double()
    assert inputs.mean().abs() < 1e-5
    assert abs(inputs.std().item() - 1) < 1e-4


def test_order_does_not_depend_on_the_source():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8), rng.integers(0, 10, 50)
    shuffle = rng.permutation(50)
    first, second = (
        datasets._sorted_by_content(*pair) for pair in ((images, labels), (images[shuffle], labels[shuffle]))
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]


@pytest.mark.parametrize("root", [None, "absent"])
def test_missing_cifar10_says_what_to_do(root, tmp_path, monkeypatch):
    if root is None:
        monkeypatch.delenv("EMQ_DATA_ROOT", raising=False)
    else:
        monkeypatch.setenv("EMQ_DATA_ROOT", str(tmp_path / root))
    with pytest.raises(DatasetNotFoundError, match=r"Set EMQ_DATA_ROOT to a folder"):
        datasets.load_dataset(get_profile("cifar10-resnet20"))


def _tree(root, classes, images):
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = np.full((32, 32, 3), index, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")


def test_other_images_in_an_image_folder_are_refused(tmp_path, monkeypatch):
    _tree(tmp_path, datasets._CIFAR10_CLASSES, images=2)
    monkeypatch.setenv("EMQ_DATA_ROOT", str(tmp_path))
    with pytest.raises(DatasetMismatchError, match="are not CIFAR-10"):
        datasets.load_dataset(get_profile("cifar10-resnet20"))


def test_other_class_folders_are_refused(tmp_path, monkeypatch):
    _tree(tmp_path, ["cat", "dog"], images=1)
    monkeypatch.setenv("EMQ_DATA_ROOT", str(tmp_path))
    with pytest.raises(DatasetMismatchError, match="expected the class folders"):
        datasets.load_dataset(get_profile("cifar10-resnet20"))


def test_empty_class_folders_are_refused(tmp_path, monkeypatch):
    _tree(tmp_path, datasets._CIFAR10_CLASSES, images=0)
    monkeypatch.setenv("EMQ_DATA_ROOT", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match="Found no valid file"):
        datasets.load_dataset(get_profile("cifar10-resnet20"))


def test_cifar10_is_cut_as_the_protocol_says(cifar10):
    _, data = cifar10
    assert [len(s) for s in (data.train, data.validation, data.calibration, data.test)] == [
        45_000,
        5_000,
        1_024,
        10_000,
    ]
    assert torch.bincount(data.test.labels).tolist() == [1_000] * 10
    np.testing.assert_allclose(data.train.mean, [0.4914, 0.4822, 0.4465], atol=2e-3)
