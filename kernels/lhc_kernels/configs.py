"""Launch configurations of the grouped convolution: what a config is, and when it is valid."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PRECISIONS = ("ieee", "tf32", "tf32x3")
VARIANTS = ("grid", "persistent", "split", "box", "resident")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}

MAX_KERNEL_REACH = 31
"""Largest kh + kw: the validity of a pixel's rows and columns is kept in the bits of one int32."""

MAX_ACCUMULATORS = 128
"""32-bit sums that a thread can hold. Compiled for sm_90, 128 take 182 to 252 registers with Triton 3.7.1,
while 3.6 and 3.9 spill some such kernels; 256 always spill."""

ROW_WASTE = 1.2
"""Compiled: of a box of several rows wgmma takes the activations from registers, with 115 instructions for 32
channels; one of a single row stays in shared memory, with 99 instructions for 32 channels and 101 for 64."""

MAX_SPLITS = 16
"""Most parts of a tile's entries; every part writes its float32 sums once and has them read once."""


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
        dtype: "float16", "bfloat16", "float32" or "int8".
        processors: streaming multiprocessors of the device (default: H100 SXM).
        shared_bytes: shared memory that one program may use (default: H100).
        entries: entries of all tiles together; None counts every block as live.
        stride: (vertical, horizontal).
        out_size: (OH, OW); (0, 0) where it is not known, which rules the variant "box" out.
        capability: CUDA compute capability times ten, 0 for other makes (default: H100).
        residual: whether the epilogue adds one, which takes registers.
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
    entries: int | None = None
    stride: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (0, 0)
    capability: int = 90
    residual: bool = False

    @property
    def total_entries(self) -> int:
        """Entries of all tiles, every block of theirs where ``entries`` is not known."""
        if self.entries is not None:
            return self.entries
        return self.tiles * self.kernel[0] * self.kernel[1] * -(-self.in_channels // self.in_block)


@dataclass(frozen=True)
class KernelConfig:
    """How one launch of the grouped convolution is cut up, and by which kernel.

    Attributes:
        block_m: output pixels of one program.
        block_n: filters of one program; a tile wider than that is split over several programs.
        block_k: input channels of an entry that one step takes; a wider entry takes several steps.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
        entries: entries that one step takes, 1 or 2; with 2, block_k is the whole in_block.
        precision: of float32 products: "ieee" (FMA), "tf32" or "tf32x3" (tensor cores); others ignore it.
        variant: "grid" (a program per block of pixels and filters), "persistent" (as many programs as run at
            once, each looping over such blocks), "split" (a tile's entries over several programs, summed in
            fixed order by a second kernel), "box" (activations come as boxes of a tensor descriptor) or
            "resident" (persistent, and a program takes all tiles of its pixels in turn, through L1).
        splits: parts of a tile's entries, more than 1 exactly with "split".
        max_registers: of a thread, a multiple of 8 to which the compiler is held; 0: what it finds best.
    """

    block_m: int = 128
    block_n: int = 16
    block_k: int = 32
    num_warps: int = 4
    num_stages: int = 4
    entries: int = 1
    precision: str = "ieee"
    variant: str = "grid"
    splits: int = 1
    max_registers: int = 0

    def to_list(self) -> list[int]:
        """Return the config as the integers that the op's ``config`` argument carries."""
        numbers = [self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages, self.entries]
        codes = [PRECISIONS.index(self.precision), VARIANTS.index(self.variant)]
        return [*numbers, *codes, self.splits, self.max_registers]

    @classmethod
    def from_list(cls, values: Sequence[int]) -> KernelConfig:
        """Read what ``to_list`` wrote; ValueError for another length or an unknown code."""
        codes = (len(PRECISIONS), len(VARIANTS))
        if len(values) != 10 or any(not 0 <= v < n for v, n in zip(values[6:8], codes, strict=True)):
            raise ValueError(
                f"config is {list(values)}: expected nothing, or block_m, block_n, block_k, num_warps, "
                f"num_stages, entries, a precision code below {codes[0]}, a variant code below {codes[1]}, "
                "splits and max_registers"
            )
        block_m, block_n, block_k, num_warps, num_stages, entries, precision, variant, *rest = values
        names = (PRECISIONS[precision], VARIANTS[variant])
        return cls(block_m, block_n, block_k, num_warps, num_stages, entries, *names, *rest)

    def options(self) -> dict[str, Any]:
        """Return what the compiler is told beside the kernel's constants."""
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # for float32; Triton 3.10 switches fused multiply-adds off by default
        }
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})

    @property
    def depth(self) -> int:
        """Input channels of one step, over all its entries."""
        return self.block_k * self.entries


def multiplies_by(config: KernelConfig, shape: LaunchShape) -> str:
    """Return what carries out the products: "fma", "fragments" or "memory".

    Fragments are what mma.sync and AMD's matrix units take, operands in registers; wgmma (Hopper) and tcgen05
    (Blackwell) take them from shared memory.
    """
    if shape.dtype == "float32" and config.precision == "ieee":
        return "fma"
    return "memory" if shape.capability >= 90 else "fragments"


