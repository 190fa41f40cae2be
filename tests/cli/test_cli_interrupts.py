"""Ctrl-C at any moment: exit code 130 and one line, without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lhc_triton.interrupts import is_command

SOURCE = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(SOURCE / folder) for folder in (".", "kernels", "bench")),
    "OMP_NUM_THREADS": "1",
}
# What an installed `lhc-triton` is.
SCRIPT = "import sys\nfrom lhc_triton.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


def command(folder: Path, how: str) -> list[str]:
    if how == "module":
        return [sys.executable, "-m", "lhc_triton"]
    script = folder / "lhc-triton"
    script.write_text(SCRIPT)
    return [sys.executable, str(script)]


def heed_interrupts() -> None:
    """Be interrupted as a terminal's commands are: these tests may run in the background, which is not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_library(process: subprocess.Popen, name: str) -> None:
    """Wait until a process has mapped a shared library; torch's first come right after our first line."""
    end = time.monotonic() + 60
    while name not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("how", "library", "seconds"),
    [
        ("script", "libtorch_global_deps", 0.0),
        ("module", "libtorch_global_deps", 0.1),
        ("script", "libtorch_python", 0.0),
        ("module", "libtorch_python", 0.3),
        ("script", "libtorch_python", 0.8),
        ("script", "libtorch_python", 3.0),
    ],
)
def test_an_interrupt_ends_a_command_without_a_traceback(tmp_path, how, library, seconds):
    arguments = [*command(tmp_path, how), "train", "--preset", "quick", "--out", "run"]
    with subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        wait_for_library(process, library)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "lhc-triton: interrupted"
    assert "Traceback" not in out + error


@pytest.mark.parametrize(
    ("argv", "orig_argv", "is_it"),
    [
        (["/usr/bin/lhc-triton", "demo"], ["python", "/usr/bin/lhc-triton", "demo"], True),
        (["-m", "demo"], ["python", "-X", "utf8", "-m", "lhc_triton", "demo"], True),
        (["-m", "demo"], ["python", "-mlhc_triton.cli", "demo"], True),
        (["-m", "tests"], ["python", "-m", "pytest", "tests"], False),
        (["-m", "lhc_triton"], ["python", "-m", "pytest", "lhc_triton"], False),
        (["mine.py", "lhc-triton"], ["python", "mine.py", "lhc-triton"], False),
        (["-c"], ["python", "-c", "import lhc_triton"], False),
        ([""], ["python"], False),
    ],
)
def test_programs_that_only_import_the_package_keep_their_interrupts(monkeypatch, argv, orig_argv, is_it):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert is_command() is is_it


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """As in the background of a shell script."""
    ignore = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", ignore, *command(tmp_path, "script"), "--version"]
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        wait_for_library(process, "libtorch_global_deps")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.startswith("lhc-triton ")
