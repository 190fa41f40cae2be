"""Image files as a source of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lhc_triton.training.data.augmentation import (
    check_augmentation,
    draw_moves,
    largest_shift,
    move,
    uniforms,
)
from lhc_triton.training.data.pictures import (
    CROP_DRAWS,
    centre_box,
    random_box,
    read_picture,
)
from lhc_triton.training.data.prefetch import ahead
from lhc_triton.training.data.source import Augmentation, Batch, ImageFormat


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files with their labels, decoded when a batch needs them.

    Attributes:
        root: the folder that the files' names start from.
        files: their names, with "/".
        sizes: of the files in bytes, int64 [N].
        labels: int64 [N], indices into the format's classes.
        format: what the images have in common once they are decoded.
    """

    root: Path
    files: tuple[str, ...]
    sizes: Tensor
    labels: Tensor
    format: ImageFormat

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Tensor) -> FolderSource:
        """The images at ``indices`` (int64 [M]), in that order."""
        files = tuple(self.files[i] for i in indices.tolist())
        return replace(self, files=files, sizes=self.sizes[indices], labels=self.labels[indices])

    def digest(self) -> str:
        """A SHA-256 over names and sizes of the files, labels and image size, in hex; not over the pixels."""
        sha = hashlib.sha256(repr((self.format.size, self.files)).encode())
        for tensor in (self.sizes, self.labels):
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

        "none" is the middle of each image: what resizing its shorter side to 256/224 of the size and cropping
        the size keep. "paper" shifts and flips that; "standard" crops 8 to 100 % of the image's area, resizes
        that, and flips it. Each of the ``workers`` threads prepares a batch: decoding leaves Python's lock
        free. For a CUDA device batches are pinned.
        """
        check_augmentation(augmentation, epoch_seed)
        device = torch.device(device)
        normalise = self.format.normaliser(device)

        def prepare(step: Tensor) -> tuple[Tensor, Tensor]:
            images, labels = self._decoded(step, augmentation, epoch_seed), self.labels[step]
            return (images.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (images, labels)

        for images, labels in ahead(prepare, steps, workers):
            yield normalise(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)

    def _decoded(self, step: Tensor, augmentation: Augmentation, epoch_seed: int) -> Tensor:
        """The step's images, uint8 [n, 3, H, W], channels last."""
        size = self.format.size
        pixels = np.empty((len(step), size, size, 3), dtype=np.uint8)
        paths = [self.root / self.files[i] for i in step.tolist()]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if augmentation != "standard":
            for image, path in zip(pixels, paths, strict=True):
                image[:] = read_picture(path, size, centre_box, exact=True)
            largest = largest_shift(augmentation, size)
            return move(images, draw_moves(epoch_seed, step, largest), largest) if largest else images
        drawn = uniforms(epoch_seed, step, CROP_DRAWS + 1).tolist()
        for image, path, (flip, *draws) in zip(pixels, paths, drawn, strict=True):
            picture = read_picture(path, size, partial(random_box, draws=draws), exact=False)
            image[:] = picture[:, ::-1] if flip < 0.5 else picture
        return images
