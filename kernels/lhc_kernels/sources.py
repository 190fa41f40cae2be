"""The identity of the kernels' source text."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def source_digest() -> str:
    """Return 16 hexadecimal digits that change whenever a Python file of this package does.

    A measured time belongs to the code that took it, so tuning keys hold this digest.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
