"""Data sets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from lhc_triton.training.data import cifar, fashion, tree
from lhc_triton.training.data.cifar import open_cifar
from lhc_triton.training.data.fashion import open_fashion
from lhc_triton.training.data.source import Data, ImageFormat
from lhc_triton.training.data.tree import open_folder

DataName = Literal["fashion-mnist", "cifar10", "cifar100", "imagenet", "folder"]
OnBadFile = Literal["fail", "skip"]


def open_data(
    name: DataName,
    folder: str | Path | None = None,
    *,
    image_size: int | None = None,
    on_bad_file: OnBadFile = "fail",
) -> Data:
    """Open a data set.

    Args:
        name: "fashion-mnist", "cifar10", "cifar100", "imagenet", or "folder": any tree with a folder for each
            class.
        folder: where its files lie, as open_fashion, open_cifar and open_folder say; None for the images in
            the package (fashion-mnist only).
        image_size: height and width of the images; None for the data set's own: 28, 32, or 224.
        on_bad_file: whether an image file of a tree that cannot be read ends the run or is left out. A
            damaged archive is always an error.

    Returns:
        Its training, validation and test images.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message names it.
        ValueError: an unknown name, a damaged file, a class without images, an image size that does not fit.
    """
    if name not in get_args(DataName):
        raise ValueError(f"data {name!r} is not one of {', '.join(get_args(DataName))}")
    if name == "fashion-mnist":
        return open_fashion(folder, image_size)
    if folder is None:
        raise ValueError(
            f"{name} needs a folder: only fashion-mnist comes with the package; give --data FOLDER"
        )
    match name:
        case "imagenet" | "folder":
            return open_folder(name, folder, image_size, on_bad_file)
        case _:
            return open_cifar(name, folder, image_size)


def expected_format(name: DataName, image_size: int | None = None) -> ImageFormat:
    """Return what a data set's images will have in common, before its files are read.

    Of "folder" the classes are not known: the least number stands for them. Mean and deviation are stand-ins.

    Args:
        name: as in open_data.
        image_size: as in open_data.

    Raises:
        ValueError: the data set's images cannot have that size.
    """
    if name == "fashion-mnist":
        return _stand_in(1, fashion.image_side(image_size), 10)
    if name in ("cifar10", "cifar100"):
        return _stand_in(3, cifar.image_side(name, image_size), 10 if name == "cifar10" else 100)
    return _stand_in(3, tree.image_side(image_size), 1000 if name == "imagenet" else 2)


def _stand_in(channels: int, size: int, classes: int) -> ImageFormat:
    return ImageFormat(channels, size, tuple(map(str, range(classes))), (0.5,) * channels, (0.25,) * channels)


def most_images(name: DataName, packaged: bool) -> int | None:
    """Return how many training images a data set has at most, those held out included; None if not known.

    Args:
        name: as in open_data.
        packaged: whether it is the part that comes with the package.
    """
    if name == "fashion-mnist":
        return 12_000 if packaged else 60_000
    return 50_000 if name in ("cifar10", "cifar100") else None
