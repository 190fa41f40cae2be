"""Data sets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lhc_triton.training.data.fashion import open_fashion
from lhc_triton.training.data.source import Data

DATA_NAMES = ("fashion-mnist",)
OnBadFile = Literal["fail", "skip"]


def open_data(
    name: str,
    folder: str | Path | None = None,
    *,
    image_size: int | None = None,
    on_bad_file: OnBadFile = "fail",
) -> Data:
    """Open a data set.

    Args:
        name: "fashion-mnist".
        folder: where its original files lie; None for the images in the package (fashion-mnist only).
        image_size: height and width of the images; None for the data set's own.
        on_bad_file: whether an image file that cannot be read ends the run or is left out.

    Returns:
        Its training, validation and test images.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message names it.
        ValueError: an unknown name, a damaged file, an image size that does not fit.
    """
    if name not in DATA_NAMES:
        raise ValueError(f"data {name!r} is not one of {', '.join(DATA_NAMES)}")
    return open_fashion(folder, image_size)