def shared_bytes(config: KernelConfig, shape: LaunchShape) -> int:
    """Return the shared memory of one program in bytes: the pipeline's stages, then the outputs on their way.

    Compiled: operands that are read from shared memory keep all their stages there, others one less, because
    the stage at work is in registers.
    """
    from_memory = multiplies_by(config, shape) == "memory"
    stages = config.num_stages if from_memory else max(1, config.num_stages - 1)
    item = ITEM_BYTES[shape.dtype]
    pipeline = stages * config.depth * (config.block_m + config.block_n) * item
    return max(pipeline, config.block_m * config.block_n * (4 if shape.dtype == "int8" else item))


def config_problem(config: KernelConfig, shape: LaunchShape) -> str | None:
    """Return why ``config`` cannot serve ``shape``, or None where it can: the one validity predicate."""
    return (
        _block_problem(config, shape) or _variant_problem(config, shape) or _resource_problem(config, shape)
    )


def _block_problem(config: KernelConfig, shape: LaunchShape) -> str | None:
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
    return None


def _variant_problem(config: KernelConfig, shape: LaunchShape) -> str | None:
    if config.variant not in VARIANTS:
        return f"variant is {config.variant!r}: supported are {', '.join(VARIANTS)}"
    least = 2 if config.variant == "split" else 1
    most = MAX_SPLITS if config.variant == "split" else 1
    if not least <= config.splits <= most:
        return f"splits is {config.splits} with variant {config.variant}: supported are {least} to {most}"
    if config.max_registers:
        if shape.capability == 0:
            return f"max_registers is {config.max_registers}: this make of GPU supports 0 alone"
        if config.max_registers % 8 or not 64 <= config.max_registers <= 248:
            return f"max_registers is {config.max_registers}: supported are 0, 64, 72 and so on to 248"
    return _box_problem(config, shape) if config.variant == "box" else None


def _box_problem(config: KernelConfig, shape: LaunchShape) -> str | None:
    """Return what rules tensor descriptors out: the device, the geometry, or alignment to 16 bytes."""
    if shape.capability < 90:
        return f"compute capability is {shape.capability / 10}: variant box needs 9.0 or more"
    if shape.stride != (1, 1):
        return f"stride is {list(shape.stride)}: variant box supports [1, 1]"
    if shape.dtype not in ("float16", "bfloat16"):
        return f"dtype is {shape.dtype}: variant box supports float16 and bfloat16"
    if shape.in_channels % 8 or shape.tile_width % 8:
        return (
            f"in_channels is {shape.in_channels} and tile_width {shape.tile_width}: "
            "variant box supports multiples of 8"
        )
    if shape.in_block % config.block_k or config.entries != 1:
        return (
            f"block_k is {config.block_k} with {config.entries} entries a step: variant box supports one "
            f"and divisors of the in_block, here {shape.in_block}"
        )
    if 0 in shape.out_size or shape.total_entries == 0:
        return "variant box needs a known output size and at least one entry"
    return None


@functools.lru_cache(maxsize=1024)
def best_box(block_m: int, shape: LaunchShape) -> tuple[int, int, int]:
    """Return the box (images, rows, columns) of ``block_m`` outputs that covers the output best.

    That is one row, if it takes at most ROW_WASTE times as many boxes as need be. Otherwise in fewest boxes,
    and among equals the widest wins, because its rows are the longest copies. Sides are powers of two.
    """
    sides = [1 << i for i in range(block_m.bit_length())]
    boxes = [(block_m // (h * w), h, w) for w in sides for h in sides if h * w <= block_m]
    best = min(boxes, key=lambda box: (box_count(box, shape), -box[2], -box[1]))
    row = (1, 1, block_m)
    return row if box_count(row, shape) <= ROW_WASTE * box_count(best, shape) else best


def box_count(box: tuple[int, int, int], shape: LaunchShape) -> int:
    """Return how many boxes (images, rows, columns) cover the output of a known ``out_size``."""
    height, width = shape.out_size
    images = -(-shape.pixels // (height * width))
    sizes = zip((images, height, width), box, strict=True)
    return math.prod(-(-size // side) for size, side in sizes)


def _resource_problem(config: KernelConfig, shape: LaunchShape) -> str | None:
    accumulators = config.block_m * config.block_n // (32 * config.num_warps)
    if accumulators > MAX_ACCUMULATORS:
        return (
            f"{config.block_m} x {config.block_n} outputs over {config.num_warps} warps need {accumulators} "
            f"accumulators a thread: supported are up to {MAX_ACCUMULATORS}, more would spill"
        )
    needed = shared_bytes(config, shape)
    if needed > shape.shared_bytes:
        return f"a program needs {needed} bytes of shared memory: the device has {shape.shared_bytes}"
    return None


def store_run(out_channels: int, tile_width: int, dtype: str) -> int:
    """Return how many adjacent filters one 16-byte store takes, or 1 where rows are not aligned for that.

    Args:
        out_channels: O.
        tile_width: filters of a tile.
        dtype: of the output.
    """
    run = 16 // ITEM_BYTES[dtype]
    return run if out_channels % 16 == 0 and tile_width % run == 0 else 1
