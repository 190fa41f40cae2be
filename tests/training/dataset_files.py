"""Small data sets in the exact formats on disk, for tests."""

import struct
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from lhc_triton.training.data.cifar import LAYOUTS


def python2_pickle(value: object) -> bytes:
    """Pickle as Python 2 did at protocol 2, numpy arrays as its numpy did."""
    out = bytearray(b"\x80\x02")
    memo = 0

    def put() -> None:
        nonlocal memo
        out.extend(b"q" + bytes([memo]) if memo < 256 else b"r" + struct.pack("<I", memo))
        memo += 1

    def write_bytes(raw: bytes) -> None:
        out.extend(b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)))
        out.extend(raw)

    def write(item: object) -> None:
        if item is None:
            out.extend(b"N")
        elif isinstance(item, bool):
            out.extend(b"\x88" if item else b"\x89")
        elif isinstance(item, int):
            if 0 <= item < 256:
                out.extend(b"K" + bytes([item]))
            elif 0 <= item < 65536:
                out.extend(b"M" + struct.pack("<H", item))
            else:
                out.extend(b"J" + struct.pack("<i", item))
        elif isinstance(item, str):
            write_bytes(item.encode())
            put()
        elif isinstance(item, list):
            out.extend(b"]")
            put()
            write_items(item, b"e")
        elif isinstance(item, dict):
            out.extend(b"}")
            put()
            write_items([part for pair in item.items() for part in pair], b"u")
        elif isinstance(item, np.ndarray):
            write_array(item)
        else:
            raise TypeError(type(item))

    def write_items(items: list, end: bytes) -> None:
        out.extend(b"(")
        for item in items:
            write(item)
        out.extend(end)

    def write_array(array: np.ndarray) -> None:
        assert array.dtype == np.uint8
        out.extend(b"cnumpy.core.multiarray\n_reconstruct\n")
        put()
        out.extend(b"cnumpy\nndarray\n")
        put()
        out.extend(b"K\x00\x85U\x01b\x87R")
        put()
        out.extend(b"(K\x01")
        for size in array.shape:
            write(size)
        out.extend(b"\x86cnumpy\ndtype\n")
        put()
        out.extend(b"U\x02u1K\x00K\x01\x87R")
        put()
        out.extend(b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        write(fortran)
        write_bytes(array.tobytes(order="F" if fortran else "C"))
        out.extend(b"tb")

    write(value)
    return bytes(out) + b"."


def cifar_arrays(name: str, batch: int = 20, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(pixels [n, 3072], labels [n]) of each image file of the python version; every class in turn."""
    random = np.random.default_rng(seed)
    layout = LAYOUTS[name][0]
    classes = 10 if name == "cifar10" else 100
    arrays = {}
    for file in (*layout.train, layout.test):
        pixels = random.integers(0, 256, (batch, 3072), dtype=np.uint8)
        arrays[file] = (pixels, np.arange(batch) % classes)
    return arrays


def cifar_files(
    name: str, binary: bool, arrays: dict[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, bytes]:
    """Content of the files of one version of CIFAR."""
    layout = LAYOUTS[name][binary]
    ten = name == "cifar10"
    classes = [f"class_{i}" for i in range(10 if ten else 100)]
    files = {}
    for file, (pixels, labels) in arrays.items():
        coarse = labels // 5
        if binary:
            columns = [labels[:, None], pixels] if ten else [coarse[:, None], labels[:, None], pixels]
            files[f"{file}.bin"] = np.concatenate(columns, axis=1).astype(np.uint8).tobytes()
            continue
        names = [f"picture_s_{i:06}.png" for i in range(len(labels))]
        kinds = {"labels": labels.tolist()}
        if not ten:
            kinds = {"fine_labels": labels.tolist(), "coarse_labels": coarse.tolist()}
        batch = {"batch_label": "training batch 1 of 5", **kinds, "data": pixels, "filenames": names}
        files[file] = python2_pickle(batch)
    if binary:
        files[layout.names] = ("\n".join(classes) + "\n\n").encode()
    else:
        key = "label_names" if ten else "fine_label_names"
        files[layout.names] = python2_pickle({"num_cases_per_batch": 10000, key: classes, "num_vis": 3072})
    files["readme.html"] = b"<p>not read</p>"
    return files


def write_cifar(root: Path, name: str, binary: bool, packed: bool, batch: int = 20, seed: int = 0) -> Path:
    """Write one version of CIFAR under ``root``, as the archive or unpacked; returns its path."""
    layout = LAYOUTS[name][binary]
    files = cifar_files(name, binary, cifar_arrays(name, batch, seed))
    if not packed:
        folder = root / layout.folder
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / layout.archive, "w:gz", compresslevel=1) as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{layout.folder}/{file}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return root / layout.archive


def write_tree(
    root: Path, counts: dict[str, dict[str, int]], size: tuple[int, int] = (40, 50), seed: int = 0
) -> Path:
    """Write JPEG files root/PART/CLASS/NAME.JPEG: ``counts`` gives their number by part and class."""
    random = np.random.default_rng(seed)
    for part, classes in counts.items():
        for position, (name, count) in enumerate(classes.items()):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = random.integers(0, 60, (*size, 3), dtype=np.uint8)
                pixels[:: position + 2] += 150
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG", quality=90)
    return root
