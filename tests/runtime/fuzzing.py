"""What the fuzz tests share: damage at random but seeded, and little room for what reads it.

LHC_TRITON_FUZZ sets the number of cases (`make fuzz`), LHC_TRITON_FUZZ_SEED where they begin.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CASES = int(os.environ.get("LHC_TRITON_FUZZ", "100"))
FIRST = int(os.environ.get("LHC_TRITON_FUZZ_SEED", "0"))
ROOM = 2**30  # bytes of address space that a case may take beside what the process has
HANGS_S = 120  # far above any case


@contextmanager
def little_room() -> Iterator[None]:
    """Bound what a case may allocate, and end one that does not come back."""

    def late(*_: Any) -> None:
        raise AssertionError(f"a case took more than {HANGS_S} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    signal.alarm(HANGS_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def bits(rng: random.Random, content: bytes, *_: Any) -> bytes:
    """Flip a few bits anywhere."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def header(rng: random.Random, content: bytes, *_: Any) -> bytes:
    """Change, drop or repeat bytes of the header."""
    length = int.from_bytes(content[:8], "little")
    at, size = 8 + rng.randrange(length), rng.choice((1, 1, 3, 40))
    inside = rng.choice((b"", rng.randbytes(size), content[at : at + size] * 2, b"9" * size, b'"', b"["))
    changed = content[:at] + inside + content[at + size :]
    return (length + len(changed) - len(content)).to_bytes(8, "little", signed=True) + changed[8:]


def cut(rng: random.Random, content: bytes, *_: Any) -> bytes:
    """End early, or go on too long."""
    return content[: rng.randrange(len(content))] if rng.random() < 0.7 else content + rng.randbytes(64)


def out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what a call gives, or its error, which must not be that memory was short."""
    try:
        return call(), None
    except Exception as error:
        if out_of_memory(error):
            raise
        return None, error


@contextmanager
def named(case: int, damage: Callable[..., bytes]) -> Iterator[None]:
    """Start the clock of a case, and say in a failure how to have it again."""
    signal.alarm(HANGS_S)
    try:
        yield
    except BaseException as error:
        error.add_note(f"case {case} of {damage.__name__}: LHC_TRITON_FUZZ_SEED={case} LHC_TRITON_FUZZ=1")
        raise
