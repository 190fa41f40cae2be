"""What the training loop used before sources gave batches; goes with its last user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lhc_triton.training.data.fashion import FORMAT, PACKAGED_FOLDER, read_fashion
from lhc_triton.training.data.memory import ImageSet


@dataclass(frozen=True, eq=False)
class FashionMNIST:
    """The training and the test images."""

    train: ImageSet
    test: ImageSet

    @classmethod
    def from_folder(cls, folder: str | Path) -> FashionMNIST:
        """Read the four original files from a folder."""
        return cls(*read_fashion(folder))

    @classmethod
    def packaged(cls) -> FashionMNIST:
        """The images that ship with the package."""
        return cls(*read_fashion(PACKAGED_FOLDER))


def normalise(images: Tensor) -> Tensor:
    """Pixels uint8 [N, 1, H, W] as float32 with mean 0 and deviation 1 over the training images."""
    return (images.to(torch.float32) - 255 * FORMAT.mean[0]) / (255 * FORMAT.std[0])


def augment(images: Tensor, generator: torch.Generator, shift: float = 0.125) -> Tensor:
    """Flip each image left to right with probability 1/2 and shift it by up to ``shift`` of its size.

    Args:
        images: [N, C, H, W], any dtype; pixels that a shift brings in are 0.
        generator: draws flips and shifts (a CPU generator).
        shift: largest shift, a share of the height and of the width (whole pixels, rounded down: 3 of 28).

    Returns:
        A tensor like ``images``.

    Raises:
        ValueError: ``shift`` is outside [0, 1).
    """
    if not 0 <= shift < 1:
        raise ValueError(f"shift {shift} is outside [0, 1)")
    count, _, height, width = images.shape
    up, left = int(shift * height), int(shift * width)
    flips = torch.rand(count, generator=generator) < 0.5
    rows = torch.randint(2 * up + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * left + 1, (count, 1), generator=generator) + torch.arange(width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (left, left, up, up))
    batch = torch.arange(count)[:, None, None]
    # Advanced indices around a slice put the channels last: [N, H, W, C].
    picked = padded[batch, :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
