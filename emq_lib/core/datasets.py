"""Images as uint8 tensors, in one canonical order, with the fixed splits of a profile.

Every source of the same images (torchvision's batches, an ImageFolder tree, an npz file) lists them in another order.
They are therefore sorted by a hash of their pixels: the splits depend on the images alone, and a digest over the
sorted hashes says whether two machines hold the same images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from emq_lib.core.errors import DatasetMismatchError, DatasetNotFoundError

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder


CIFAR10_DIGEST = "3ef2f9db288a8f54943411ef64a5b5cbe16686916bac3fcd64e24c0ef4a131f8"
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Split:
    """A set of images with what turns them into network inputs.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        mean: per-channel mean of the training images, scaled to 0..1, shape (C,).
        std: per-channel standard deviation, likewise.
    """

    images: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: slice | torch.Tensor) -> Split:
        """Return the images that a slice or an index tensor selects."""
        return Split(self.images[index], self.labels[index], self.mean, self.std)

    def inputs(self) -> torch.Tensor:
        """Return normalized float32 inputs in channels-last memory, shape (N, C, H, W)."""
        shape = (1, -1, 1, 1)
        scaled = self.images.to(torch.float32).div_(255).sub_(self.mean.view(shape)).div_(self.std.view(shape))
        return scaled.contiguous(memory_format=torch.channels_last)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on another device."""
        return Split(*(tensor.to(device) for tensor in (self.images, self.labels, self.mean, self.std)))


@dataclass(frozen=True)
class Inputs:
    """Network inputs that are at hand as they are; used like a :class:`Split`, but without labels.

    Attributes:
        tensor: float32, shape (N, C, H, W).
    """

    tensor: torch.Tensor

    def __len__(self) -> int:
        """Return the number of inputs."""
        return len(self.tensor)

    def __getitem__(self, index: slice | torch.Tensor) -> Inputs:
        """Return those that a slice or an index tensor selects."""
        return Inputs(self.tensor[index])

    def inputs(self) -> torch.Tensor:
        """Return a copy, which a network that normalizes its input in place may overwrite."""
        return self.tensor.clone()


@dataclass(frozen=True)
class ImageData:
    """The fixed splits of a study; `calibration` is a part of `train`, `digest` identifies the images."""

    train: Split
    validation: Split
    calibration: Split
    test: Split
    digest: str
    classes: int

    def to(self, device: torch.device | str) -> ImageData:
        """Return the same images on another device, where training and measuring then run."""
        names = ("train", "validation", "calibration", "test")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})


def load_images(
    dataset: str, *, validation_images: int, calibration_images: int, rng: np.random.Generator
) -> ImageData:
    """Load images and cut them into fixed splits.

    Digits ship with scikit-learn. CIFAR-10 is looked for under the folder that the environment variable
    ``EMQ_DATA_ROOT`` names, as ``cifar10.npz``, as torchvision's ``cifar-10-batches-py`` or as an ImageFolder tree
    ``train/<class>/*.png`` and ``test/<class>/*.png``.

    ImageNet is the reader's own ImageFolder tree ``imagenet/train/<class>/*`` and ``imagenet/val/<class>/*`` under that
    folder; of its training images only the calibration images are read, which are its validation images too.

    Args:
        dataset: "digits", "cifar10" or "imagenet".
        validation_images: training images set aside.
        calibration_images: of the training images that are left.
        rng: draws ImageNet's calibration images; the other splits are fixed by the images' content.

    Raises:
        DatasetNotFoundError: no images where they are looked for.
        DatasetMismatchError: the images found are not CIFAR-10, or the class folders of the two parts differ.
    """
    if dataset == "imagenet":
        return _imagenet(calibration_images, rng=rng)
    arrays = {"digits": _digits, "cifar10": _cifar10}[dataset]()
    (train_images, train_labels, train_hashes) = _sorted_by_content(*arrays["train"])
    (test_images, test_labels, test_hashes) = _sorted_by_content(*arrays["test"])
    digest = hashlib.sha256(b"".join(train_hashes + test_hashes)).hexdigest()
    if dataset == "cifar10" and digest != CIFAR10_DIGEST:
        raise DatasetMismatchError(
            f"The images under EMQ_DATA_ROOT are not CIFAR-10 (digest {digest[:12]}, expected {CIFAR10_DIGEST[:12]}). "
            "Unpack or download them again."
        )
    held = validation_images
    scaled = train_images[held:].to(torch.float64) / 255
    mean, std = (statistic(scaled, dim=(0, 2, 3)).float() for statistic in (torch.mean, torch.std))
    train = Split(train_images[held:], train_labels[held:], mean, std)
    return ImageData(
        train=train,
        validation=Split(train_images[:held], train_labels[:held], mean, std),
        calibration=train[:calibration_images],
        test=Split(test_images, test_labels, mean, std),
        digest=digest,
        classes=int(train_labels.max()) + 1,
    )


def preprocess_imagenet(image: Image.Image) -> torch.Tensor:
    """Return what torchvision's ImageNet networks see of an image: shorter side to 256, the middle 224 x 224.

    Returns:
        uint8 tensor of shape (3, 224, 224).
    """
    from torchvision.transforms import v2

    whole = v2.functional.resize(image.convert("RGB"), [256], antialias=True)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(whole, [224, 224]))


