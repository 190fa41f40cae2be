"""Fashion-MNIST from its original IDX files: loading, checking, splitting, normalising, augmenting."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MEAN, STD = 0.2860, 0.3530
"""Mean and standard deviation of the pixels of the 60,000 training images, on the scale 0 to 1."""

FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
PACKAGED_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "fashion_mnist"
SIDE = 28

_UNSIGNED_BYTE = 0x08
_MAX_BYTES = 1 << 30
_GZIP_MAGIC = b"\x1f\x8b"


def load_idx(path: str | Path) -> Tensor:
    """Read one IDX file of unsigned bytes.

    The format is the one of the MNIST family: two zero bytes, a byte for the type of an element, a byte for
    the number of dimensions, each dimension as a big-endian 32-bit integer, then the elements, last dimension
    fastest.

    Args:
        path: the file; read as gzip where its name ends in ``.gz``, else as it is.

    Returns:
        A uint8 tensor of the shape that the header gives.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no gzip or IDX file, is cut short, is corrupt, holds another type than
            unsigned bytes, or holds more than its header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            if path.suffix != ".gz":
                return _parse_idx(raw, path)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _parse_idx(stream, path)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not an intact gzip file ({error}); fetch it again") from error
    except EOFError as error:
        raise ValueError(f"{path}: the gzip data end too early; fetch it again") from error


def _parse_idx(stream: IO[bytes] | gzip.GzipFile, path: Path) -> Tensor:
    head = stream.read(4)
    if head[:2] == _GZIP_MAGIC:
        raise ValueError(f"{path}: is gzip data under a name without .gz; rename it")
    if len(head) < 4:
        raise ValueError(f"{path}: {len(head)} bytes are too few for the 4 bytes that open an IDX file")
    zero, element, dimensions = struct.unpack(">HBB", head)
    if zero != 0:
        raise ValueError(f"{path}: opens with {head.hex()}, but an IDX file opens with two zero bytes")
    if element != _UNSIGNED_BYTE:
        raise ValueError(
            f"{path}: elements of IDX type 0x{element:02x}; only unsigned bytes (0x08) are supported"
        )
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{path}: {dimensions} dimensions; 1 to 4 are supported")
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ValueError(f"{path}: the header ends before its {dimensions} sizes")
    shape = struct.unpack(f">{dimensions}I", sizes)
    count = math.prod(shape)
    if not 0 < count <= _MAX_BYTES:
        raise ValueError(f"{path}: the header promises {count} bytes; 1 to {_MAX_BYTES} are supported")
    # One byte more than promised, so that a longer file is noticed without unpacking all of it.
    data = stream.read(count + 1)
    if len(data) != count:
        held = "more" if len(data) > count else str(len(data))
        raise ValueError(f"{path}: the header promises {count} bytes of data, the file holds {held}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels.

    Attributes:
        images: uint8 [N, 1, 28, 28], 0 is the background.
        labels: int64 [N], indices into CLASSES.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 1:
            raise ValueError(
                f"images are {self.images.dtype} {list(self.images.shape)}; uint8 [N, 1, H, W] are supported"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}; "
                f"int64 [{len(self.images)}] are needed, one for each image"
            )
        if len(self.labels) == 0:
            raise ValueError("an image set needs at least one image")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(CLASSES):
            raise ValueError(f"labels run from {low} to {high}; 0 to {len(CLASSES) - 1} are supported")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at ``indices`` (int64 [M]), in that order."""
        return ImageSet(self.images[indices], self.labels[indices])

    def digest(self) -> str:
        """A SHA-256 over the shape, pixels and labels, in hex."""
        sha = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class FashionMNIST:
    """Images of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; Expat licence).

    Attributes:
        train: 60,000 images from a folder of the original files, or the 12,000 of the package.
        test: the 10,000 test images.
    """

    train: ImageSet
    test: ImageSet

    @classmethod
    def from_folder(cls, folder: str | Path) -> FashionMNIST:
        """Read the four original files from a folder, with or without ``.gz``.

        Raises:
            FileNotFoundError: the folder or one of the files is missing; the message names it.
            ValueError: a file is damaged, or its images and labels do not go together; the message names it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}; it should hold {', '.join(FILES.values())} (.gz or not)"
            )
        paths = {key: _find(folder, name) for key, name in FILES.items()}
        return cls(
            _image_set(paths["train_images"], paths["train_labels"]),
            _image_set(paths["test_images"], paths["test_labels"]),
        )

    @classmethod
    def packaged(cls) -> FashionMNIST:
        """The images that ship with the package: 1,200 training images of each class, and all test images."""
        return cls.from_folder(PACKAGED_FOLDER)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no file {name}.gz or {name} in {folder}")


def _image_set(images_path: Path, labels_path: Path) -> ImageSet:
    images, labels = load_idx(images_path), load_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{images_path}: shape {list(images.shape)}; [N, {SIDE}, {SIDE}] is needed")
    if labels.ndim != 1 or len(labels) != len(images):
        raise ValueError(
            f"{labels_path}: shape {list(labels.shape)}; [{len(images)}] is needed, "
            f"one label for each image of {images_path.name}"
        )
    if int(labels.max()) >= len(CLASSES):
        raise ValueError(f"{labels_path}: label {int(labels.max())}; 0 to {len(CLASSES) - 1} are supported")
    return ImageSet(images.unsqueeze(1), labels.to(torch.int64))


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
    train: ImageSet, validation_images: int, seed: int, train_images: int | None = None
) -> tuple[ImageSet, ImageSet]:
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


def normalise(images: Tensor) -> Tensor:
    """Pixels uint8 [N, 1, H, W] as float32 with mean 0 and deviation 1 over the training images."""
    return (images.to(torch.float32) - 255 * MEAN) / (255 * STD)


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
