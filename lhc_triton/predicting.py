"""Classifying image files with any network: decoded ahead in threads, batched, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .training.data.pictures import SUFFIXES, BadPictureError, centre_box, read_picture

Progress = Callable[[int, int, str], None]
AHEAD = 2  # batches that are decoded while one runs


@dataclass(frozen=True)
class Class:
    """One class of an image: its index, its name (the index as text without names), its softmax."""

    index: int
    name: str
    share: float


@dataclass(frozen=True)
class Prediction:
    """What one image file is.

    Attributes:
        file: the image.
        classes: the likeliest ones, first the best; empty where the file could not be read.
        problem: why it could not be.
    """

    file: str
    classes: tuple[Class, ...]
    problem: str = ""

    def shares(self) -> str:
        """Write the classes' shares for people."""
        first = [f"{found.share:.3f}" for found in self.classes[:1]]
        return ", ".join([*first, *(f"{found.name} {found.share:.3f}" for found in self.classes[1:])])


@dataclass(frozen=True)
class Predictions:
    """What all images are, and how long that took.

    Attributes:
        rows: in the order of the files.
        seconds: from the first file to the last answer.
        network_seconds: of these, in the network.
    """

    rows: tuple[Prediction, ...]
    seconds: float
    network_seconds: float

    @property
    def read(self) -> int:
        """Images that could be read."""
        return sum(not row.problem for row in self.rows)

    @property
    def images_per_s(self) -> float:
        """Images classified in a second, decoding included."""
        return self.read / self.seconds

    @property
    def network_share(self) -> float:
        """Share of the time that the network took; files are decoded beside it."""
        return self.network_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, ready for JSON."""
        return {
            "images": [asdict(row) for row in self.rows],
            "seconds": self.seconds,
            "network_seconds": self.network_seconds,
            "images_per_s": self.images_per_s,
        }


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files, and of folders the image files in them, sorted by name.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: there is no image file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: there is no such file")
    if not files:
        raise ValueError(f"no image file in {', '.join(map(str, paths))}; endings: {', '.join(SUFFIXES)}")
    return files


class Classifier:
    """A network with what it wants of an image, ready for files.

    Args:
        model: maps images [N, C, H, W] to [N, classes].
        inputs: its example, one tensor [N, C, H, W] with C of 1 or 3 and H = W.
        mean: one number, or one for each channel with commas between, on the scale 0 to 1.
        std: the same; what is left is divided by it.
        classes: a text file with a class name in each line, or None.
        device: where the network is.

    Raises:
        ValueError: the network takes no square images of 1 or 3 channels, mean or std does not fit, or the
            names are not as many as the classes.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        mean: str = "0",
        std: str = "1",
        classes: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        shapes = [tuple(x.shape) for x in inputs]
        shape = shapes[0]
        if len(shapes) != 1 or len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
            raise ValueError(
                f"the network takes {shapes}; predict needs one [N, C, H, W] with C 1 or 3 and H = W"
            )
        self._model, self._device = model, torch.device(device)
        self._channels, self._size = shape[1], shape[2]
        self._mean, self._std = (
            _numbers(n, text, self._channels) for n, text in (("mean", mean), ("std", std))
        )
        if not bool((self._std > 0).all()):
            raise ValueError(f"std={std} is not supported: give numbers above 0")
        with torch.inference_mode():
            output = model(*inputs)
        if not isinstance(output, Tensor) or output.ndim != 2:
            found = (
                f"a tensor {tuple(output.shape)}"
                if isinstance(output, Tensor)
                else f"a {type(output).__name__}"
            )
            raise ValueError(f"the network gives {found}; predict needs one of [N, classes]")
        self._names = [str(index) for index in range(output.shape[1])]
        if classes is not None:
            names = [line.strip() for line in classes.read_text().splitlines() if line.strip()]
            if len(names) != output.shape[1]:
                raise ValueError(f"{classes} names {len(names)} classes, the network has {output.shape[1]}")
            self._names = names

    def run(
        self,
        files: Sequence[Path],
        batch: int = 16,
        top: int = 1,
        progress: Progress = lambda done, total, label: None,
    ) -> Predictions:
        """Classify files.

        Args:
            files: image files; what cannot be read is told in its row.
            batch: images of a call.
            top: classes to tell of each.
            progress: called with (done, all, rate) after each batch.

        Raises:
            ValueError: batch or top is below 1.
        """
        for name, value in (("batch", batch), ("top", top)):
            if value < 1:
                raise ValueError(f"{name}={value} is not supported: give 1 or more")
        rows: list[Prediction] = []
        begin, inside = time.perf_counter(), 0.0
        for part, images in self._batches(files, batch):
            good = [image for image in images if isinstance(image, np.ndarray)]
            found: list[tuple[Class, ...]] = []
            if good:
                start = time.perf_counter()
                found = self._classes(np.stack(good), top)
                inside += time.perf_counter() - start
            answers = iter(found)
            for file, image in zip(part, images, strict=True):
                readable = isinstance(image, np.ndarray)
                rows.append(
                    Prediction(str(file), next(answers) if readable else (), "" if readable else str(image))
                )
            rate = len(rows) / (time.perf_counter() - begin)
            progress(len(rows), len(files), f"{rate:,.0f} images/s")
        return Predictions(tuple(rows), time.perf_counter() - begin, inside)

    def _batches(self, files: Sequence[Path], batch: int) -> Iterator[tuple[Sequence[Path], list[Any]]]:
        """Yield files with their pixels, or with what is wrong with them, and decode later ones meanwhile."""
        parts = [files[first : first + batch] for first in range(0, len(files), batch)]
        with ThreadPoolExecutor() as pool:
            coming = [[pool.submit(self._read, file) for file in part] for part in parts[:AHEAD]]
            for index, part in enumerate(parts):
                if index + AHEAD < len(parts):
                    coming.append([pool.submit(self._read, file) for file in parts[index + AHEAD]])
                yield part, [job.result() for job in coming.pop(0)]

    def _read(self, file: Path) -> Any:
        try:
            return read_picture(file, self._size, centre_box, exact=True)
        except BadPictureError as error:
            return error.reason

    def _classes(self, pixels: np.ndarray, top: int) -> list[tuple[Class, ...]]:
        with torch.inference_mode():
            shares = self._model(self._prepared(pixels)).float().softmax(dim=1)
            best = shares.topk(min(top, shares.shape[1]), dim=1)
        return [
            tuple(Class(i, self._names[i], s) for i, s in zip(indices, values, strict=True))
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def examples(self, files: Sequence[Path], most: int = 16) -> Tensor:
        """Return the first images that can be read as a batch [N, C, H, W]; ValueError if there is none."""
        good: list[np.ndarray] = []
        for _, images in self._batches(files, most):
            good += [image for image in images if isinstance(image, np.ndarray)]
            if len(good) >= most:
                break
        if not good:
            raise ValueError(f"none of the {len(files)} images can be read")
        return self._prepared(np.stack(good[:most]))

    def _prepared(self, pixels: np.ndarray) -> Tensor:
        images = torch.from_numpy(pixels).to(self._device, torch.float32).permute(0, 3, 1, 2) / 255
        if self._channels == 1:  # the weights of ITU-R BT.601, as Pillow's own grey
            images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(
                dim=1, keepdim=True
            )
        return (images - self._mean.to(self._device)) / self._std.to(self._device)


def _numbers(name: str, text: str, channels: int) -> Tensor:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, channels) or not all(np.isfinite(values)):
        raise ValueError(
            f"{name}={text!r} is not supported: give one number, or {channels} with commas between"
        )
    return torch.tensor(values).view(-1, 1, 1)
