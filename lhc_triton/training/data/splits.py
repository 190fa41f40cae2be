"""Class-balanced choices of images."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from lhc_triton.training.data.source import Source

AnySource = TypeVar("AnySource", bound=Source)


def balanced_indices(labels: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Choose ``count`` images, equally many of each class.

    Where the classes do not divide ``count``, the first ones give one more.

    Args:
        labels: int64 [N].
        count: how many to choose.
        generator: draws at random; without it the first images of each class are taken.

    Returns:
        int64 [count], ascending.

    Raises:
        ValueError: a class has too few images.
    """
    classes = torch.unique(labels).tolist()
    if count < len(classes):
        raise ValueError(
            f"{count} images cannot cover {len(classes)} classes; choose at least {len(classes)}"
        )
    chosen = []
    for position, label in enumerate(classes):
        want = count // len(classes) + (position < count % len(classes))
        members = torch.nonzero(labels == label).flatten()
        if want > len(members):
            raise ValueError(f"{count} images need {want} of class {label}, which has {len(members)}")
        if generator is not None:
            members = members[torch.randperm(len(members), generator=generator)]
        chosen.append(members[:want])
    return torch.cat(chosen).sort().values


def validation_split(
    train: AnySource, validation_images: int, seed: int, train_images: int | None = None
) -> tuple[AnySource, AnySource]:
    """Hold a class-balanced validation set out of the training images.

    Args:
        train: the training images.
        validation_images: how many are held out.
        seed: draws which.
        train_images: how many of the rest are trained on, class-balanced; default all.

    Returns:
        (training set, validation set), which share no image.

    Raises:
        ValueError: there are too few images for the two sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = balanced_indices(train.labels, validation_images, generator)
    keep = torch.ones(len(train), dtype=torch.bool)
    keep[held_out] = False
    rest = train.subset(torch.nonzero(keep).flatten())
    if train_images is not None:
        rest = rest.subset(balanced_indices(rest.labels, train_images, generator))
    return rest, train.subset(held_out)
