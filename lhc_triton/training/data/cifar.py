"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their original archives, python and binary version."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lhc_triton.training.data.inert import Inert, read_inert
from lhc_triton.training.data.memory import ImageSet
from lhc_triton.training.data.source import Data, ImageFormat

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
_MAX_FILE_BYTES = 1 << 28
_MAX_ARCHIVE_BYTES = 1 << 29
_Part = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Layout:
    """Where one version of a data set keeps what.

    Attributes:
        archive: name of the packed file.
        folder: name of the folder in it.
        train, test: names of the files with images.
        names: name of the file with the classes' names.
    """

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read."""
        return (*self.train, self.test, self.names)

    @property
    def binary(self) -> bool:
        """Whether these are the records of the binary version."""
        return self.test.endswith(".bin")


_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "cifar10": (
        Layout("cifar-10-python.tar.gz", "cifar-10-batches-py", _TEN, "test_batch", "batches.meta"),
        Layout(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _TEN),
            "test_batch.bin",
            "batches.meta.txt",
        ),
    ),
    "cifar100": (
        Layout("cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", "meta"),
        Layout(
            "cifar-100-binary.tar.gz",
            "cifar-100-binary",
            ("train.bin",),
            "test.bin",
            "fine_label_names.txt",
        ),
    ),
}
# Of the 50,000 training images, on the scale 0 to 1.
_MEANS = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
_STDS = {"cifar10": (0.2470, 0.2435, 0.2616), "cifar100": (0.2673, 0.2564, 0.2762)}
_CLASSES = {"cifar10": 10, "cifar100": 100}


def image_side(name: str, image_size: int | None) -> int:
    """Return the side of the images in pixels; ValueError for another one."""
    if image_size not in (None, SIDE):
        raise ValueError(f"image_size {image_size}: {name} images are {SIDE}x{SIDE}; that alone is supported")
    return SIDE


def open_cifar(
    name: Literal["cifar10", "cifar100"], folder: str | Path, image_size: int | None = None
) -> Data:
    """Read CIFAR-10, or CIFAR-100 with its 100 fine classes.

    The python version's files are pickles. They are read as data: nothing in them is run.

    Args:
        name: which.
        folder: an original archive, a folder that holds one, an unpacked one, or a folder that holds that.
            Of several the python version is taken, unpacked before packed.
        image_size: None or 32.

    Returns:
        The data set, without validation images. Both versions give the same.

    Raises:
        FileNotFoundError: there is none of these, or a file in it is missing; the message names it.
        ValueError: a file is damaged; the message names it; or another image size.
    """
    image_side(name, image_size)
    layout, place = _find(Path(folder), name)
    content = _unpacked(place, layout) if place.is_dir() else _packed(place, layout)
    where = {file: place / file if place.is_dir() else Path(f"{place}:{file}") for file in layout.files}
    try:
        classes = _class_names(content[layout.names], layout, _CLASSES[name])
    except ValueError as error:
        raise ValueError(f"{where[layout.names]}: {error}") from error
    shape = ImageFormat(3, SIDE, classes, _MEANS[name], _STDS[name])
    parse: Callable[[bytes, int], _Part] = _parse_binary if layout.binary else _parse_python

    def images(files: tuple[str, ...]) -> ImageSet:
        parts = []
        for file in files:
            try:
                parts.append(parse(content[file], len(classes)))
            except ValueError as error:
                raise ValueError(f"{where[file]}: {error}") from error
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ImageSet(
            torch.from_numpy(pixels.reshape(-1, 3, SIDE, SIDE)),
            torch.from_numpy(labels.astype(np.int64)),
            shape,
        )

    return Data(name, shape, images(layout.train), None, images((layout.test,)))


def _find(folder: Path, name: str) -> tuple[Layout, Path]:
    """The first version that is there, and its folder or archive."""
    layouts = LAYOUTS[name]
    for layout in layouts:
        if folder.is_file() and folder.name == layout.archive:
            return layout, folder
        if (folder / layout.test).is_file() and (folder / layout.names).is_file():
            return layout, folder
        if (folder / layout.folder).is_dir():
            return layout, folder / layout.folder
        if (folder / layout.archive).is_file():
            return layout, folder / layout.archive
    wanted = " or ".join(part for layout in layouts for part in (layout.archive, layout.folder))
    raise FileNotFoundError(f"no {name} at {folder}; it should be or hold {wanted}")


def _unpacked(folder: Path, layout: Layout) -> dict[str, bytes]:
    content = {}
    for name in layout.files:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"no file {name} in {folder}")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size} bytes; up to {_MAX_FILE_BYTES} are supported")
        content[name] = path.read_bytes()
    return content


class _TooLarge(ValueError):
    """An archive unpacks to more than is supported."""


class _Limited:
    """A stream that ends in an error where it gives more than an archive of CIFAR holds.

    ``tarfile`` reads headers whole, however long they say they are.
    """

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream
        self._left = _MAX_ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes more."""
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise _TooLarge(f"unpacks to more than the {_MAX_ARCHIVE_BYTES} bytes that are supported")
        return data


