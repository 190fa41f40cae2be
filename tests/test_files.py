"""Files written whole or not at all, and what is read from outside."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from lhc_triton.files import open_regular, parse_json, printable, read_regular, write_beside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parts_are_written_one_after_the_other(tmp_path: Path) -> None:
    write_beside(tmp_path / "f", b"old")
    write_beside(tmp_path / "f", [b"new ", memoryview(b"and whole")])
    assert (tmp_path / "f").read_bytes() == b"new and whole"
    assert names(tmp_path) == ["f"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_beside(tmp_path / "f", b"old")
    seen = []

    def refuse(written: Path) -> None:
        seen.append(written.read_bytes())
        raise ValueError("not this one")

    def parts() -> object:
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="not this one"):
        write_beside(tmp_path / "f", b"new", refuse)
    with pytest.raises(OSError, match=r"No space left on device: .*f'$"):
        write_beside(tmp_path / "f", parts())  # type: ignore[arg-type]
    assert seen == [b"new"]
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


KILLED = """
import os, signal, sys
from lhc_triton.files import write_beside
def parts():
    yield b"half a file"
    os.kill(os.getpid(), signal.SIGKILL)
write_beside(sys.argv[1], parts())
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    write_beside(tmp_path / "f", b"old")
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "f")], check=False)
    assert died.returncode == -signal.SIGKILL
    left = [name for name in names(tmp_path) if name != "f"]
    assert len(left) == 1
    assert (tmp_path / "f").read_bytes() == b"old"
    (tmp_path / ".f.1234-5678.tmp").write_bytes(b"of an earlier release")
    others = [".f.mine.tmp", ".g.0123456789abcdef.tmp", "f.0123456789abcdef.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"not of this file")
    write_beside(tmp_path / "f", b"new")
    assert names(tmp_path) == sorted([*others, "f"])


def test_writers_at_once_do_not_take_each_other_for_dead(tmp_path: Path) -> None:
    path = tmp_path / "f"
    meet = threading.Barrier(4)

    def write(number: int) -> None:
        def parts() -> object:
            yield b"%d" % number
            meet.wait(60)  # all of them have half a file now
            yield b"%d" % number

        for _ in range(10):
            write_beside(path, parts())  # type: ignore[arg-type]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert path.read_bytes() in {b"%d%d" % (number, number) for number in range(4)}
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("other", ["has removed it", "holds it"])
def test_a_new_file_that_another_writer_takes_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Between its making and its lock nothing tells it from what a killed writer left."""
    path = tmp_path / "f"
    lock, begun = fcntl.flock, []

    def late(file: IO[bytes], operation: int) -> None:
        if not begun:  # of the new file, right after it was made
            (new,) = (entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp"))
            begun.append(new)
            if other == "holds it":
                held = new.open("rb")
                begun.append(held)  # open, so that the lock lasts
                lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                write_beside(path, b"theirs")
                assert not new.exists()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write_beside(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert names(tmp_path) == sorted({"f", *([begun[0].name] if other == "holds it" else [])})
    monkeypatch.undo()
    if other == "holds it":  # who would have removed it by now
        begun[1].close()
    write_beside(path, b"last")
    assert names(tmp_path) == ["f"]


def test_nothing_but_files_is_replaced_or_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for place, kind in (("pipe", "a pipe"), ("link", "a device"), (".", "a folder")):
        with pytest.raises(OSError, match=f"is {kind}; give the name of a file"):
            write_beside(tmp_path / place, b"x")
        with pytest.raises(OSError, match=f"is {kind}; give the name of a file"):
            open_regular(tmp_path / place)
    for missing in (tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(FileNotFoundError):
            open_regular(missing)
    with pytest.raises(FileNotFoundError):
        write_beside(tmp_path / "missing" / "f", b"x")
    assert names(tmp_path) == ["link", "pipe"]


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_regular(tmp_path / "f", 5) == b"12345"
    with pytest.raises(ValueError, match="it has 5 bytes; up to 4 are supported"):
        read_regular(tmp_path / "f", 4)
    with open(tmp_path / "f", "wb") as file:
        file.truncate(2**40)  # takes no room, as long as nobody reads it
    with pytest.raises(ValueError, match="it has 1099511627776 bytes"):
        read_regular(tmp_path / "f", 2**30)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("block 1", "block 1"),
        ("größer ≥ 3", "größer ≥ 3"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\u202eright to left", r"\u202eright to left"),
        ("\udc80", r"\udc80"),
        ("x" * 21, "x" * 17 + "..."),
    ],
)
def test_text_is_shown_as_a_terminal_can_show_it(text: str, shown: str) -> None:
    assert printable(text, 20) == shown
    assert shown.isprintable()


def test_json_is_read_as_it_is_written() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {}}
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "nested too deep"),
        ('{"a": NaN}', "NaN is not a number that JSON has"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1" * 5000, "Exceeds the limit"),
        ('{"a": [{"b\\u001b": 1, "c": 2, "b\\u001b": 1}]}', r"the key 'b\\x1b' is there twice"),
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
    ],
    ids=["deep", "nan", "infinity", "digits", "twice", "empty", "quotes"],
)
def test_text_that_is_no_json_is_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
