"""The command line, thin: it parses, calls, and shows. Results go to stdout, progress to stderr."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from lhc_triton.cli import demo, own, learn, run, bench, examine  # isort: skip  (the order of --help)
from lhc_triton.cli.app import app
from lhc_triton.cli.console import tell_once
from lhc_triton.interrupts import INTERRUPTED, end_at_interrupts, is_command, raise_interrupts

__all__ = ["app", "bench", "demo", "examine", "learn", "main", "own", "run"]

USER_MISTAKE = 2


def main() -> None:
    """Run the command line; exit code 2 and one line on stderr for a user's mistake, 130 for an interrupt."""
    try:
        raise_interrupts()
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("LHC_TRITON_DEBUG"):
            raise
        _refuse(_told(error))
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        # The parser's own errors (unknown option, ...) share this method, and no public base class.
        if not hasattr(error, "format_message"):
            raise
        _refuse(f"{error.format_message().rstrip('.')}. See lhc-triton --help.")
    finally:
        if is_command():
            end_at_interrupts()
    if code == INTERRUPTED:  # of our own, or from the parser, which says nothing
        tell_once("lhc-triton: interrupted")
    raise SystemExit(code if isinstance(code, int) else 0) from None


def _told(error: Exception) -> str:
    """Return an error's message; the system's own with the file first and without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _refuse(message: str) -> NoReturn:
    tell_once(f"lhc-triton: {' '.join(message.split())}")
    raise SystemExit(USER_MISTAKE) from None
