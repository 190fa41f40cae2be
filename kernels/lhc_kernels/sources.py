"""The identity of the kernels' source text."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

CHOOSING = ("ahead.py", "aot.py", "choice.py", "devices.py", "roofline.py", "sources.py", "table.py")
"""Files that choose or examine configs; with a chosen one they change nothing about a launch."""


@functools.cache
def source_digest() -> str:
    """Return 16 hexadecimal digits that change with the Python files of this package that a launch runs.

    A measured time belongs to the code that took it, so tuning keys hold this digest. Another heuristic, or
    another candidate, leaves the times of the configs that are known already as they are.
    """
    return _digest(path for path in Path(__file__).parent.glob("*.py") if path.name not in CHOOSING)


def native_source_digest() -> str:
    """Return 16 hexadecimal digits that change with the CPU kernel's sources, compiler and flags."""
    return _native_digest(os.environ.get("CXX", ""), os.environ.get("LHC_TRITON_NATIVE_FLAGS", ""))


@functools.cache
def _native_digest(compiler: str, flags: str) -> str:
    folder = Path(__file__).parent / "cpu"
    sources = _digest(path for path in folder.iterdir() if path.suffix in (".cpp", ".h", ".py"))
    return hashlib.sha256("\0".join((sources, compiler, flags)).encode()).hexdigest()[:16]


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
