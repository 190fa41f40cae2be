"""Tensors and JSON in one safetensors file, written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lhc_triton.files import open_regular, parse_json, write_beside

MAX_FILE_BYTES = 4 << 30
_KEY = "lhc_triton"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write tensors with a JSON document into one safetensors file.

    Args:
        path: the file.
        tensors: by name; copied to the CPU, made contiguous, so that shared storage is written once per name.
        document: what JSON can hold (no NaN); read back by read_tensors.

    Raises:
        OSError: the file cannot be written.
        ValueError: the document holds NaN or infinity, or the file would be larger than can be read back.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: would have {size} bytes; up to {MAX_FILE_BYTES} are supported")
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(document, allow_nan=False, sort_keys=True)
    write_beside(path, save(plain, metadata={_KEY: text}))


def read_state(path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """Read the tensors of any safetensors file.

    Returns:
        (tensors on the CPU by name, the text of this package's document if the file has one).

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a folder, a pipe or a device.
        ValueError: it is truncated, corrupt or too large; one line.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: {size} bytes; up to {MAX_FILE_BYTES} are supported")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_KEY)
            # clone: the file is mapped, and may be replaced while its tensors live on.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, text  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not an intact safetensors file ({error})") from error


def read_tensors(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what write_tensors wrote.

    Args:
        path: the file.
        kind: what the document must name under "kind".
        version: what it must give under "version".

    Returns:
        (tensors on the CPU by name, the JSON document).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupt, too large, or of another kind or version; one line.
    """
    tensors, text = read_state(path)
    try:
        document = parse_json(text) if text is not None else None
    except ValueError as error:
        raise ValueError(f"{path}: its metadata are not JSON ({error})") from error
    found = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(document, dict) or found != kind:
        raise ValueError(f"{path}: holds {found or 'no lhc_triton metadata'}, not {kind}")
    if document.get("version") != version:
        raise ValueError(f"{path}: {kind} version {document.get('version')}; version {version} is supported")
    return tensors, document
