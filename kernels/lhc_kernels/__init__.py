"""Triton kernels for grouped, structured-sparse convolution. Needs torch and triton only."""

from .choice import candidate_configs, choose_config, heuristic_config
from .configs import KernelConfig, LaunchShape, config_problem, store_run
from .costs import CostSheet, cost_sheet
from .grouped_conv import INTERPRETED, grouped_conv2d, grouped_conv2d_fwd_kernel
from .sources import source_digest

__all__ = [
    "INTERPRETED",
    "CostSheet",
    "KernelConfig",
    "LaunchShape",
    "candidate_configs",
    "choose_config",
    "config_problem",
    "cost_sheet",
    "grouped_conv2d",
    "grouped_conv2d_fwd_kernel",
    "heuristic_config",
    "source_digest",
    "store_run",
]
