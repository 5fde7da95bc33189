"""Images: canonical order, disjoint splits, named errors where they are missing or wrong."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights

from book.studies import bench, checkpoints, networks
from book.studies.bench import load_bench
from book.studies.images import load_dataset
from book.studies.networks import build_network
from emq_lib.core import datasets, images, models
from emq_lib.core.errors import DatasetMismatchError, DatasetNotFoundError
from emq_lib.core.profiles import get_profile


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
    pixels, labels = rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8), rng.integers(0, 10, 50)
    shuffle = rng.permutation(50)
    first, second = (
        datasets._sorted_by_content(*pair) for pair in ((pixels, labels), (pixels[shuffle], labels[shuffle]))
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
        load_dataset(get_profile("cifar10-resnet20"))


def _tree(root, classes, count):
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.full((32, 32, 3), index, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")


def test_other_images_in_an_image_folder_are_refused(tmp_path, monkeypatch):
    _tree(tmp_path, images.CIFAR10_CLASSES, count=2)
    monkeypatch.setenv("EMQ_DATA_ROOT", str(tmp_path))
    with pytest.raises(DatasetMismatchError, match="are not CIFAR-10"):
        load_dataset(get_profile("cifar10-resnet20"))


def test_other_class_folders_are_refused(tmp_path, monkeypatch):
    _tree(tmp_path, ["cat", "dog"], count=1)
    monkeypatch.setenv("EMQ_DATA_ROOT", str(tmp_path))
    with pytest.raises(DatasetMismatchError, match="expected the class folders"):
        load_dataset(get_profile("cifar10-resnet20"))


def test_empty_class_folders_are_refused(tmp_path, monkeypatch):
    _tree(tmp_path, images.CIFAR10_CLASSES, count=0)
    monkeypatch.setenv("EMQ_DATA_ROOT", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match=r"no images .* in the class folders"):
        load_dataset(get_profile("cifar10-resnet20"))


@pytest.mark.slow
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


@pytest.mark.parametrize("shape", [(300, 400), (700, 231)])
def test_imagenet_is_seen_as_torchvisions_networks_see_it(shape):
    """The truth is the preset that ships with the published weights."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    pixels = np.stack([rows % 256, columns % 256, (rows * columns) % 256], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels)
    truth = ResNet18_Weights.IMAGENET1K_V1.transforms()(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    split = datasets.Split(images.preprocess_imagenet(image)[None], torch.zeros(1, dtype=torch.int64), mean, std)
    torch.testing.assert_close(split.inputs()[0], truth, rtol=0, atol=1e-5)


@pytest.fixture
def tiny_imagenet(tmp_path, monkeypatch):
    """Three classes of made-up images where a reader's ImageNet would be, and a network for three classes."""
    generator = np.random.default_rng(7)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            folder = tmp_path / "images" / "imagenet" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    monkeypatch.setenv("EMQ_DATA_ROOT", str(tmp_path / "images"))
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path / "studies"))
    monkeypatch.setitem(models.MODELS, "imagenet-resnet18", lambda: models.CifarResNet(8, classes=3, width=4))
    monkeypatch.setattr(checkpoints, "load_pretrained", lambda profile: networks.fresh_model(profile).eval())
    profile = get_profile("imagenet-resnet18")
    return dataclasses.replace(profile, calibration_images=8, bench_configs=2, stratified_configs=1)


@pytest.mark.slow
def test_a_tree_of_imagenets_form_gives_a_bench(tiny_imagenet, monkeypatch):
    data = load_dataset(tiny_imagenet)
    assert [len(data.calibration), len(data.test), data.classes] == [8, 6, 3]
    checkpoints.build_checkpoint(tiny_imagenet, data)
    monkeypatch.setattr(bench, "one_off_configs", lambda slots, choices: np.full((1, slots), 3, dtype=np.int8))
    bench.build_bench(tiny_imagenet, data)
    table = load_bench(tiny_imagenet).table
    assert len(table) == 6
    assert table["n_a"].eq(3).all()
    assert table["bits"].map(len).eq(6).all()


def test_a_broken_imagenet_tree_is_named(tiny_imagenet, tmp_path):
    root = tmp_path / "images" / "imagenet"
    with pytest.raises(DatasetNotFoundError, match="has 12 images; calibration needs 20"):
        load_dataset(dataclasses.replace(tiny_imagenet, calibration_images=20))
    more = networks.layer_table(networks.fresh_model(tiny_imagenet), tiny_imagenet)["channels"].iloc[-1] + 1
    data = load_dataset(tiny_imagenet)
    checkpoints.build_checkpoint(tiny_imagenet, data)
    with pytest.raises(DatasetMismatchError, match="4 classes, but the checkpoint .* tells 3 apart"):
        build_network(tiny_imagenet, dataclasses.replace(data, classes=int(more)))
    (root / "val" / "n04").mkdir()
    with pytest.raises(DatasetNotFoundError, match="n04"):
        load_dataset(tiny_imagenet)
    shutil.rmtree(root / "val" / "n04")
    shutil.rmtree(root / "val" / "n02")
    with pytest.raises(DatasetMismatchError, match=r"class folders \['n02'\]"):
        load_dataset(tiny_imagenet)
    shutil.rmtree(root)
    with pytest.raises(DatasetNotFoundError, match="your own copy of ImageNet"):
        load_dataset(tiny_imagenet)
