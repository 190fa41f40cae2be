"""What this machine can run: versions, devices, compilers, and the backends that will be used."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from lhc_kernels.cpu.building import FLAGS, cache_folder, find_compiler, target_flags
from lhc_triton.runtime.choosing.dispatch import backend_status
from lhc_triton.runtime.choosing.timing_store import cpu_name, package_version

PACKAGES = ("lhc-triton", "torch", "triton", "numpy", "matplotlib", "safetensors", "torchvision", "timm")
COMPILERS = ("c++", "g++", "clang++", "nvcc")
VARIABLES = ("TRITON_INTERPRET", "LHC_TRITON_CACHE", "OMP_NUM_THREADS", "CXX", "LHC_TRITON_NATIVE_FLAGS")


def package_versions() -> dict[str, str | None]:
    """Return the version of every package that matters; None where it is not installed."""
    return {name: package_version(name) for name in PACKAGES}


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


def native_build() -> dict[str, str]:
    """Tell how the native kernel is built here: compiler, flags, folder; or the problem."""
    try:
        return {
            "compiler": " ".join(find_compiler()),
            "flags": " ".join((*FLAGS, *target_flags())),
            "folder": str(cache_folder()),
        }
    except RuntimeError as error:  # a BuildError, or there is no home
        return {"problem": str(error)}


def diagnose() -> dict[str, Any]:
    """Collect everything `lhc-triton doctor` shows.

    Returns:
        A JSON-ready dict: "python", "platform", "packages", "devices", "compilers", "environment" (the
        variables that change what runs), "native": see `native_build`, "backends": per device kind the rows
        of `backend_status`, and "notes": what is known of these versions, one line each.
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
        "native": native_build(),
        "backends": {kind: backend_status(kind) for kind in kinds},
        "notes": version_notes(package_version("triton")),
    }


def version_notes(triton: str | None) -> list[str]:
    """Return what is known of a version of Triton, one line each."""
    if triton is None or not triton.startswith("3.6."):
        return []
    return [
        f"Triton {triton} puts no proxy fence between asynchronous copies and wgmma (3.7 does): if results "
        "on Hopper change from run to run, `make test-gpu` has a test for it, and a newer Triton the fence"
    ]
