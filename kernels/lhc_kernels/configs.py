"""Launch configurations of the grouped convolution: what a config is, when it is valid, which one to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

PRECISIONS = ("ieee", "tf32", "tf32x3")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

MAX_KERNEL_REACH = 31
"""Largest kh + kw: the validity of a pixel's rows and columns is kept in the bits of one int32."""


MAX_ACCUMULATORS = 128
"""Float32 sums that a thread can hold; compiled for sm_90, 128 take 190 to 255 registers and 256 spill."""


def next_power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least ``value``."""
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class LaunchShape:
    """What a config is chosen for: the sizes of one grouped convolution, all of them host integers.

    Attributes:
        pixels: output pixels over the batch, N * OH * OW.
        in_channels: I.
        in_block: input channels of one entry.
        tile_width: filters that a tile has room for.
        tiles: number of filter tiles.
        kernel: (kh, kw).
        dtype: "float16", "bfloat16" or "float32".
        processors: streaming multiprocessors of the device (default: H100 SXM).
        shared_bytes: shared memory that one program may use (default: H100).
    """

    pixels: int
    in_channels: int
    in_block: int
    tile_width: int
    tiles: int
    kernel: tuple[int, int]
    dtype: str
    processors: int = 132
    shared_bytes: int = 232448


@dataclass(frozen=True)
class KernelConfig:
    """How one launch of ``grouped_conv2d_fwd_kernel`` is cut up.

    Attributes:
        block_m: output pixels of one program.
        block_n: filters of one program; a tile wider than that is split over several programs.
        block_k: input channels of an entry that one step takes; a wider entry takes several steps.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
        entries: entries that one step takes, 1 or 2; with 2, block_k is the whole in_block.
        precision: of float32 products: "ieee" (FMA), "tf32" or "tf32x3" (tensor cores); half types ignore it.
    """

    block_m: int = 128
    block_n: int = 16
    block_k: int = 32
    num_warps: int = 4
    num_stages: int = 4
    entries: int = 1
    precision: str = "ieee"

    def to_list(self) -> list[int]:
        """Return the config as the integers that the op's ``config`` argument carries."""
        numbers = [self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages, self.entries]
        return [*numbers, PRECISIONS.index(self.precision)]

    @classmethod
    def from_list(cls, values: Sequence[int]) -> KernelConfig:
        """Read what ``to_list`` wrote; ValueError for another length or precision code."""
        if len(values) != 7 or not 0 <= values[6] < len(PRECISIONS):
            raise ValueError(
                f"config is {list(values)}: expected nothing, or block_m, block_n, block_k, num_warps, "
                f"num_stages, entries and a precision code from 0 to {len(PRECISIONS) - 1}"
            )
        block_m, block_n, block_k, num_warps, num_stages, entries, code = values
        return cls(block_m, block_n, block_k, num_warps, num_stages, entries, PRECISIONS[code])

    @property
    def depth(self) -> int:
        """Input channels of one step, over all its entries."""
        return self.block_k * self.entries


def shared_bytes(config: KernelConfig, dtype: str) -> int:
    """Return the shared memory of the software pipeline in bytes: every stage of both operands."""
    stage = config.depth * (config.block_m + config.block_n) * ITEM_BYTES[dtype]
    return stage * config.num_stages


def config_problem(config: KernelConfig, shape: LaunchShape) -> str | None:
    """Return why ``config`` cannot serve ``shape``, or None where it can: the one validity predicate."""
    for name in ("block_m", "block_n", "block_k"):
        value = getattr(config, name)
        if not 16 <= value <= 256 or value != next_power_of_two(value):
            return f"{name} is {value}: supported are the powers of two from 16 to 256"
    if config.num_warps not in (1, 2, 4, 8):
        return f"num_warps is {config.num_warps}: supported are 1, 2, 4 and 8"
    if not 1 <= config.num_stages <= 8:
        return f"num_stages is {config.num_stages}: supported are 1 to 8"
    if config.entries not in (1, 2) or (config.entries == 2 and config.block_k != shape.in_block):
        return (
            f"entries is {config.entries} with block_k {config.block_k}: supported are 1, "
            f"and 2 where block_k is the in_block, here {shape.in_block}"
        )
    if config.precision not in PRECISIONS:
        return f"precision is {config.precision!r}: supported are {', '.join(PRECISIONS)}"
    if shape.dtype not in ITEM_BYTES:
        return f"dtype is {shape.dtype}: supported are {', '.join(ITEM_BYTES)}"
    if sum(shape.kernel) > MAX_KERNEL_REACH:
        return f"kernel_size is {list(shape.kernel)}: supported are kh + kw up to {MAX_KERNEL_REACH}"
    accumulators = config.block_m * config.block_n // (32 * config.num_warps)
    if accumulators > MAX_ACCUMULATORS:
        return (
            f"{config.block_m} x {config.block_n} outputs over {config.num_warps} warps need {accumulators} "
            f"accumulators a thread: supported are up to {MAX_ACCUMULATORS}, more would spill"
        )
    needed = shared_bytes(config, shape.dtype)
    if needed > shape.shared_bytes:
        return f"the pipeline needs {needed} bytes of shared memory: the device has {shape.shared_bytes}"
    return None


def store_run(out_channels: int, tile_width: int, dtype: str) -> int:
    """Return how many adjacent filters one 16-byte store takes, or 1 where rows are not aligned for that."""
    run = 16 // ITEM_BYTES[dtype]
    return run if out_channels % 16 == 0 and tile_width % run == 0 else 1


def choose_config(shape: LaunchShape, precision: str = "ieee") -> tuple[KernelConfig, str]:
    """Return the config that plain rules pick for ``shape``, and the rules' names.

    The rules follow from code compiled for sm_90 with Triton 3.7.1, not from times.

    Args:
        shape: the sizes of the launch.
        precision: of float32 products; taken over into the config.
    """
    half = shape.dtype != "float32"
    reasons = ["half: tensor cores" if half else "float32: FMA, small blocks"]

    widest = 128 if half else 64
    block_n = min(widest, max(16, next_power_of_two(shape.tile_width)))
    if shape.tile_width > widest:
        reasons.append(f"tile split into {widest} filters")

    # A step of 64 channels halves the barriers and waits of two steps of 32. Compiled: two entries of 32
    # picked by k go through shared memory like one of 64 (70 registers at 128 x 16, against 90 for a gather
    # [M, 2, 32] that is reshaped, which also reads the activations back into registers for wgmma).
    most = 64 if half else 32
    block_k = min((64, 32, 16) if half else (32, 16), key=lambda k: (-(-shape.in_block // k) * k, -k))
    entries = 2 if block_k == shape.in_block and 2 * block_k <= most else 1
    if entries == 2:
        reasons.append("two entries a step")

    block_m = 128 if half else 64
    num_stages = 4
    if math.gcd(shape.in_channels, shape.in_block) * ITEM_BYTES[shape.dtype] % 4:
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
    while config.num_stages > 2 and 2 * (shared_bytes(config, shape.dtype) + 1024) > shape.shared_bytes:
        config = replace(config, num_stages=config.num_stages - 1)
    if config.num_stages < num_stages:
        reasons.append("fewer stages: two programs share the memory")
    return config, "; ".join(reasons)


def heuristic_config(shape: LaunchShape, precision: str = "ieee") -> KernelConfig:
    """Return the config of ``choose_config`` without its reasons."""
    return choose_config(shape, precision)[0]
