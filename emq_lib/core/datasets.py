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

import numpy as np
import torch

from emq_lib.core.checks import random_source, whole_number
from emq_lib.core.errors import DatasetMismatchError, DatasetNotFoundError, InvalidParameterError
from emq_lib.core.images import find_images, open_image, preprocess_imagenet, read_batches, read_npz, read_tree

CIFAR10_DIGEST = "3ef2f9db288a8f54943411ef64a5b5cbe16686916bac3fcd64e24c0ef4a131f8"


@dataclass(frozen=True)
class Split:
    """A set of images with what turns them into network inputs.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        mean: per-channel mean of the training images, scaled to 0..1, shape (C,).
        std: per-channel standard deviation, likewise.

    Raises:
        InvalidParameterError: another type or shape; a negative label; a mean that is not finite, or a deviation that
            is not positive.
    """

    images: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __post_init__(self) -> None:
        """Check types and shapes, and on the CPU values too: a GPU would have to be waited for."""
        for name in ("images", "labels", "mean", "std"):
            if not isinstance(getattr(self, name), torch.Tensor):
                raise InvalidParameterError(f"{name} must be a torch.Tensor, got {getattr(self, name)!r:.40}.")
        shape, labels = tuple(self.images.shape), self.labels
        if self.images.dtype != torch.uint8 or len(shape) != 4 or 0 in shape[1:]:
            raise InvalidParameterError(f"images must be uint8, (N, C, H, W); got {self.images.dtype}, {shape}.")
        if labels.dtype != torch.int64 or labels.shape != shape[:1]:
            raise InvalidParameterError(
                f"labels must be int64, one per image; got {labels.dtype}, {tuple(labels.shape)} for {shape[0]} images."
            )
        if _readable(labels) and len(labels) and labels.min() < 0:
            raise InvalidParameterError(
                f"labels are classes, counted from 0; they lie in {int(labels.min())} to {int(labels.max())}."
            )
        for name, least in (("mean", -torch.inf), ("std", 0.0)):
            values, above = getattr(self, name), "positive and finite" if name == "std" else "finite"
            if values.shape != shape[1:2] or (_readable(values) and not ((values > least) & values.isfinite()).all()):
                raise InvalidParameterError(
                    f"the {name} of the images must be {above}, one per channel; got {values} for {shape[1]}."
                )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: slice | torch.Tensor) -> Split:
        """Return the images that a slice or an index tensor selects.

        Raises:
            InvalidParameterError: an index of another kind, of another length than the images, or out of their range.
        """
        return Split(_taken(self.images, index), _taken(self.labels, index), self.mean, self.std)

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

    Raises:
        InvalidParameterError: it is no tensor with an axis of images.
    """

    tensor: torch.Tensor

    def __post_init__(self) -> None:
        """Check the type."""
        if not isinstance(self.tensor, torch.Tensor) or not self.tensor.ndim:
            raise InvalidParameterError(
                f"inputs must be a torch.Tensor with an axis of images, got {self.tensor!r:.40}."
            )

    def __len__(self) -> int:
        """Return the number of inputs."""
        return len(self.tensor)

    def __getitem__(self, index: slice | torch.Tensor) -> Inputs:
        """Return those that a slice or an index tensor selects. Raises as :class:`Split` does."""
        return Inputs(_taken(self.tensor, index))

    def inputs(self) -> torch.Tensor:
        """Return a copy, which a network that normalizes its input in place may overwrite."""
        return self.tensor.clone()


def _taken(tensor: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
    """Return what a slice or an index tensor selects along the first axis.

    Raises:
        InvalidParameterError: an index of another kind, of another length, or out of range.
    """
    positions = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8)
    of_images = isinstance(index, torch.Tensor) and index.ndim == 1 and index.dtype in positions
    if not (isinstance(index, slice) or of_images):
        raise InvalidParameterError(f"images are selected by a slice, positions or a mask; got {index!r:.60}.")
    try:
        return tensor[index]
    except (IndexError, TypeError, ValueError) as error:
        raise InvalidParameterError(f"{index!r:.60} does not fit {len(tensor)} images ({error}).") from error


def _readable(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's values can be read at once: it is on the CPU, and no stand-in for one."""
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu"


