"""Ctrl-C at the command line: one line and exit code 130, from the first import to the last."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130
COMMAND = "lhc-triton"


def is_command() -> bool:
    """Return whether this process was started as the command line, by its name or by ``python -m``."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program != "-m":  # what Python calls a program until it has found its module
        return program == COMMAND
    module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m")
    return module.partition(".")[0] == __name__.partition(".")[0]


def end_at_interrupts() -> None:
    """Let an interrupt end the process at once, for times at which there is nothing to tidy up.

    An exception would not do: libraries turn one that comes while they are imported into another, and Python
    shows all of them. Where interrupts are ignored or somebody else's, they stay so.
    """
    _exchange(signal.default_int_handler, _end)


def raise_interrupts() -> None:
    """Let an interrupt raise KeyboardInterrupt again."""
    _exchange(_end, signal.default_int_handler)


def _exchange(old: object, new: signal._HANDLER) -> None:
    if signal.getsignal(signal.SIGINT) is old:
        with suppress(ValueError):  # not the main thread, which alone is interrupted
            signal.signal(signal.SIGINT, new)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{COMMAND}: interrupted\n".encode())
    os._exit(INTERRUPTED)
