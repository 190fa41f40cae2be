"""Random flips and shifts, drawn for each image from (epoch's seed, image's index) alone."""

from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lhc_triton.training.data.source import Augmentation

PAPER_SHIFT = 0.125
STANDARD_SHIFT = 4  # pixels, of images of about 32
_WEYL = np.uint64(0x9E3779B97F4A7C15)


def check_augmentation(augmentation: Augmentation, epoch_seed: int) -> None:
    """Refuse what no source knows.

    Raises:
        ValueError: another augmentation, or a seed outside [0, 2**64).
    """
    if augmentation not in get_args(Augmentation):
        raise ValueError(f"augmentation {augmentation!r} is not one of {', '.join(get_args(Augmentation))}")
    if not 0 <= epoch_seed < 1 << 64:
        raise ValueError(f"epoch_seed {epoch_seed} is outside [0, 2**64)")


def uniforms(epoch_seed: int, indices: Tensor, count: int) -> npt.NDArray[np.float64]:
    """Random numbers that belong to images, whatever batch these are in.

    SplitMix64 (Steele, Lea, Flood 2014), started for each image at a hash of the seed and its index.

    Args:
        epoch_seed: from 0 to 2**64 - 1.
        indices: int64 [n], the images.
        count: how many numbers for each.

    Returns:
        float64 [n, count], uniform in [0, 1).
    """
    images = indices.cpu().numpy().astype(np.uint64)
    steps = np.arange(1, count + 1, dtype=np.uint64)
    seed = _mixed(np.array([epoch_seed], dtype=np.uint64) + _WEYL)
    states = _mixed(seed + images * _WEYL)
    words = _mixed(states[:, None] + steps * _WEYL)
    return (words >> np.uint64(11)) * np.float64(2.0**-53)


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def largest_shift(augmentation: Augmentation, size: int) -> int:
    """By how many pixels an image of that size is shifted at most."""
    shifts = {"none": 0, "paper": int(PAPER_SHIFT * size), "standard": min(STANDARD_SHIFT, size - 1)}
    return shifts[augmentation]


def draw_moves(epoch_seed: int, indices: Tensor, largest: int) -> Tensor:
    """Draw each image's move: flipped or not, first row and first column of the padded image.

    Args:
        epoch_seed: the epoch's.
        indices: int64 [n], the images.
        largest: by how many pixels to shift at most, in each direction.

    Returns:
        int64 [n, 3]: 0 or 1; 0 to 2 * largest, twice.
    """
    ways = np.array([2, 2 * largest + 1, 2 * largest + 1])
    return torch.from_numpy((uniforms(epoch_seed, indices, 3) * ways).astype(np.int64))


def move(images: Tensor, moves: Tensor, largest: int) -> Tensor:
    """Flip images left to right and shift them.

    Args:
        images: [n, C, H, W], any dtype; pixels that a shift brings in are 0.
        moves: int64 [n, 3] on the images' device, from draw_moves.
        largest: as given to draw_moves.

    Returns:
        A tensor like ``images``, channels last.
    """
    height, width = images.shape[2:]
    flipped, top, left = moves[:, :, None].unbind(1)
    rows = top + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = left + torch.where(flipped == 1, across.flip(0), across)
    padded = torch.nn.functional.pad(images, (largest,) * 4)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices around a slice put the channels last: [n, H, W, C].
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
