"""Data sets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from lhc_triton.training.data.cifar import open_cifar
from lhc_triton.training.data.fashion import open_fashion
from lhc_triton.training.data.source import Data
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
