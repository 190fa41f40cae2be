"""Results on disk: written beside, then renamed, so that a reader never sees half a file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_beside(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all.

    Args:
        path: the file; its folder is made where it does not exist.
        text: what it will hold.

    Returns:
        ``path``.

    Raises:
        OSError: if the folder or the file cannot be written.
    """
    return replace_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def made_folder(path: str | Path) -> Path:
    """Return a folder, made where it does not exist; OSError if it cannot be, or is a file."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path} cannot be a folder: a file has its name or a parent's") from None
    return path


def check_writable(folder: str | Path) -> None:
    """Make a folder and try to write in it, before minutes of measuring end at one that cannot be written.

    Raises:
        OSError: it cannot be made or written.
    """
    write_beside(Path(folder) / ".writable", "").unlink()


def replace_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` make a temporary file beside ``path``, then rename it; nothing is left after an error."""
    path = Path(path)
    made_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        write(beside)
        beside.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)
    return path
