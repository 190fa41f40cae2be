"""ImageNet, and any other tree with a folder of image files for each class."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import torch

from lhc_triton.training.data.folder import FolderSource
from lhc_triton.training.data.pictures import SUFFIXES, BadPictureError, check_picture
from lhc_triton.training.data.prefetch import ahead
from lhc_triton.training.data.source import BadFile, Data, ImageFormat

DEFAULT_SIZE = 224
_SMALLEST, _LARGEST = 8, 1024
_WORDNET = re.compile(r"n\d{8}")
# Of ImageNet's training images, on the scale 0 to 1; commonly used for other photographs too.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EXPECTED = "train/CLASS/FILE, and val/CLASS/FILE or test/CLASS/FILE"

_Tree = dict[str, list[tuple[str, int]]]
"""Names and sizes of the files of each class."""


def image_side(image_size: int | None) -> int:
    """Return the side that images are brought to; ValueError for one that is not supported."""
    size = DEFAULT_SIZE if image_size is None else image_size
    if not _SMALLEST <= size <= _LARGEST:
        raise ValueError(f"image_size {size}; {_SMALLEST} to {_LARGEST} are supported")
    return size


def open_folder(
    name: Literal["imagenet", "folder"],
    folder: str | Path,
    image_size: int | None = None,
    on_bad_file: Literal["fail", "skip"] = "fail",
) -> Data:
    """Open a tree root/train/CLASS/FILE with root/val/CLASS/FILE, root/test/CLASS/FILE, or both.

    The class folders' names, sorted, are the classes. With both val and test, val serves to choose the best
    epoch; one of them alone is for the test at the end, and validation_split can hold images out of train.
    Hidden files are passed over, and those whose suffix is not one of pictures.

    Args:
        name: "imagenet", whose classes have WordNet's names (n01440764), all 1,000 or some; or "folder".
        folder: the root.
        image_size: height and width that images are brought to; default 224.
        on_bad_file: "fail" reads no image now; one that cannot be read raises an OSError when its turn comes.
            "skip" decodes every file now, once, on all cores, and leaves the bad ones out.

    Returns:
        The data set, and which files were left out of it.

    Raises:
        FileNotFoundError: the root or one of its parts is missing.
        ValueError: a class without images; parts that differ in their classes; fewer than two classes; images
            outside a class folder; names that are not WordNet's; an image size outside 8 to 1,024.
    """
    if on_bad_file not in ("fail", "skip"):
        raise ValueError(f"on_bad_file {on_bad_file!r} is not one of fail, skip")
    size = image_side(image_size)
    root = Path(folder)
    parts = _parts(root)
    trees = {part: _scan(root / part) for part in parts}
    classes = _classes(root, trees, wordnet=name == "imagenet")
    bad = _remove_bad(root, trees) if on_bad_file == "skip" else ()
    shape = ImageFormat(3, size, classes, _MEAN, _STD)
    sources = [_source(root, part, tree, shape) for part, tree in trees.items()]
    return Data(name, shape, sources[0], sources[1] if len(parts) == 3 else None, sources[-1], bad)


def _parts(root: Path) -> tuple[str, ...]:
    """The folders that are there: train, then val, test or both."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; it should hold {_EXPECTED}")
    if not (root / "train").is_dir():
        raise FileNotFoundError(f"no folder train in {root}; it should hold {_EXPECTED}")
    held_out = [part for part in ("val", "test") if (root / part).is_dir()]
    if not held_out:
        raise FileNotFoundError(
            f"neither val nor test in {root}; move images of each class from train to val/CLASS to test on"
        )
    return ("train", *held_out)


def _scan(part: Path) -> _Tree:
    tree: _Tree = {}
    with os.scandir(part) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.is_dir() and not entry.name.startswith("."):
                tree[entry.name] = _pictures(entry.path)
            elif _is_picture(entry):
                raise ValueError(
                    f"{part}: {entry.name} lies outside a class folder; sort the images into {part}/CLASS"
                )
    return tree


def _pictures(folder: str) -> list[tuple[str, int]]:
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.stat().st_size) for entry in entries if _is_picture(entry))


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()


def _classes(root: Path, trees: dict[str, _Tree], wordnet: bool) -> tuple[str, ...]:
    """The classes that all parts agree on, each with an image."""
    train = trees["train"]
    if len(train) < 2:
        raise ValueError(f"{root / 'train'}: {len(train)} class folders; at least 2 are needed")
    for part, tree in trees.items():
        for label in sorted(train.keys() ^ tree.keys()):
            having, lacking = ("train", part) if label in train else (part, "train")
            raise ValueError(
                f"{root}: {having} has the class {label}, {lacking} has not ({len(train)} classes in train, "
                f"{len(tree)} in {part}); both need the same"
            )
        for label, files in tree.items():
            if not files:
                raise ValueError(f"{root / part / label}: no image of this class; add some or remove it")
    strange = next((label for label in train if wordnet and not _WORDNET.fullmatch(label)), None)
    if strange is not None:
        raise ValueError(
            f"{root / 'train' / strange}: ImageNet's classes are named like n01440764; "
            "open other trees as 'folder'"
        )
    return tuple(train)


def _remove_bad(root: Path, trees: dict[str, _Tree]) -> tuple[BadFile, ...]:
    """Decode all files, take those that cannot be read out of the trees, and name them."""
    names = [
        f"{part}/{label}/{file}"
        for part, tree in trees.items()
        for label, files in tree.items()
        for file, _ in files
    ]

    def problem(name: str) -> str | None:
        try:
            check_picture(root / name)
        except BadPictureError as error:
            return error.reason
        return None

    workers = len(os.sched_getaffinity(0))
    reasons = dict(zip(names, ahead(problem, names, workers), strict=True))
    for part, tree in trees.items():
        for label, files in tree.items():
            tree[label] = [file for file in files if reasons[f"{part}/{label}/{file[0]}"] is None]
            if not tree[label]:
                raise ValueError(f"{root / part / label}: none of its {len(files)} images can be read")
    return tuple(BadFile(name, reason) for name, reason in reasons.items() if reason is not None)


def _source(root: Path, part: str, tree: _Tree, shape: ImageFormat) -> FolderSource:
    counts = torch.tensor([len(files) for files in tree.values()])
    files = [(f"{part}/{label}/{file}", size) for label, files in tree.items() for file, size in files]
    return FolderSource(
        root,
        tuple(name for name, _ in files),
        torch.tensor([size for _, size in files]),
        torch.arange(len(tree)).repeat_interleave(counts),
        shape,
    )
