"""What a launch takes of its device: work items, registers, and programs on a multiprocessor at once."""

from __future__ import annotations

import math

from .configs import (
    ITEM_BYTES,
    KernelConfig,
    LaunchShape,
    best_box,
    box_count,
    multiplies_by,
    shared_bytes,
)

MAX_REGISTERS = 255
"""Of a thread; a kernel that wants more spills."""

REGISTERS_PER_PROCESSOR = 65536
WARPS_PER_PROCESSOR = 64


def work_items(config: KernelConfig, shape: LaunchShape) -> int:
    """Return how many blocks of pixels and filters, times splits, the launch consists of."""
    blocks_m = -(-shape.pixels // config.block_m)
    if config.variant == "box":
        blocks_m = box_count(best_box(config.block_m, shape), shape)
    return max(1, blocks_m) * shape.tiles * -(-shape.tile_width // config.block_n) * config.splits


def load_bytes(shape: LaunchShape) -> int:
    """Return how wide one load of activations is: 16 bytes, or less where the channels are not so aligned."""
    aligned = math.gcd(shape.in_channels, shape.in_block) * ITEM_BYTES[shape.dtype]
    return min(16, aligned & -aligned)


def register_estimate(config: KernelConfig, shape: LaunchShape) -> int:
    """Return about how many registers a thread wants, not capped; mostly within 30 % of sm_80 to sm_90."""
    threads = 32 * config.num_warps
    sums = config.block_m * config.block_n // threads
    registers = 22 + 1.3 * sums
    if config.variant != "box":  # which has no address for each load of each pixel
        width = load_bytes(shape)
        if config.variant == "resident":
            width = min(8, width)
        loads = config.block_m * config.depth * ITEM_BYTES[shape.dtype] / (width * threads)
        registers += 5 * loads
    if shape.residual and config.variant != "split":
        registers += 10 + sums / 2
    # Blackwell's sums lie in tensor memory; what comes on top is for taking them from there.
    fetched = sums / 2 + 10 if shape.capability >= 100 else 0.0
    operands = {"fma": 35.0, "fragments": 16 + sums / 2, "memory": fetched}[multiplies_by(config, shape)]
    # Kept from one work item to the next.
    kept = 20 + sums / 2 if config.variant in ("persistent", "resident") else 0.0
    return round(registers + max(operands, kept))


def occupancy(config: KernelConfig, shape: LaunchShape) -> int:
    """Return about how many programs run on one multiprocessor at once; 0 where not even one fits."""
    registers = min(config.max_registers or MAX_REGISTERS, register_estimate(config, shape))
    return min(
        (shape.shared_bytes + 1024) // (shared_bytes(config, shape) + 1024),
        REGISTERS_PER_PROCESSOR // (-(-registers // 8) * 8 * 32 * config.num_warps),
        WARPS_PER_PROCESSOR // config.num_warps,
    )
