"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; Expat licence) from its original IDX files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lhc_triton.training.data.idx import load_idx
from lhc_triton.training.data.memory import ImageSet
from lhc_triton.training.data.source import Data, ImageFormat

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
PACKAGED_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "fashion_mnist"
SIDE = 28
FORMAT = ImageFormat(1, SIDE, CLASSES, mean=(0.2860,), std=(0.3530,))
"""Mean and deviation are those of the 60,000 training images."""

_LARGEST = 256


def image_side(image_size: int | None) -> int:
    """Return the side of the images in pixels; ValueError for one that they cannot have."""
    size = SIDE if image_size is None else image_size
    if not SIDE <= size <= _LARGEST:
        raise ValueError(
            f"image_size {size}: fashion-mnist images are {SIDE}x{SIDE}; {SIDE} to {_LARGEST} are supported"
        )
    return size


def open_fashion(folder: str | Path | None = None, image_size: int | None = None) -> Data:
    """Read Fashion-MNIST.

    Args:
        folder: with the four original files, with or without ``.gz``; None for the images that ship with the
            package: 1,200 training images of each class, and all 10,000 test images.
        image_size: None for the 28x28 of the files. A larger one puts the images into the middle of
            background (0), 32 for instance for networks that halve their input five times. Mean and deviation
            stay those of the 28x28 images.

    Returns:
        The data set, without validation images.

    Raises:
        FileNotFoundError: the folder or one of the files is missing; the message names it.
        ValueError: a file is damaged, or its images and labels do not go together; the message names it; or
            an image size below 28 or above 256.
    """
    size = image_side(image_size)
    train, test = read_fashion(PACKAGED_FOLDER if folder is None else folder, size)
    return Data("fashion-mnist", train.format, train, None, test)


def read_fashion(folder: str | Path, size: int = SIDE) -> tuple[ImageSet, ImageSet]:
    """The training and the test images of a folder; arguments and errors as open_fashion."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}; it should hold {', '.join(FILES.values())} (.gz or not)"
        )
    paths = {key: _find(folder, name) for key, name in FILES.items()}
    shape = replace(FORMAT, size=size)
    return (
        _image_set(paths["train_images"], paths["train_labels"], shape),
        _image_set(paths["test_images"], paths["test_labels"], shape),
    )


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no file {name}.gz or {name} in {folder}")


def _image_set(images_path: Path, labels_path: Path, shape: ImageFormat) -> ImageSet:
    images, labels = load_idx(images_path), load_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{images_path}: shape {list(images.shape)}; [N, {SIDE}, {SIDE}] is needed")
    if labels.ndim != 1 or len(labels) != len(images):
        raise ValueError(
            f"{labels_path}: shape {list(labels.shape)}; [{len(images)}] is needed, "
            f"one label for each image of {images_path.name}"
        )
    if int(labels.max()) >= len(CLASSES):
        raise ValueError(f"{labels_path}: label {int(labels.max())}; 0 to {len(CLASSES) - 1} are supported")
    return ImageSet(_on_background(images.unsqueeze(1), shape.size), labels.to(torch.int64), shape)


def _on_background(images: Tensor, size: int) -> Tensor:
    before, after = (size - SIDE) // 2, (size - SIDE + 1) // 2
    return torch.nn.functional.pad(images, (before, after, before, after))
