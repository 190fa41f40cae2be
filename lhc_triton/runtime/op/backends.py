"""The backends that ship, and whether one can run here."""

from __future__ import annotations

import torch

from lhc_triton.planning.backends import BACKENDS, register
from lhc_triton.runtime.op import native_backend, reference, torch_backend, triton_backend

for module in (reference, torch_backend, native_backend, triton_backend):
    register(module.BACKEND)


def unavailable(backend: str, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Say in one line why a backend cannot run tensors of this type on this device; None if it can.

    Asking for "native" builds and loads it (some seconds, once on each machine).
    """
    device, name = torch.device(device), str(dtype).removeprefix("torch.")
    record = BACKENDS.get(backend)
    if record is None:
        names = ", ".join(f'"{b}"' for b in BACKENDS)
        return f'backend "{backend}" is unknown; use one of {names}'
    if device.type not in record.devices:
        names = ", ".join(record.devices)
        return f'backend "{backend}" does not serve device type "{device.type}"; use one of {names}'
    if name not in record.dtypes:
        return f'backend "{backend}" does not serve {name}; use one of {", ".join(record.dtypes)}'
    return record.problem(device.type, name)
