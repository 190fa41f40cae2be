"""Which launch config to take: by plain rules, or as the few candidates that are worth timing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

from .configs import (
    MAX_SPLITS,
    KernelConfig,
    LaunchShape,
    config_problem,
    multiplies_by,
    next_power_of_two,
    shared_bytes,
)
from .resources import MAX_REGISTERS, load_bytes
from .roofline import CostSheet, cost_sheet

HOPELESS = 2.0
"""Configs predicted to take this many times as long as the fastest are not worth timing."""

CROWDING = 0.5
"""What a candidate's predicted time is raised by for each trait that an earlier candidate has too."""


@functools.lru_cache(maxsize=1024)
def choose_config(shape: LaunchShape, precision: str = "ieee") -> tuple[KernelConfig, str]:
    """Return the config that plain rules pick for ``shape``, and the rules' names.

    The rules follow from code compiled for sm_90 with Triton 3.7.1, not from times. They take the variant
    "grid", or "split" where too few programs have much to do; "persistent" and "box" are left to tuning. A
    persistent program needs more registers (compiled: 113 against 78 at 128 x 64, 179 against 125 at
    128 x 128, where that halves what runs at once), and the grid already deals tiles out to whatever
    multiprocessor is free, the longest first.

    Args:
        shape: the sizes of the launch.
        precision: of float32 products; taken over into the config.
    """
    fma = multiplies_by(KernelConfig(precision=precision), shape) == "fma"
    reasons = ["float32: FMA, small blocks" if fma else "tensor cores"]

    # Compiled: int8 of 128 x 128 over 8 warps takes 160 registers, which leaves room for one program only.
    widest = 64 if shape.dtype in ("float32", "int8") else 128
    block_n = min(widest, max(16, next_power_of_two(shape.tile_width)))
    if shape.tile_width > widest:
        reasons.append(f"tile split into {widest} filters")

    # A step of 64 channels halves the barriers and waits of two steps of 32. Compiled: two entries of 32
    # picked by k go through shared memory like one of 64 (72 registers at 128 x 16, against 90 for a gather
    # [M, 2, 32] that is reshaped, which also reads the activations back into registers for wgmma).
    depths = (32, 16) if shape.dtype == "float32" else (64, 32, 16)
    block_k = min(depths, key=lambda k: (-(-shape.in_block // k) * k, -k))
    entries = 2 if block_k == shape.in_block and 2 * block_k <= depths[0] else 1
    if entries == 2:
        reasons.append("two entries a step")

    block_m = 64 if fma else 128
    num_stages = 4
    if load_bytes(shape) < 4:
        # An asynchronous copy moves at least 4 bytes. Compiled: with 37 channels of 2 bytes every element
        # is a load of its own, and 128 x 64 of them a step spill 1296 bytes; 64 x 16 do not spill.
        block_m, block_k, entries, num_stages = 64, 16, 1, 2
        reasons.append("odd channels: scalar loads, small steps")

    # wgmma needs 64 rows; shorter blocks of pixels only serve to give every multiprocessor two programs.
    programs = shape.tiles * -(-shape.tile_width // block_n)
    if block_m > 64 and -(-shape.pixels // block_m) * programs < 2 * shape.processors:
        block_m = 64
        reasons.append("few pixels: shorter blocks")
    # Compiled: 128 x 64 takes 78 registers over 8 warps (90 with a residual) and 121 (164) over 4, and shared
    # memory admits two programs either way; 128 x 128 over 8 warps takes 125 (148).
    num_warps = 8 if block_m * block_n >= 128 * 64 else 4

    # Two programs share a multiprocessor, so that one computes while the other waits.
    config = KernelConfig(block_m, block_n, block_k, num_warps, num_stages, entries, precision)
    config = replace(config, max_registers=_bound(config, shape))
    if config.max_registers:
        reasons.append("registers held to two programs")
    while config.num_stages > 2 and 2 * (shared_bytes(config, shape) + 1024) > shape.shared_bytes:
        config = replace(config, num_stages=config.num_stages - 1)
    if config.num_stages < num_stages:
        reasons.append("fewer stages: two programs share the memory")

    best = min((config, *_split(config, shape)), key=lambda c: cost_sheet(c, shape).predicted_us)
    if best.splits > 1:
        reasons.append("few programs, many entries: split")
    return best, "; ".join(reasons)


def _bound(config: KernelConfig, shape: LaunchShape) -> int:
    """Return the registers that let two programs of eight warps share a multiprocessor, where that is near.

    Compiled, 128 x 128 over 8 warps: Triton 3.6.0 takes 166 registers by itself, and held to 128 it keeps 88
    bytes of a thread on the stack, outside of the loop. 3.7.1 and 3.9.0 take no more than 128 by themselves;
    held to it, even a persistent program does (179 and 136 by itself) with 24 bytes on the stack at the most.
    With a residual up to 472 bytes would go there, and for sm_100 up to 280.
    """
    sums = config.block_m * config.block_n // (32 * config.num_warps)
    near = config.num_warps == 8 and sums == 64 and not shape.residual and shape.capability // 10 == 9
    return 128 if near and multiplies_by(config, shape) == "memory" and shape.dtype != "int8" else 0


def _split(config: KernelConfig, shape: LaunchShape) -> Iterator[KernelConfig]:
    """Yield ``config`` split into as many parts as leave no multiprocessor more than two programs."""
    splits = 2
    while splits <= MAX_SPLITS and splits * cost_sheet(config, shape).programs <= 2 * shape.processors:
        yield replace(config, variant="split", splits=splits)
        splits *= 2


def heuristic_config(shape: LaunchShape, precision: str = "ieee") -> KernelConfig:
    """Return the config of ``choose_config`` without its reasons."""
    return choose_config(shape, precision)[0]


def candidate_configs(
    shape: LaunchShape, limit: int = 12, precision: str = "ieee"
) -> tuple[KernelConfig, ...]:
    """Return the configs worth timing for ``shape``: the heuristic's first, then by their cost sheets.

    The sheets only rank, so each next candidate is the one of least predicted time after that time is raised
    for every block size, pipeline depth and variant that earlier candidates have already: a short list still
    spans the landscape. The answer depends on the arguments alone.

    Args:
        shape: the sizes of the launch.
        limit: most configs returned, at least 1.
        precision: of float32 products; taken over into every config.

    Raises:
        ValueError: a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}: expected at least 1")
    chosen = [heuristic_config(shape, precision)]
    # Compiled: ptxas spills some float32 multiply-adds from 128 registers on.
    most = 128 if multiplies_by(chosen[0], shape) == "fma" else MAX_REGISTERS
    sheets: dict[KernelConfig, CostSheet] = {}
    for config in _landscape(shape, precision):
        if config != chosen[0] and config_problem(config, shape) is None:
            sheet = cost_sheet(config, shape)
            if sheet.occupancy > 0 and sheet.registers <= most:
                sheets[config] = sheet
    fastest = min((sheet.predicted_us for sheet in sheets.values()), default=0.0)
    left = [config for config in sheets if sheets[config].predicted_us <= HOPELESS * fastest]

    def crowded_us(config: KernelConfig) -> float:
        shared = sum(len(_traits(config) & _traits(other)) for other in chosen)
        return sheets[config].predicted_us * (1 + CROWDING * shared)

    while left and len(chosen) < limit:
        chosen.append(min(left, key=crowded_us))
        left.remove(chosen[-1])
    return tuple(chosen)


def _traits(config: KernelConfig) -> set[tuple[str, object]]:
    names = ("block_m", "block_n", "num_stages", "variant")
    return {(name, getattr(config, name)) for name in names}


def _landscape(shape: LaunchShape, precision: str) -> Iterator[KernelConfig]:
    """Yield every config that could make sense for ``shape``, valid or not, deep pipelines first."""
    widest = min(256, max(16, next_power_of_two(shape.tile_width)))
    widths = [n for n in (16, 32, 64, 128, 256) if widest // 4 <= n <= widest]
    depths = [(k, 1) for k in (16, 32, 64, 128) if k <= max(16, next_power_of_two(shape.in_block))]
    if shape.in_block == next_power_of_two(shape.in_block):
        depths.append((shape.in_block, 2))
    for block_m, block_n, (block_k, entries), warps, stages in itertools.product(
        (64, 128, 256), widths, depths, (4, 8), (5, 4, 3, 2)
    ):
        config = KernelConfig(block_m, block_n, block_k, warps, stages, entries, precision)
        config = replace(config, max_registers=_bound(config, shape))
        if config_problem(config, shape) is not None:
            continue
        yield config
        if config.max_registers:
            yield replace(config, max_registers=0)
        yield replace(config, variant="box")
        yield from _split(config, shape)
        # Multiply-adds keep every multiprocessor busy as it is, and have no registers to spare.
        if cost_sheet(config, shape).waves >= 2 and multiplies_by(config, shape) != "fma":
            yield replace(config, variant="persistent")
            if block_n <= 32 and shape.tiles * shape.tile_width > block_n:
                yield replace(config, variant="resident")
