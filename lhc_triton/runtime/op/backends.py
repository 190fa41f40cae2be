"""The backends by name, and what each can serve."""

from __future__ import annotations

import importlib.util
import os

import torch

BACKENDS = ("reference", "torch", "native", "triton")
"""The backends that this version has."""

DEVICES = {
    "reference": ("cpu", "cuda"),
    "torch": ("cpu", "cuda"),
    "native": ("cpu",),
    "triton": ("cpu", "cuda"),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    "reference": (*FLOATS, torch.float64, torch.int8),
    "torch": (*FLOATS, torch.float64),
    "native": FLOATS,
    "triton": (*FLOATS, torch.int8),
}


def unavailable(backend: str, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Say in one line why a backend cannot run tensors of this type on this device; None if it can.

    Asking for "native" builds and loads it (some seconds, once on each machine).
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        return f'backend "{backend}" is unknown; use one of {_names()}'
    if device.type not in DEVICES[backend]:
        names = ", ".join(DEVICES[backend])
        return f'backend "{backend}" does not serve device type "{device.type}"; use one of {names}'
    if dtype not in DTYPES[backend]:
        names = ", ".join(_short(d) for d in DTYPES[backend])
        return f'backend "{backend}" does not serve {_short(dtype)}; use one of {names}'
    if backend == "native":
        return _native_problem()
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return 'backend "triton" needs the package triton, which is not installed; use "torch"'
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            'backend "triton" needs a CUDA device; on the CPU use "torch", or set TRITON_INTERPRET=1 '
            "before the process starts to run it in Triton's slow interpreter"
        )
    return None


def _native_problem() -> str | None:
    # Only a build tells whether a compiler works; it is kept, so that later processes merely load it.
    from lhc_kernels.cpu import problem

    reason = problem()
    return None if reason is None else f'backend "native" is not available: {reason}; or use "torch"'


def _names() -> str:
    return ", ".join(f'"{b}"' for b in BACKENDS)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
