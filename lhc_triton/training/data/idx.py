"""Reading IDX files, the format of the MNIST family."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

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
