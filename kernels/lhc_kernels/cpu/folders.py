"""The folder in which this machine's measurements and builds are kept, and what takes its place."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from pathlib import Path

_temporary: dict[str, Path] = {}  # by what is kept in them


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


def temporary_folder(what: str, reason: str) -> Path:
    """Return a folder of this process's for what its cache cannot keep; it goes with the process.

    Args:
        what: is kept in it, for people; there is one folder for each.
        reason: why the cache does not do, for the warning.

    Warns:
        RuntimeWarning: at the first call for something, with what to do.

    Raises:
        OSError: nor can temporary files be written.
    """
    if what not in _temporary:
        folder = Path(tempfile.mkdtemp(prefix="lhc_triton-"))
        _temporary[what] = folder
        atexit.register(_remove, folder, os.getpid())
        message = f"{reason}; until this process ends, {what} are kept in {folder}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return _temporary[what]


def temporary_of(what: str) -> Path | None:
    """Return the folder that ``temporary_folder`` has made for something, if it has."""
    return _temporary.get(what)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not at the end of a forked child
        shutil.rmtree(folder, ignore_errors=True)
