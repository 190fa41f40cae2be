"""Results on disk, written whole or not at all, in folders that are made for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lhc_triton.files import write_beside

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all.

    Args:
        path: the file; its folder is made where it does not exist.
        text: what it will hold.

    Returns:
        ``path``.

    Raises:
        OSError: if the folder or the file cannot be written.
    """
    return _write(path, text.encode())


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
    write_text(Path(folder) / ".writable", "").unlink()


def write_figure(path: str | Path, figure: Figure, **options: Any) -> Path:
    """Write a figure whole or not at all; ``options`` are those of ``savefig``."""
    made = io.BytesIO()
    figure.savefig(made, **options)
    return _write(path, made.getvalue())


def _write(path: str | Path, content: bytes) -> Path:
    path = Path(path)
    made_folder(path.parent)
    write_beside(path, content)
    return path