@dataclass(frozen=True)
class ImageData:
    """The fixed splits of a study.

    Attributes:
        train: images that a network learns from; their mean and deviation normalize all.
        validation: images set aside to choose the epoch.
        calibration: a part of `train`: what statistics, reconstruction and ranges may see.
        test: images that accuracy is measured on.
        digest: SHA-256 over the images, as hexadecimal text: it identifies them.
        classes: number of classes.

    Raises:
        DatasetMismatchError: a label outside the classes.
    """

    train: Split
    validation: Split
    calibration: Split
    test: Split
    digest: str
    classes: int

    def __post_init__(self) -> None:
        """Check the labels, on the CPU."""
        for name in ("train", "validation", "calibration", "test"):
            labels = getattr(self, name).labels
            if _readable(labels) and len(labels) and labels.max() >= self.classes:
                raise DatasetMismatchError(
                    f"The {name} images have labels up to {int(labels.max())}, but there are {self.classes} classes."
                )

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
        InvalidParameterError: an unknown dataset, or more images to set aside than there are.
        DatasetNotFoundError: no images where they are looked for.
        DatasetMismatchError: a file that cannot be read, images that are not CIFAR-10's, or class folders that differ
            in the two parts; the file or folder is named.
    """
    held = whole_number(validation_images, "validation_images", 1)
    calibration_images = whole_number(calibration_images, "calibration_images", 1)
    if dataset == "imagenet":
        return _imagenet(calibration_images, rng=random_source(rng))
    if dataset not in ("digits", "cifar10"):
        raise InvalidParameterError(f"unknown dataset {dataset!r:.60}; there are digits, cifar10 and imagenet.")
    arrays = {"digits": _digits, "cifar10": _cifar10}[dataset]()
    (train_images, train_labels, train_hashes) = _sorted_by_content(*arrays["train"])
    (test_images, test_labels, test_hashes) = _sorted_by_content(*arrays["test"])
    digest = hashlib.sha256(b"".join(train_hashes + test_hashes)).hexdigest()
    if dataset == "cifar10" and digest != CIFAR10_DIGEST:
        raise DatasetMismatchError(
            f"The images under EMQ_DATA_ROOT are not CIFAR-10 (digest {digest[:12]}, expected {CIFAR10_DIGEST[:12]}). "
            "Unpack or download them again."
        )
    if len(train_images) < held + calibration_images:
        raise InvalidParameterError(
            f"validation_images={held} and calibration_images={calibration_images} are more than the "
            f"{len(train_images)} training images. Set fewer aside."
        )
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


def _imagenet(calibration_images: int, *, rng: np.random.Generator) -> ImageData:
    """Return the reader's ImageNet, preprocessed: validation images, and calibration images of the training set."""
    root = pathlib.Path(os.environ.get("EMQ_DATA_ROOT", "")) / "imagenet"
    if not os.environ.get("EMQ_DATA_ROOT") or not root.is_dir():
        raise DatasetNotFoundError(
            "This study needs your own copy of ImageNet: set EMQ_DATA_ROOT to a folder that holds "
            "imagenet/train/<class>/ and imagenet/val/<class>/."
        )
    calibration, test = (find_images(root / part) for part in ("train", "val"))
    if calibration.classes != test.classes:
        odd = sorted(set(calibration.classes) ^ set(test.classes))
        raise DatasetMismatchError(f"{root}: train/ and val/ differ in the class folders {odd[:5]}. Complete the tree.")
    if len(calibration.samples) < calibration_images:
        raise DatasetNotFoundError(
            f"{root / 'train'} has {len(calibration.samples)} images; calibration needs {calibration_images}."
        )
    drawn = np.sort(rng.permutation(len(calibration.samples))[:calibration_images])
    parts = []
    for samples in ([calibration.samples[index] for index in drawn], test.samples):
        images = np.stack([preprocess_imagenet(open_image(path)).permute(1, 2, 0).numpy() for path, _ in samples])
        parts.append(_sorted_by_content(images, np.array([label for _, label in samples])))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    train, test = (Split(images, labels, mean, std) for images, labels, _ in parts)
    digest = hashlib.sha256(b"".join(parts[0][2] + parts[1][2])).hexdigest()
    return ImageData(train, train, train, test, digest, len(calibration.classes))


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
            return read_npz(root / "cifar10.npz")
        if (root / "cifar-10-batches-py").is_dir():
            return read_batches(root)
        if (root / "train").is_dir() and (root / "test").is_dir():
            return {split: read_tree(root / split) for split in ("train", "test")}
    raise DatasetNotFoundError(
        "This step measures real CIFAR-10 images and found none "
        f"(EMQ_DATA_ROOT={os.environ.get('EMQ_DATA_ROOT') or 'is not set'}). Set EMQ_DATA_ROOT to a folder that holds "
        "cifar10.npz, cifar-10-batches-py or train/ and test/ with one folder of PNG files per class. "
        "torchvision.datasets.CIFAR10(root, download=True) makes the second. "
        "Reading the published study needs no images: run with REBUILD=False."
    )
