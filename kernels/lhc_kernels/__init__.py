"""Triton kernels for grouped, structured-sparse convolution. Needs torch and triton only."""

from .configs import KernelConfig, LaunchShape, choose_config, config_problem, heuristic_config, store_run
from .grouped_conv import INTERPRETED, grouped_conv2d, grouped_conv2d_fwd_kernel

__all__ = [
    "INTERPRETED",
    "KernelConfig",
    "LaunchShape",
    "choose_config",
    "config_problem",
    "grouped_conv2d",
    "grouped_conv2d_fwd_kernel",
    "heuristic_config",
    "store_run",
]
