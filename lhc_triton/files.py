"""Files and text from outside, taken with care, and files of ours, written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NoReturn

StrPath = str | os.PathLike[str]


def printable(text: str, longest: int = 1000) -> str:
    """Return text as a terminal can show it: control characters as escapes, and no more than ``longest``.

    A name out of a file could otherwise move the cursor, or fill the screen for minutes.
    """
    shown = text if len(text) <= longest else f"{text[: longest - 3]}..."
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in shown)


def parse_json(text: str) -> Any:
    """Return what JSON text holds.

    Raises:
        ValueError: it is no JSON, holds NaN, infinity or a key twice, is nested too deep, or has a number of
            thousands of digits; one line.
    """
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(str(error).partition(":")[0] if "digits" in str(error) else str(error)) from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {printable(repr(twice), 40)} is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON has")


def open_regular(path: StrPath) -> IO[bytes]:
    """Open a regular file for reading; on anything else reading could wait for ever, or never end.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a folder, a pipe or a device, or cannot be read; one line that names it.
    """
    name = os.fspath(path)
    try:
        # Non-blocking: to open a pipe would wait for its other end. For regular files it changes nothing.
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileNotFoundError(f"{printable(name)}: there is no such file") from None
    except ValueError as error:  # a zero byte in the name
        raise FileNotFoundError(f"{printable(name)}: {error}") from None
    try:
        kind = _kind(os.fstat(handle).st_mode)
        if kind is not None:
            raise OSError(f"{printable(name)} is {kind}; give the name of a file")
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def read_regular(path: StrPath, most: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: as ``open_regular``.
        ValueError: it has more than ``most`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size} bytes; up to {most} are supported")
        return file.read(size)  # no more, even where it is growing


def _kind(mode: int) -> str | None:
    """Say what a file that is no regular one is."""
    if stat.S_ISREG(mode):
        return None
    known = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((what for test, what in known if test(mode)), "a device")


def write_beside(
    path: StrPath,
    content: bytes | Iterable[bytes | memoryview],
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write a file under another name in its folder, then rename it: readers see the old one or the new one.

    It is on the disk before it has its name. What writers that were killed left beside it is removed.

    Args:
        path: the file; a file that is there is replaced.
        content: its bytes, or their parts.
        check: called with the written file before it gets its name; what it raises ends the writing, and
            nothing is left.

    Raises:
        OSError: the folder is missing, or the file cannot be written, or is there and no regular file.
    """
    path = Path(path)
    try:
        kind = _kind(os.stat(path).st_mode)
    except OSError:
        kind = None
    if kind is not None:  # to rename over /dev/null would put a file in its place
        raise OSError(f"{printable(str(path))} is {kind}; give the name of a file")
    try:
        with _made_beside(path) as file:
            beside = Path(file.name)
            try:
                for part in [content] if isinstance(content, bytes) else content:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
                if check is not None:
                    check(beside)
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
        _remove_leftovers(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise


def _made_beside(path: Path) -> IO[bytes]:
    """Make a temporary file and lock it: the lock ends with its process, so a leftover is one without."""
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = beside.open("xb")  # made anew: a link that waits under the name is not followed
        try:
            _lock(file)
        except BlockingIOError:  # another writer has just taken it for a leftover, and removes it
            file.close()
            continue
        except OSError:
            pass  # files cannot be locked here, and none is taken for a leftover
        try:
            if os.path.samestat(os.stat(beside), os.fstat(file.fileno())):
                return file
        except FileNotFoundError:
            pass  # it was removed before it was locked
        file.close()


def _lock(file: IO[bytes]) -> None:
    """Lock a file for as long as it is open.

    Raises:
        BlockingIOError: another has locked it.
        OSError: files cannot be locked here.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{16}}|\d+-\d+)\.tmp")
    try:
        names = [entry.name for entry in os.scandir(path.parent) if pattern.fullmatch(entry.name)]
    except OSError:
        return
    for name in names:
        left = path.with_name(name)
        try:
            with open_regular(left) as file:
                _lock(file)
                left.unlink(missing_ok=True)
        except OSError:
            continue  # in use, gone, or another user's


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