def _imagenet(calibration_images: int, *, rng: np.random.Generator) -> ImageData:
    """Return the reader's ImageNet, preprocessed: validation images, and calibration images of the training set."""
    root = pathlib.Path(os.environ.get("EMQ_DATA_ROOT", "")) / "imagenet"
    if not os.environ.get("EMQ_DATA_ROOT") or not root.is_dir():
        raise DatasetNotFoundError(
            "This study needs your own copy of ImageNet: set EMQ_DATA_ROOT to a folder that holds "
            "imagenet/train/<class>/ and imagenet/val/<class>/."
        )
    calibration, test = (_open_folder(root / part) for part in ("train", "val"))
    if calibration.classes != test.classes:
        odd = sorted(set(calibration.classes) ^ set(test.classes))
        raise DatasetMismatchError(f"{root}: train/ and val/ differ in the class folders {odd[:5]}. Complete the tree.")
    if len(calibration.samples) < calibration_images:
        raise DatasetNotFoundError(
            f"{root / 'train'} has {len(calibration.samples)} images; calibration needs {calibration_images}."
        )
    drawn = rng.permutation(len(calibration.samples))[:calibration_images]
    parts = []
    for folder, chosen in ((calibration, np.sort(drawn)), (test, range(len(test.samples)))):
        paths, labels = zip(*(folder.samples[index] for index in chosen), strict=True)
        images = np.stack([preprocess_imagenet(folder.loader(path)).permute(1, 2, 0).numpy() for path in paths])
        parts.append(_sorted_by_content(images, np.array(labels)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    train, test = (Split(images, labels, mean, std) for images, labels, _ in parts)
    digest = hashlib.sha256(b"".join(parts[0][2] + parts[1][2])).hexdigest()
    return ImageData(train, train, train, test, digest, len(calibration.classes))


def _open_folder(folder: pathlib.Path) -> ImageFolder:
    """Return torchvision's view of an ImageFolder tree.

    Raises:
        DatasetNotFoundError: there is no such folder, or a class without images.
    """
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f"{folder}: {error}") from error


def _sorted_by_content(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[bytes]]:
    """Sort images (N, H, W, C) and labels by a hash of pixels and label; return tensors (N, C, H, W), (N,), hashes."""
    labels = np.asarray(labels, dtype=np.int64)
    hashes = [
        hashlib.blake2b(image.tobytes() + int(label).to_bytes(2 if label > 255 else 1), digest_size=16).digest()
        for image, label in zip(np.ascontiguousarray(images), labels, strict=True)
    ]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    tensor = torch.from_numpy(np.ascontiguousarray(images[order].transpose(0, 3, 1, 2)))
    return tensor, torch.from_numpy(labels[order]), [hashes[i] for i in order]


def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return scikit-learn's 1,797 digits, upsampled from 8 x 8 to 16 x 16 grey levels; every third is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    images = large.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    test = np.arange(len(images)) % 3 == 0
    return {"train": (images[~test], digits.target[~test]), "test": (images[test], digits.target[test])}


def _cifar10() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return CIFAR-10 from the first layout found under EMQ_DATA_ROOT."""
    root = pathlib.Path(os.environ.get("EMQ_DATA_ROOT", ""))
    if os.environ.get("EMQ_DATA_ROOT") and root.is_dir():
        if (root / "cifar10.npz").is_file():
            with np.load(root / "cifar10.npz", allow_pickle=False) as arrays:
                return {split: (arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test")}
        if (root / "cifar-10-batches-py").is_dir():
            return {split: _torchvision_batches(root, split) for split in ("train", "test")}
        if (root / "train").is_dir() and (root / "test").is_dir():
            return {split: _image_folder(root / split) for split in ("train", "test")}
    raise DatasetNotFoundError(
        "This step measures real CIFAR-10 images and found none "
        f"(EMQ_DATA_ROOT={os.environ.get('EMQ_DATA_ROOT') or 'is not set'}). Set EMQ_DATA_ROOT to a folder that holds "
        "cifar10.npz, cifar-10-batches-py or train/ and test/ with one folder of PNG files per class. "
        "torchvision.datasets.CIFAR10(root, download=True) makes the second. "
        "Reading the published study needs no images: run with REBUILD=False."
    )


def _torchvision_batches(root: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of torchvision's CIFAR10 layout (its checksums guard the pickled batches)."""
    from torchvision.datasets import CIFAR10

    dataset = CIFAR10(str(root), train=split == "train")
    return dataset.data, np.asarray(dataset.targets)


def _image_folder(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of an ImageFolder tree whose folders are the ten class names."""
    dataset = _open_folder(folder)
    if tuple(dataset.classes) != _CIFAR10_CLASSES:
        raise DatasetMismatchError(f"{folder}: expected the class folders {_CIFAR10_CLASSES}, got {dataset.classes}.")
    images = np.stack([np.asarray(dataset.loader(path)) for path, _ in dataset.samples])
    return images, np.asarray(dataset.targets)
