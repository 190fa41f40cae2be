"""What a launch costs on paper: bytes, MACs and occupancy of one config, and a roofline of them.

The device numbers are an H100's data-sheet figures scaled by the number of multiprocessors, not measurements:
good for ranking the configs of one launch, not for promising its time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from .configs import (
    ITEM_BYTES,
    KernelConfig,
    LaunchShape,
    best_box,
    box_count,
    multiplies_by,
    shared_bytes,
)

MEMORY_BYTES_PER_US = 3.0e6
"""From memory, for the whole device."""

L2_BYTES_PER_US = 7.0e6 / 132
"""From L2, for each multiprocessor."""

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

MAX_REGISTERS = 255
"""Of a thread; a kernel that wants more spills."""

REGISTERS_PER_PROCESSOR = 65536
WARPS_PER_PROCESSOR = 64


@dataclass(frozen=True)
class CostSheet:
    """The static costs of one config on one launch.

    Attributes:
        memory_bytes: moved between memory and L2, everything once.
        l2_bytes: moved between L2 and the multiprocessors.
        useful_macs: multiply-accumulates of the packed weights, padding of blocks left out.
        computed_macs: those that the programs carry out, with what their blocks waste.
        programs: work items (blocks of pixels and filters, times splits).
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
    registers: int
    occupancy: int
    waves: float
    predicted_us: float


def register_estimate(config: KernelConfig, shape: LaunchShape) -> int:
    """Return about how many registers a thread wants, not capped; mostly within 20 % of sm_80 and sm_90."""
    threads = 32 * config.num_warps
    accumulators = config.block_m * config.block_n // threads
    registers = 22 + 1.3 * accumulators
    if config.variant != "box":  # which has no address for each pixel
        registers += 4 * (config.block_m * config.depth * ITEM_BYTES[shape.dtype] / (16 * threads))
    if config.variant == "persistent":
        registers += 20 + accumulators / 2
    if shape.residual and config.variant != "split":
        registers += 10 + accumulators / 2
    operands = {"fma": 35, "fragments": 16 + accumulators / 2, "memory": 0}
    return round(registers + operands[multiplies_by(config, shape)])


@functools.lru_cache(maxsize=1024)
def cost_sheet(config: KernelConfig, shape: LaunchShape) -> CostSheet:
    """Return the static costs of ``config`` on ``shape``, which ``config_problem`` finds valid.

    Args:
        config: how the launch is cut up.
        shape: its sizes.
    """
    item = ITEM_BYTES[shape.dtype]
    filters = shape.tiles * shape.tile_width
    blocks_m = max(1, -(-shape.pixels // config.block_m))
    if config.variant == "box":
        blocks_m = box_count(best_box(config.block_m, shape), shape)
    blocks_n = shape.tiles * -(-shape.tile_width // config.block_n)
    programs = blocks_m * blocks_n * config.splits

    chunks = -(-shape.in_block // config.block_k)
    tile_steps = max(1, -(-shape.total_entries * chunks // (shape.tiles * config.entries)))
    steps = -(-tile_steps // config.splits)
    useful = shape.pixels * shape.total_entries * shape.in_block * shape.tile_width
    computed = programs * steps * config.block_m * config.block_n * config.depth

    taps = [min(k, s) for k, s in zip(shape.kernel, shape.stride, strict=True)]
    out_bytes = shape.pixels * filters * (4 if shape.dtype == "int8" else item)
    read = shape.pixels * taps[0] * taps[1] * shape.in_channels * item
    weights = shape.total_entries * shape.in_block * shape.tile_width * item
    memory = read + weights + out_bytes
    partial = 2 * 4 * shape.pixels * filters * config.splits if config.splits > 1 else 0
    l2 = programs * steps * config.depth * (config.block_m + config.block_n) * item + out_bytes + partial

    registers = register_estimate(config, shape)
    occupancy = min(
        (shape.shared_bytes + 1024) // (shared_bytes(config, shape) + 1024),
        REGISTERS_PER_PROCESSOR // (-(-min(MAX_REGISTERS, registers) // 8) * 8 * 32 * config.num_warps),
        WARPS_PER_PROCESSOR // config.num_warps,
    )
    waves = programs / (shape.processors * max(1, occupancy))
    return CostSheet(
        memory_bytes=memory,
        l2_bytes=l2,
        useful_macs=useful,
        computed_macs=computed,
        programs=programs,
        registers=registers,
        occupancy=occupancy,
        waves=waves,
        predicted_us=_roofline(
            config, shape, read + weights + out_bytes, l2, computed, steps, programs, waves
        ),
    )


def _roofline(
    config: KernelConfig,
    shape: LaunchShape,
    memory_bytes: int,
    l2_bytes: int,
    macs: int,
    steps: int,
    programs: int,
    waves: float,
) -> float:
    """Return the longest of memory, L2, arithmetic and latency in us, with launch and steps on top."""
    busy = programs / max(1, math.ceil(programs / shape.processors))
    unit = {"float32": config.precision, "int8": "int8"}.get(shape.dtype, "half")
    # A tensor core reads the pixels from shared memory once per 64 filters; fewer leave it waiting.
    rate = MACS_PER_US[unit] * (1.0 if unit == "ieee" else min(1.0, config.block_n / 64))
    launches = LAUNCH_US * (2 if config.splits > 1 else 1)
    serial_steps = math.ceil(waves) * steps
    step_us = STEP_US / 2 if config.variant == "box" else STEP_US  # one thread asks for a whole box
    return (
        launches
        + serial_steps * step_us
        + max(
            memory_bytes / MEMORY_BYTES_PER_US,
            l2_bytes / (L2_BYTES_PER_US * busy),
            macs / (rate * busy),
            serial_steps * STEP_LATENCY_US / max(1, config.num_stages - 1),
        )
    )
