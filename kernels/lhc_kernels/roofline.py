"""What a launch costs on paper: bytes, MACs and occupancy of one config, and a roofline of them.

The device numbers are an H100's data-sheet figures scaled by the number of multiprocessors, not measurements:
good for ranking the configs of one launch, not for promising its time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from .configs import ITEM_BYTES, KernelConfig, LaunchShape
from .resources import occupancy, register_estimate, work_items

MEMORY_BYTES_PER_US = 3.0e6
"""From memory, for the whole device."""

L2_BYTES_PER_US = 5.5e6 / 132
"""From L2, for each multiprocessor; on paper, as all of this."""

MACS_PER_US = {
    "half": 400e6 / 132,
    "int8": 800e6 / 132,
    "tf32": 200e6 / 132,
    "tf32x3": 67e6 / 132,
    "ieee": 33e6 / 132,
}
"""Multiply-accumulates of each multiprocessor at the full rate of its unit."""

LAUNCH_US = 3.0
"""A kernel's launch, its first loads and its last stores."""

STEP_LATENCY_US = 0.7
"""From asking for a step's operands to having them in shared memory; the pipeline hides it."""

STEP_US = 0.1
"""A step's barrier, waits and address arithmetic, which no depth of the pipeline hides."""


@dataclass(frozen=True)
class CostSheet:
    """The static costs of one config on one launch.

    Attributes:
        memory_bytes: moved between memory and L2, everything once.
        l2_bytes: moved between L2 and the multiprocessors.
        useful_macs: multiply-accumulates of the packed weights, padding of blocks left out.
        computed_macs: those that the programs carry out, with what their blocks waste.
        programs: work items (blocks of pixels and filters, times splits).
        steps: of one work item, on average over the tiles.
        registers: estimate per thread; more than MAX_REGISTERS would spill.
        occupancy: programs that run on one multiprocessor at once; 0 where not even one fits.
        waves: programs / (multiprocessors * occupancy).
        predicted_us: by the roofline of these numbers.
    """

    memory_bytes: int
    l2_bytes: int
    useful_macs: int
    computed_macs: int
    programs: int
    steps: int
    registers: int
    occupancy: int
    waves: float
    predicted_us: float


@functools.lru_cache(maxsize=1024)
def cost_sheet(config: KernelConfig, shape: LaunchShape) -> CostSheet:
    """Return the static costs of ``config`` on ``shape``, which ``config_problem`` finds valid.

    Args:
        config: how the launch is cut up.
        shape: its sizes.
    """
    item = ITEM_BYTES[shape.dtype]
    programs = work_items(config, shape)
    chunks = -(-shape.in_block // config.block_k)
    tile_steps = max(1, -(-shape.total_entries * chunks // (shape.tiles * config.entries)))
    steps = -(-tile_steps // config.splits)

    outputs = shape.pixels * shape.tiles * shape.tile_width
    out_bytes = outputs * (4 if shape.dtype == "int8" else item)
    taps = [min(k, s) for k, s in zip(shape.kernel, shape.stride, strict=True)]
    read = shape.pixels * taps[0] * taps[1] * shape.in_channels * item
    weights = shape.total_entries * shape.in_block * shape.tile_width
    partial = 2 * 4 * outputs * config.splits if config.splits > 1 else 0
    # What "resident" finds in L1 is not known, so it counts as L2's like the rest.
    operands = programs * steps * config.depth * (config.block_m + config.block_n) * item

    running = occupancy(config, shape)
    sheet = CostSheet(
        memory_bytes=read + weights * item + out_bytes,
        l2_bytes=operands + out_bytes + partial,
        useful_macs=shape.pixels * weights,
        computed_macs=programs * steps * config.block_m * config.block_n * config.depth,
        programs=programs,
        steps=steps,
        registers=register_estimate(config, shape),
        occupancy=running,
        waves=programs / (shape.processors * max(1, running)),
        predicted_us=0.0,
    )
    return replace(sheet, predicted_us=_roofline(config, shape, sheet))


def _roofline(config: KernelConfig, shape: LaunchShape, sheet: CostSheet) -> float:
    """Return the longest of memory, L2, arithmetic and latency in us, with launch and steps on top."""
    busy = sheet.programs / math.ceil(sheet.programs / shape.processors)
    unit = {"float32": config.precision, "int8": "int8"}.get(shape.dtype, "half")
    # A tensor core reads the pixels from shared memory once per 64 filters; fewer leave it waiting.
    rate = MACS_PER_US[unit] * (1.0 if unit == "ieee" else min(1.0, config.block_n / 64))
    serial_steps = math.ceil(sheet.waves) * sheet.steps
    longest = max(
        sheet.memory_bytes / MEMORY_BYTES_PER_US,
        sheet.l2_bytes / (L2_BYTES_PER_US * busy),
        sheet.computed_macs / (rate * busy),
        serial_steps * STEP_LATENCY_US / max(1, config.num_stages - 1),
    )
    launches = 2 if config.splits > 1 else 1
    return launches * LAUNCH_US + serial_steps * STEP_US + longest
