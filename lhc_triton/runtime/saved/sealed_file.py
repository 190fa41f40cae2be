"""Tensors and one text in a safetensors file that knows its own digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lhc_triton.files import StrPath, open_regular, parse_json, printable, read_regular

MAX_FILE_BYTES = 16 << 30
MAX_HEADER = 100_000_000  # the format's own limit
TEXT_KEY = "lhc_triton"
DIGEST_KEY = "sha256"
_LENGTH = 8  # bytes before the header that give its length


class FileError(ValueError):
    """A file is not what it should be; the message is one line and does not name the file."""


def sealed(text: str, tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file with a text and, over both, a digest.

    Raises:
        FileError: a tensor is of a kind or a type that such files cannot hold, or it would be too large.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise FileError(f"tensor {printable(name)!r} is sparse, quantized or without values")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MAX_FILE_BYTES - MAX_HEADER:
        raise FileError(f"its tensors have {size} bytes; up to {MAX_FILE_BYTES - MAX_HEADER} are supported")
    # safetensors refuses tensors that share memory, as tied weights do
    plain = {name: _plain(tensor) for name, tensor in tensors.items()}
    try:
        content = memoryview(to_safetensors(plain, {TEXT_KEY: text}))
    except (SafetensorError, ValueError, KeyError) as error:
        raise FileError(f"its tensors cannot be stored ({printable(str(error), 200)})") from error
    del plain
    start = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    header = json.loads(bytes(content[_LENGTH:start]))
    header["__metadata__"][DIGEST_KEY] = _digest(header, content[start:])
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % _LENGTH)  # the tensors' bytes begin at a multiple of 8
    if len(written) > MAX_HEADER:
        raise FileError(f"its header has {len(written)} bytes; up to {MAX_HEADER} are supported")
    return [len(written).to_bytes(_LENGTH, "little"), written, content[start:]]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()


def read_text(path: StrPath) -> str | None:
    """Return the text of a safetensors file by its header alone; None where it has none of this package's.

    Raises:
        OSError: it is missing or no regular file, or cannot be read.
        FileError: it is no safetensors file.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if length > MAX_HEADER:
            raise FileError(f"no safetensors file (a header of {length} bytes)")
        return _metadata(_parsed(file.read(length))).get(TEXT_KEY)


def unsealed(path: StrPath, verify: bool = True) -> tuple[str, dict[str, Tensor]]:
    """Read a file that ``sealed`` made.

    The tensors lie in memory of their own, and what becomes of the file later does not reach them. While it
    is read, it takes twice its size.

    Args:
        path: the file.
        verify: whether to compare its digest with its content.

    Returns:
        (text, tensors on the CPU by name).

    Raises:
        OSError: it is missing or no regular file, or cannot be read.
        FileError: it is damaged, too large, not of this package, or its digest is another.
    """
    try:
        content = read_regular(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise FileError(str(error)) from error
    try:
        tensors = from_safetensors(content)  # checks the header: types, sizes, places
    except (SafetensorError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        reason = printable(str(error), 200)
        raise FileError(f"truncated, damaged, or no safetensors file ({reason}); save it again") from error
    start = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    header = _parsed(content[_LENGTH:start])
    metadata = _metadata(header)
    text, digest = metadata.get(TEXT_KEY), metadata.pop(DIGEST_KEY, None)
    if text is None:
        raise FileError("a safetensors file, but not one that lhc_triton.save() wrote")
    if verify and digest is not None and digest != _digest(header, memoryview(content)[start:]):
        raise FileError(
            "its digest is not that of its content: it was damaged or changed after it was saved; copy or "
            "save it again, or read it as it is with load(..., verify=False)"
        )
    if verify and digest is None:
        raise FileError(
            "it has no digest of its content, by which damage is found; save it again, or read it as it is "
            "with load(..., verify=False)"
        )
    return text, tensors


def _parsed(header: bytes) -> dict[str, Any]:
    try:
        found = parse_json(header.decode())
    except ValueError as error:
        raise FileError(f"no safetensors file ({printable(str(error), 200)})") from error
    if not isinstance(found, dict):
        raise FileError("no safetensors file (its header is no JSON object)")
    return found


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """Return the texts of a header, the same object as in it."""
    found = header.get("__metadata__")
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        return {}
    return found


def _digest(header: Mapping[str, Any], tensors: memoryview) -> str:
    """Return the digest of a header, without its digest, and of the tensors' bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(tensors)
    return digest.hexdigest()
