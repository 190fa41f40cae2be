"""What training reads: image formats, sources of batches, and the data sets made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

Augmentation = Literal["none", "paper", "standard"]
Batch = tuple[Tensor, Tensor]
"""Images float32 [n, C, H, W], normalised, channels last; their labels int64 [n]."""


@dataclass(frozen=True)
class ImageFormat:
    """What all images of a data set have in common.

    Attributes:
        channels: 1 (grey) or 3 (red, green, blue).
        size: height and width in pixels.
        classes: their names; a label is an index into them.
        mean, std: of the training images' pixels, on the scale 0 to 1, one for each channel.

    Raises:
        ValueError: fewer than two classes, a channel without mean or deviation, a size or deviation of 0.
    """

    channels: int
    size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.channels not in (1, 3) or self.size < 1:
            raise ValueError(
                f"{self.channels} channels of {self.size} pixels a side; 1 or 3 of at least 1 are supported"
            )
        if len(self.classes) < 2:
            raise ValueError(f"{len(self.classes)} classes; at least 2 are needed")
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ValueError(
                f"mean {self.mean} and std {self.std}; one of each is needed for {self.channels} channels, "
                "every std above 0"
            )

    def normaliser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function like normalise() whose constants lie on ``device`` already."""
        mean, std = (
            (255 * torch.tensor(values, dtype=torch.float64)).to(device, torch.float32)[:, None, None]
            for values in (self.mean, self.std)
        )

        def normalised(images: Tensor) -> Tensor:
            x = (images.to(torch.float32) - mean).div_(std)
            return x.contiguous(memory_format=torch.channels_last)

        return normalised

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels uint8 [N, C, H, W] as float32, channels last: 0 at ``mean``, 1 one ``std`` above it."""
        return self.normaliser(images.device)(images)


class Source(Protocol):
    """Labelled images that come in batches. A subset is a source too."""

    @property
    def format(self) -> ImageFormat:
        """What the images have in common."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], on the CPU."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """A SHA-256 in hex, equal for equal data wherever they lie."""

    def subset(self, indices: Tensor) -> Self:
        """The images at ``indices`` (int64 [M]), in that order."""

    def batches(
        self,
        steps: Sequence[Tensor],
        *,
        augmentation: Augmentation = "none",
        epoch_seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> Iterator[Batch]:
        """Give the batch of each step.

        How image i is augmented depends on (epoch_seed, i) alone: neither on its batch nor on ``workers``.
        Processes that share an epoch's images among themselves see what one process would.

        Args:
            steps: for each batch its images: indices, int64 [n].
            augmentation: "none"; "paper", a shift by up to 12.5 % and a flip; "standard", what the data set
                is commonly trained with. Under each the mean is subtracted from the pixels, as in the paper,
                and they are divided by the standard deviation, which is ours.
            epoch_seed: from 0 to 2**64 - 1; another one for each epoch.
            device: where the batches go.
            workers: threads that prepare batches ahead, where preparing them takes time; 0 for none.

        Yields:
            (float32 [n, C, H, W], normalised, channels last; labels int64 [n]), both on ``device``.

        Raises:
            ValueError: another augmentation, or a seed out of its range.
            OSError: an image cannot be read; the message names its file.
        """


@dataclass(frozen=True)
class BadFile:
    """An image file that cannot be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Attributes:
        name: as in open_data.
        format: what all its images have in common.
        train: the training images.
        validation: images to choose the best epoch by; None where validation_split has to hold some out.
        test: for the one test at the end.
        bad_files: image files that were left out.
    """

    name: str
    format: ImageFormat
    train: Source
    validation: Source | None
    test: Source
    bad_files: tuple[BadFile, ...] = ()
