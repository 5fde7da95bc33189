"""Images on disk: CIFAR-10 in three layouts, trees with a folder per class, and what a network sees of an image."""

from __future__ import annotations

import os
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from emq_lib.core.errors import DatasetMismatchError, DatasetNotFoundError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, SyntaxError, TypeError, MemoryError, OverflowError)
_UNREADABLE += (NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)


class Tree(NamedTuple):
    """The names of the classes, sorted, and (path of an image, index of its class) in a fixed order."""

    classes: tuple[str, ...]
    samples: list[tuple[pathlib.Path, int]]


def read_npz(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return CIFAR-10 from an npz file with the arrays x_train, y_train, x_test and y_test.

    Returns:
        "train" and "test" -> images, uint8 of shape (N, 32, 32, 3), and labels, int64 of shape (N,).

    Raises:
        DatasetMismatchError: the file cannot be read, or holds other arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {split: [np.asarray(arrays[f"{x}_{split}"]) for x in "xy"] for split in ("train", "test")}
    except _UNREADABLE as error:
        raise DatasetMismatchError(
            f"{path} cannot be read as CIFAR-10 with the arrays x_train, y_train, x_test and y_test ({error}). "
            "Download it again."
        ) from error
    return {split: _checked(*pair, f"{path}, {split} images") for split, pair in found.items()}


def read_batches(root: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return CIFAR-10 from torchvision's folder ``cifar-10-batches-py``, whose checksums guard the pickled batches.

    Returns:
        as :func:`read_npz`.

    Raises:
        DatasetMismatchError: a file of the folder is absent or altered.
    """
    from torchvision.datasets import CIFAR10

    try:
        parts = {split: CIFAR10(str(root), train=split == "train") for split in ("train", "test")}
    except _UNREADABLE as error:
        raise DatasetMismatchError(
            f"{root / CIFAR10.base_folder} is incomplete or altered ({error}). Download it again."
        ) from error
    return {split: _checked(part.data, np.array(part.targets), str(root)) for split, part in parts.items()}


def read_tree(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of a tree whose folders are the ten class names of CIFAR-10.

    Returns:
        images, uint8 of shape (N, 32, 32, 3), and labels, int64 of shape (N,).

    Raises:
        DatasetMismatchError: other folders, an image that cannot be read or has another size; it is named.
        DatasetNotFoundError: see :func:`find_images`.
    """
    tree = find_images(folder)
    if tree.classes != CIFAR10_CLASSES:
        raise DatasetMismatchError(f"{folder}: expected the class folders {CIFAR10_CLASSES}, got {tree.classes}.")
    images = np.empty((len(tree.samples), 32, 32, 3), dtype=np.uint8)
    for index, (path, _) in enumerate(tree.samples):
        pixels = np.asarray(open_image(path))
        if pixels.shape != images.shape[1:]:
            raise DatasetMismatchError(f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels; CIFAR-10, 32 x 32.")
        images[index] = pixels
    return images, np.array([label for _, label in tree.samples])


def _checked(images: np.ndarray, labels: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels after checking that they are of CIFAR-10's form.

    Raises:
        DatasetMismatchError: they are not.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise DatasetMismatchError(
            f"{what}: images must be uint8, (N, 32, 32, 3); got {images.dtype}, {images.shape}. Download them again."
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise DatasetMismatchError(
            f"{what}: labels must be whole numbers, one for each of {len(images)} images; got {labels.dtype}, "
            f"{labels.shape}. Download them again."
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise DatasetMismatchError(f"{what}: labels must lie in 0 to 9, and there must be some. Download them again.")
    return images, labels.astype(np.int64)


def find_images(folder: pathlib.Path) -> Tree:
    """Return the classes and images of a tree ``<class>/**/<image>``, in the order of torchvision's ImageFolder.

    Hidden folders and files count for nothing. Links are followed; what is reached twice counts once, so that a link
    to a folder above does not repeat the images below it.

    Raises:
        DatasetNotFoundError: there is no such folder, no class, or a class without images.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        found = [
            sorted(_images_below(folder / name, set()), key=lambda path: (str(path.parent), path)) for name in names
        ]
    except OSError as error:
        raise DatasetNotFoundError(
            f"{error.filename or folder}: the folder cannot be read ({error.strerror}). It needs one per class."
        ) from error
    if not names or not all(found):
        empty = [name for name, paths in zip(names, found, strict=True) if not paths]
        raise DatasetNotFoundError(
            f"{folder}: no images ({', '.join(_ENDINGS)}) in the class folders {empty}. Complete the tree."
        )
    return Tree(tuple(names), [(path, label) for label, paths in enumerate(found) for path in paths])


def _images_below(folder: pathlib.Path, seen: set[str]) -> Iterator[pathlib.Path]:
    """Yield the images of a folder and of those in it, each file and each folder once."""
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_below(folder / entry.name, seen)
        elif entry.name.lower().endswith(_ENDINGS):
            file = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if file not in seen:
                seen.add(file)
                yield folder / entry.name


def open_image(path: pathlib.Path) -> Image.Image:
    """Return an image file in RGB.

    Raises:
        DatasetMismatchError: it cannot be read, is cut off, or has no 8 or 16 bits a channel; it is named.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise DatasetMismatchError(f"{path} cannot be read as an image ({error}). Replace or remove it.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB; of 16-bit grey levels the high byte, as Pillow takes of 16-bit colours.

    Raises:
        ValueError: pixels that are neither of 8 nor of 16 bits.
    """
    if image.mode.startswith("I") or image.mode == "F":  # Pillow itself would cut what exceeds 255 to white
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() >= 2**16:
            raise ValueError(f"its pixels are of mode {image.mode}, with values up to {levels.max()}")
        image = Image.fromarray((levels // 256).astype(np.uint8))
    return image.convert("RGB")


def preprocess_imagenet(image: Image.Image) -> torch.Tensor:
    """Return what torchvision's ImageNet networks see of an image: shorter side to 256, the middle 224 x 224.

    The preset of He et al. (2016) that torchvision's first published weights were measured with.

    Returns:
        uint8 tensor of shape (3, 224, 224).
    """
    from torchvision.transforms import v2

    whole = v2.functional.resize(to_rgb(image), [256], antialias=True)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(whole, [224, 224]))
