"""Data sets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from lhc_triton.training.data.cifar import open_cifar
from lhc_triton.training.data.fashion import open_fashion
from lhc_triton.training.data.source import Data

DataName = Literal["fashion-mnist", "cifar10", "cifar100"]
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
        name: "fashion-mnist", "cifar10", "cifar100".
        folder: where its original files lie; None for the images in the package (fashion-mnist only).
        image_size: height and width of the images; None for the data set's own.
        on_bad_file: whether an image file that cannot be read ends the run or is left out.

    Returns:
        Its training, validation and test images.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message names it.
        ValueError: an unknown name, a damaged file, an image size that does not fit.
    """
    if name not in get_args(DataName):
        raise ValueError(f"data {name!r} is not one of {', '.join(get_args(DataName))}")
    if name == "fashion-mnist":
        return open_fashion(folder, image_size)
    if folder is None:
        raise ValueError(f"{name} needs a folder: only fashion-mnist comes with the package")
    return open_cifar(name, folder, image_size)
