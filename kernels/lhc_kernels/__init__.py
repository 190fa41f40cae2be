"""Triton kernels for grouped, structured-sparse convolution. Needs torch and triton only."""

from .choice import candidate_configs, choose_config, heuristic_config
from .configs import KernelConfig, LaunchShape, config_problem, store_run
from .constants import INTERPRETED
from .costs import CostSheet, cost_sheet
from .launch import grouped_conv2d, launch_shape
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
    "heuristic_config",
    "launch_shape",
    "source_digest",
    "store_run",
]
