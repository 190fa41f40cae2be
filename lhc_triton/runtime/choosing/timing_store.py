"""Measurements that outlive a process: one JSON file, shared, written whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock, Timeout

from lhc_triton.files import parse_json, read_regular, write_beside
from lhc_triton.planning.schema import LayerPlan

STORE_VERSION = 2
MAX_BYTES = 64 * 2**20
SHORTEST_US, LONGEST_US = 1e-3, 1e12
"""What a measured time can be: no call takes less than a nanosecond, or more than eleven days."""

_NAME = "timings.json"
_KEPT = "measured times"

LOCK_S = 10.0
PAUSE_S = 600.0
# Until when a store is not waited for, by path: a process that hangs with the lock (stopped, or on a dead
# network drive) must not cost every write of every layer its waiting time.
_stuck: dict[Path, float] = {}


def default_path() -> Path:
    """Return where measured times are kept: $LHC_TRITON_CACHE, else under the user's cache folder.

    A user without a home has a folder of his own among the temporary files; where that cannot be written,
    this process has one.
    """
    # Here, so that importing lhc_triton loads no kernels.
    from lhc_kernels.cpu.folders import cache_folder, temporary_of

    own = temporary_of(_KEPT)
    if own is not None:
        return own / _NAME
    try:
        return cache_folder() / _NAME
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"lhc_triton-{os.getuid()}" / _NAME


def device_name(device: torch.device) -> str:
    """Name the hardware behind a device, threads included on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def layer_key(layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> str:
    """Identify a measurement: hardware, versions, dtype, and a digest of shapes and tiles."""
    tiles = [[tile.groups, tile.entries] for tile in layer.tiles]
    shape = repr(
        (layer.topology.geometry, layer.topology.in_block, layer.topology.out_block, layer.tile_width)
    )
    digest = hashlib.sha256((shape + json.dumps(tiles)).encode()).hexdigest()[:20]
    name = str(dtype).removeprefix("torch.")
    return f"{device_name(device)} | {code_version(device)} | {name} | {digest}"


def code_version(device: torch.device) -> str:
    """Name the code that a time belongs to: versions, and a digest of the kernels' sources for a device."""
    from lhc_kernels import native_source_digest, source_digest

    ours, triton = package_version("lhc-triton"), package_version("triton")
    kernels = native_source_digest() if device.type == "cpu" else source_digest()
    return f"torch {torch.__version__}, triton {triton}, lhc-triton {ours}, kernels {kernels}"


def package_version(package: str) -> str | None:
    """Return an installed package's version; None without one."""
    # Not `package.__version__`: importing Triton for its version would take long.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


Measured = float | str
"""What a measurement gave: microseconds, or the reason why it failed."""


class TimingStore:
    """What was measured, by key and name, in a JSON file that several processes may share.

    A key says what was measured and where (`layer_key`, `launch_configs.config_key`); a name tells the
    alternatives apart (a backend, a kernel config). Each has one `Measured`.

    Args:
        path: the file; default `default_path()`. It is made at the first `put`.

    Where the default path cannot be written, a temporary copy takes its place, and a RuntimeWarning says so.
    A file that cannot be read is skipped with a warning and replaced at the next `put`; so is a single time
    that no call can take.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = default_path() if path is None else Path(path)
        self._is_default = path is None

    def get(self, key: str) -> dict[str, Measured]:
        """Return the records stored under a key, by name; empty if there are none."""
        return self.read().get(key, {})

    def put(self, key: str, records: Mapping[str, Measured]) -> None:
        """Add records to what is stored under a key.

        Raises:
            ValueError: if a record is neither a reason nor a time that a call can take.
            OSError: if the file cannot be written (one at the default path has another in its place), or
                another process does not give its lock back; then the store is not waited for again for ten
                minutes.
        """
        for name, record in records.items():
            if not (_is_record(record) and _is_sane(record)):
                raise ValueError(
                    f"the time of {name!r} is {record}; it must be from {SHORTEST_US} to {LONGEST_US} us"
                )
        try:
            self._put(key, records)
        except TimeoutError:
            raise
        except OSError as error:
            if not self._is_default:
                raise
            self._put(key, records, self._elsewhere(error))

    def _elsewhere(self, error: OSError) -> dict[str, dict[str, Measured]]:
        """Go on in a temporary file; return what has been read from the one that cannot be written."""
        from lhc_kernels.cpu.folders import temporary_folder

        known = self.read()
        reason = f"{self.path} cannot be written ({error.strerror or error})"
        what = f"{reason}; set LHC_TRITON_CACHE to a folder that can be"
        self.path = temporary_folder(_KEPT, what) / _NAME
        return known

    def _put(
        self,
        key: str,
        records: Mapping[str, Measured],
        known: Mapping[str, dict[str, Measured]] = MappingProxyType({}),
    ) -> None:
        if time.monotonic() < _stuck.get(self.path, 0.0):
            raise TimeoutError(f"{self.path}: another process does not give its lock back")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{self.path}.lock", timeout=LOCK_S):
                found = {**known, **self.read()}
                found[key] = {**found.get(key, {}), **records}
                write_beside(
                    self.path, json.dumps({"version": STORE_VERSION, "records": found}, indent=1).encode()
                )
        except Timeout:
            _stuck[self.path] = time.monotonic() + PAUSE_S
            raise TimeoutError(
                f"{self.path}: another process has held its lock for {LOCK_S:.0f} s; measured times are not "
                "kept in the next ten minutes"
            ) from None

    def read(self) -> dict[str, dict[str, Measured]]:
        """Return everything stored, by key and name; empty, with a warning, if the file is damaged."""
        try:
            found = self.read_checked()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"{self.path} is skipped: {error}; measured times start anew", stacklevel=3)
            return {}
        sane = {k: {n: r for n, r in records.items() if _is_sane(r)} for k, records in found.items()}
        odd = sum(map(len, found.values())) - sum(map(len, sane.values()))
        if odd:
            warnings.warn(
                f"{self.path}: {odd} times are skipped, which are not from {SHORTEST_US} to {LONGEST_US} us",
                stacklevel=3,
            )
        return sane

    def read_checked(self) -> dict[str, dict[str, Measured]]:
        """Return everything stored, by key and name.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, too large, or no store of this version.
        """
        return _checked(parse_json(read_regular(self.path, MAX_BYTES).decode()))


def _checked(document: Any) -> dict[str, dict[str, Measured]]:
    if not isinstance(document, dict) or document.get("version") != STORE_VERSION:
        raise ValueError(f"not a timing store of version {STORE_VERSION}")
    found = document.get("records")
    if not isinstance(found, dict):
        raise ValueError("its records are missing")
    for records in found.values():
        if not isinstance(records, dict) or not all(map(_is_record, records.values())):
            raise ValueError("a record holds something other than a positive time or a reason")
    return found


def _is_sane(record: Measured) -> bool:
    return isinstance(record, str) or SHORTEST_US <= record <= LONGEST_US


def _is_record(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
