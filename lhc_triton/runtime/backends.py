"""The backends by name, and what each can serve."""

from __future__ import annotations

import importlib.util
import os

import torch

BACKENDS = ("reference", "torch", "triton")
"""The backends that this version has."""

DEVICES = ("cpu", "cuda")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def unavailable(backend: str, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Say in one line why a backend cannot run tensors of this type on this device; None if it can."""
    device = torch.device(device)
    if backend == "native":
        return f'backend "native" is not available in this version; use one of {_names()}'
    if backend not in BACKENDS:
        return f'backend "{backend}" is unknown; use one of {_names()}'
    if device.type not in DEVICES:
        return (
            f'backend "{backend}" does not serve device type "{device.type}"; use one of {", ".join(DEVICES)}'
        )
    allowed = FLOATS if backend == "triton" else (*FLOATS, torch.float64)
    if dtype not in allowed:
        names = ", ".join(_short(d) for d in allowed)
        return f'backend "{backend}" does not serve {_short(dtype)}; use one of {names}'
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


def _names() -> str:
    return ", ".join(f'"{b}"' for b in BACKENDS)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
