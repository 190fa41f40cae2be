"""Convolutions that learn their own topology, and kernels that only touch what is left.

Learn a network (`convert`, `TopologySchedule`, `freeze`, `summary`), plan it (`plan`), run it (`accelerate`),
keep it (`save`, `load`).
"""

from .interrupts import end_at_interrupts, is_command

if is_command():  # before anything that takes long to import
    end_at_interrupts()

from .artifact import load, save
from .consolidation import consolidate
from .conversion import convert, freeze, lhc_layers, summary
from .layers import LHCConv2d
from .planning import Plan, plan
from .pruning import PruningReport, prune, to_dense
from .runtime.network.accelerate import accelerate
from .schedule import TopologySchedule
from .shrinking import ShrinkReport, shrink
from .topology import LHCConfig

__version__ = "0.1.0"

__all__ = [
    "LHCConfig",
    "LHCConv2d",
    "Plan",
    "PruningReport",
    "ShrinkReport",
    "TopologySchedule",
    "accelerate",
    "consolidate",
    "convert",
    "freeze",
    "lhc_layers",
    "load",
    "plan",
    "prune",
    "save",
    "shrink",
    "summary",
    "to_dense",
]
