"""Makes the Fashion-MNIST files that ship with the package from a folder of the original ones.

Run as ``python -m lhc_triton.training.subset SOURCE DESTINATION``. Training images: the first 1,200 of each
class, in their original order. Test images: all 10,000. The same source always gives the same bytes.
"""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

from torch import Tensor

from lhc_triton.files import write_beside
from lhc_triton.training.data.fashion import FILES, read_fashion
from lhc_triton.training.data.splits import balanced_indices

TRAIN_IMAGES = 12_000


def idx_bytes(array: Tensor) -> bytes:
    """A uint8 tensor of any shape as the bytes of an IDX file."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 0x08, array.ndim, *array.shape)
    return header + array.contiguous().numpy().tobytes()


def make_subset(source: str | Path, destination: str | Path, train_images: int = TRAIN_IMAGES) -> None:
    """Write the class-balanced subset of ``source`` into ``destination`` as four ``.gz`` files.

    Args:
        source: folder with the four original IDX files.
        destination: folder for the results, made where missing.
        train_images: how many training images to keep, equally many of each class.

    Raises:
        FileNotFoundError, ValueError: as read_fashion; or a class has too few images.
    """
    train, test = read_fashion(source)
    train = train.subset(balanced_indices(train.labels, train_images))
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for part, images in (("train", train), ("test", test)):
        arrays = {"images": images.images.squeeze(1), "labels": images.labels.to(images.images.dtype)}
        for kind, array in arrays.items():
            packed = gzip.compress(idx_bytes(array), compresslevel=9, mtime=0)
            write_beside(destination / f"{FILES[f'{part}_{kind}']}.gz", packed)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lhc_triton.training.subset SOURCE DESTINATION")
    try:
        make_subset(sys.argv[1], sys.argv[2])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
