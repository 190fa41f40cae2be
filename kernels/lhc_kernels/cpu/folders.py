"""The folder in which this machine's measurements and builds are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $LHC_TRITON_CACHE, else lhc_triton in the user's cache folder.

    Raises:
        RuntimeError: no variable says where, and the user has no home.
    """
    folder = os.environ.get("LHC_TRITON_CACHE")
    if folder:
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lhc_triton"
