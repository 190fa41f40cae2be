"""Measured times that outlive a process: one JSON file, shared, written whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from lhc_triton.planning.plan import LayerPlan

STORE_VERSION = 1
MAX_BYTES = 64 * 2**20


def default_path() -> Path:
    """Return where measured times are kept: $LHC_TRITON_CACHE, else under the user's cache folder."""
    folder = os.environ.get("LHC_TRITON_CACHE")
    if folder:
        return Path(folder) / "timings.json"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "lhc_triton" / "timings.json"


def device_name(device: torch.device) -> str:
    """Name the hardware behind a device, threads included on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def layer_key(layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> str:
    """Identify a measurement: hardware, versions, dtype, and a digest of shapes and tiles."""
    tiles = [[tile.groups, tile.entries] for tile in layer.tiles]
    shape = repr(
        (layer.topology.geometry, layer.topology.in_block, layer.topology.out_block, layer.tile_width)
    )
    digest = hashlib.sha256((shape + json.dumps(tiles)).encode()).hexdigest()[:20]
    name = str(dtype).removeprefix("torch.")
    versions = f"torch {torch.__version__}, triton {_version('triton')}, lhc-triton {_version('lhc-triton')}"
    return f"{device_name(device)} | {versions} | {name} | {digest}"


def _version(package: str) -> str:
    # Not `package.__version__`: importing Triton for its version would take long.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


class TimingStore:
    """Measured microseconds per layer and backend, in a JSON file that several processes may share.

    Args:
        path: the file; default `default_path()`. It is made at the first `put`.

    A file that cannot be read is skipped with a warning and replaced at the next `put`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = default_path() if path is None else Path(path)

    def get(self, key: str) -> dict[str, float]:
        """Return the times stored under a key, by backend; empty if there are none."""
        return self._read().get(key, {})

    def put(self, key: str, times_us: Mapping[str, float]) -> None:
        """Add times to what is stored under a key.

        Raises:
            ValueError: if a time is not a positive finite number.
            OSError: if the file cannot be written.
        """
        for backend, value in times_us.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"the time of backend {backend!r} is {value}; it must be positive and finite"
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=30):
            records = self._read()
            records[key] = {**records.get(key, {}), **times_us}
            beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            try:
                beside.write_text(json.dumps({"version": STORE_VERSION, "times_us": records}, indent=1))
                beside.replace(self.path)
            finally:
                beside.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES} bytes")
            return _checked(json.loads(self.path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            warnings.warn(f"{self.path} is skipped: {error}; measured times start anew", stacklevel=3)
            return {}


def _checked(document: Any) -> dict[str, dict[str, float]]:
    if not isinstance(document, dict) or document.get("version") != STORE_VERSION:
        raise ValueError(f"not a timing store of version {STORE_VERSION}")
    records = document.get("times_us")
    if not isinstance(records, dict):
        raise ValueError("its records are missing")
    for times in records.values():
        numbers = isinstance(times, dict) and all(
            isinstance(t, int | float) and not isinstance(t, bool) and math.isfinite(t) and t > 0
            for t in times.values()
        )
        if not numbers:
            raise ValueError("a record holds something other than positive times")
    return records
