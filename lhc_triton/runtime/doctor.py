"""What this machine can run: versions, devices, compilers, and the backends that will be used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .backends import BACKENDS, unavailable

PACKAGES = ("lhc-triton", "torch", "triton", "numpy", "matplotlib", "safetensors", "torchvision", "timm")
COMPILERS = ("c++", "g++", "clang++", "nvcc")
VARIABLES = ("TRITON_INTERPRET", "LHC_TRITON_CACHE", "OMP_NUM_THREADS")
PREFERRED = {"cpu": "torch", "cuda": "triton"}


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def package_versions() -> dict[str, str | None]:
    """Return the version of every package that matters; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def devices() -> list[dict[str, Any]]:
    """Describe the CPU and every visible GPU."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"sm_{properties.major}{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def compilers() -> dict[str, str | None]:
    """Return the first line of each compiler's version; None where it is not on the PATH."""
    found: dict[str, str | None] = {}
    for name in COMPILERS:
        path = shutil.which(name)
        found[name] = _version_line(path) if path else None
    return found


def _version_line(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "no version printed")


def backend_status(kind: str) -> list[dict[str, str]]:
    """Say of every backend whether it can run float32 on a device kind, and what "auto" would take.

    Args:
        kind: "cpu" or "cuda".

    Returns:
        A row per backend: {"backend", "state"}.
    """
    preferred = PREFERRED[kind]
    rows = [{"backend": "dense", "state": "ready; auto takes it where sparsity would not gain"}]
    for name in (*BACKENDS, "native"):
        reason = unavailable(name, torch.float32, kind)
        chosen = "ready; auto takes it where a layer gains" if name == preferred else "ready; on request"
        rows.append({"backend": name, "state": chosen if reason is None else reason})
    return rows


def diagnose() -> dict[str, Any]:
    """Collect everything `lhc-triton doctor` shows.

    Returns:
        A JSON-ready dict: "python", "platform", "packages", "devices", "compilers", "environment" (the
        variables that change what runs), and "backends": per device kind the rows of `backend_status`.
    """
    environment = {name: os.environ.get(name) for name in VARIABLES}
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "devices": devices(),
        "compilers": compilers(),
        "environment": {name: value for name, value in environment.items() if value is not None},
        "backends": {kind: backend_status(kind) for kind in kinds},
    }
