"""Images that fit into memory, as a source of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lhc_triton.training.data.augmentation import check_augmentation, draw_moves, largest_shift, move
from lhc_triton.training.data.source import Augmentation, Batch, ImageFormat


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels, in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], indices into the format's classes.
        format: what the images have in common.

    Raises:
        ValueError: the three do not go together.
    """

    images: Tensor
    labels: Tensor
    format: ImageFormat

    def __post_init__(self) -> None:
        shape = (self.format.channels, self.format.size, self.format.size)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1:] != shape:
            raise ValueError(
                f"images are {self.images.dtype} {list(self.images.shape)}; "
                f"uint8 [N, {', '.join(map(str, shape))}] is needed"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}; "
                f"int64 [{len(self.images)}] are needed, one for each image"
            )
        if len(self.labels) == 0:
            raise ValueError("an image set needs at least one image")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.format.classes):
            raise ValueError(
                f"labels run from {low} to {high}; 0 to {len(self.format.classes) - 1} are supported"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at ``indices`` (int64 [M]), in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.format)

    def digest(self) -> str:
        """A SHA-256 over the shape, pixels and labels, in hex."""
        sha = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def batches(
        self,
        steps: Sequence[Tensor],
        *,
        augmentation: Augmentation = "none",
        epoch_seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> Iterator[Batch]:
        """Give the batch of each step, as Source.batches.

        Pixels, labels and what is drawn for them go to the device once, and batches are made there: workers
        would have nothing to do. "standard" shifts by up to 4 pixels and flips; of 32x32 images, "paper" is
        the same.
        """
        check_augmentation(augmentation, epoch_seed)
        device = torch.device(device)
        largest = largest_shift(augmentation, self.format.size)
        normalise = self.format.normaliser(device)
        pixels, labels = self.images.to(device), self.labels.to(device)
        for chosen, moves in _on_device(steps, epoch_seed, largest, device):
            images = pixels[chosen]
            if augmentation != "none":
                images = move(images, moves, largest)
            yield normalise(images), labels[chosen]


def _on_device(
    steps: Sequence[Tensor], epoch_seed: int, largest: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each step's indices and moves: one transfer for the epoch, none between the steps."""
    if not steps:
        return
    every = torch.cat(list(steps))
    moves = draw_moves(epoch_seed, every, largest).to(device)
    sizes = [len(step) for step in steps]
    yield from zip(every.to(device).split(sizes), moves.split(sizes), strict=True)