def _packed(archive: Path, layout: Layout) -> dict[str, bytes]:
    """Read the files of an archive into memory; none is written, whatever its name."""
    content = {}
    try:
        with gzip.open(archive) as raw, tarfile.open(fileobj=_Limited(raw), mode="r|") as tar:  # type: ignore
            for member in tar:
                folder, _, name = member.name.removeprefix("./").partition("/")
                if folder != layout.folder or name not in layout.files or not member.isreg():
                    continue
                if member.size > _MAX_FILE_BYTES:
                    raise ValueError(
                        f"{archive}:{name}: {member.size} bytes; up to {_MAX_FILE_BYTES} are supported"
                    )
                stream = tar.extractfile(member)
                content[name] = stream.read() if stream is not None else b""
            # Its checksum comes last, past what tarfile reads.
            rest = _Limited(raw)
            while rest.read(1 << 20):
                pass
    except _TooLarge as error:
        raise ValueError(f"{archive}: {error}") from error
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: not an intact .tar.gz ({error}); fetch it again") from error
    for name in layout.files:
        if name not in content:
            raise FileNotFoundError(f"no file {layout.folder}/{name} in {archive}")
    return content


def _class_names(content: bytes, layout: Layout, count: int) -> tuple[str, ...]:
    names: Any
    if layout.binary:
        names = content.decode("latin-1").split()
    else:
        meta = _dictionary(content)
        names = meta.get("label_names", meta.get("fine_label_names"))
    if not isinstance(names, list) or len(names) != count or not all(isinstance(n, str) for n in names):
        held = len(names) if isinstance(names, list) else "no list of"
        raise ValueError(f"holds {held} class names; {count} are needed")
    return tuple(names)


def _parse_binary(content: bytes, classes: int) -> _Part:
    """Records of labels (CIFAR-100: coarse, then fine) and pixels, a plane for each channel."""
    labels = 1 if classes == 10 else 2
    record = labels + _PIXELS
    if not content or len(content) % record:
        raise ValueError(f"{len(content)} bytes are no whole number of records of {record} bytes")
    records = np.frombuffer(bytearray(content), dtype=np.uint8).reshape(-1, record)
    _check_labels(records[:, labels - 1], classes)
    return records[:, labels:], records[:, labels - 1]


def _parse_python(content: bytes, classes: int) -> _Part:
    """A dict with "data", an array uint8 [n, 3072], and the list "labels" (CIFAR-100: "fine_labels")."""
    batch = _dictionary(content)
    pixels = _array(batch.get("data"))
    key = "labels" if classes == 10 else "fine_labels"
    labels = batch.get(key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"holds no list of numbers {key!r}")
    if len(labels) != len(pixels):
        raise ValueError(f"holds {len(labels)} labels for {len(pixels)} images")
    _check_labels(np.array(labels), classes)
    return pixels, np.array(labels, dtype=np.uint8)


def _dictionary(content: bytes) -> dict[Any, Any]:
    value = read_inert(content)
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}; a dict is needed")
    return value


def _array(value: object) -> npt.NDArray[np.uint8]:
    """The pixels out of what numpy would have made an array from."""
    match value:
        case Inert(
            state=(
                int(),
                (int(rows), int(columns)),
                Inert(name="numpy dtype", args=("u1", *_)),
                bool(fortran),
                str(raw),
            )
        ) if columns == _PIXELS and 0 < rows == len(raw) / columns:
            flat = np.frombuffer(bytearray(raw, "latin-1"), dtype=np.uint8)
            return flat.reshape((rows, columns), order="F" if fortran else "C")
    raise ValueError(f"holds no array 'data' of unsigned bytes [n, {_PIXELS}] that is whole")


def _check_labels(labels: npt.NDArray[Any], classes: int) -> None:
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}; 0 to {classes - 1} are supported"
        )
