"""Some of what ``make soak`` does to processes at work; and that harm would be seen."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import disturbances
import pytest
import torch

from lhc_kernels.cpu.building import LIBRARY

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.parametrize(
    ("kind", "cases"), [("build", 3), ("tune", 3), ("save", 2), ("train", 1), ("call", 2)]
)
def test_processes_at_work_may_be_crowded_forked_and_killed(kind: str, cases: int) -> None:
    """In a process that has no threads yet, for it forks; with this one's native kernel, where it has one."""
    caches = (Path(library).parents[2] for library in torch.ops.loaded_libraries if library.endswith(LIBRARY))
    done = subprocess.run(
        [sys.executable, str(SOAK), "--only", kind, "--disturbances", str(cases)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "LHC_TRITON_CACHE": str(next(caches, os.environ["LHC_TRITON_CACHE"])),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{cases} of {cases} times {kind} disturbed from seed 0: 0 went wrong\n")


def wrong(draw: random.Random, folder: Path) -> None:
    raise KeyError("not there")


def hanging(draw: random.Random, folder: Path) -> None:
    disturbances.start(lambda: time.sleep(60))
    time.sleep(60)


def dead(draw: random.Random, folder: Path) -> None:
    os._exit(7)


def noisy(draw: random.Random, folder: Path) -> None:
    """As a child does whose end nobody minds."""
    sys.stderr.write("Traceback (most recent call last)\n")


CASES = {"wrong": (wrong, 30.0), "hanging": (hanging, 0.3), "dead": (dead, 30.0), "noisy": (noisy, 30.0)}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("wrong", "KeyError: 'not there'"),
        ("hanging", "it hung"),
        ("dead", "it ended with 7"),
        ("noisy", "Traceback"),
    ],
)
def test_a_case_that_goes_wrong_is_told(kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbances, "CASES", CASES)
    assert said in disturbances.try_case(kind, 0)
