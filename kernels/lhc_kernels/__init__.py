"""Kernels for grouped, structured-sparse convolution: Triton's here, the CPU's in ``lhc_kernels.cpu``.

Needs torch, and triton for its kernels, which are imported when they are first asked for.
"""

from typing import Any

from .choice import candidate_configs, choose_config, heuristic_config
from .configs import KernelConfig, LaunchShape, config_problem, store_run
from .devices import device_limits
from .roofline import CostSheet, cost_sheet
from .sources import native_source_digest, source_digest

__all__ = [
    "INTERPRETED",
    "CostSheet",
    "KernelConfig",
    "LaunchShape",
    "candidate_configs",
    "choose_config",
    "config_problem",
    "cost_sheet",
    "device_limits",
    "grouped_conv2d",
    "heuristic_config",
    "native_source_digest",
    "source_digest",
    "store_run",
]

_OF_TRITON = ("INTERPRETED", "grouped_conv2d")


def __getattr__(name: str) -> Any:
    if name not in _OF_TRITON:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import launch

    return getattr(launch, name)
