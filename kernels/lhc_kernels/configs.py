"""Launch configurations of the grouped convolution: what a config is, when it is valid, which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PRECISIONS = ("ieee", "tf32", "tf32x3")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

MAX_KERNEL_REACH = 31
"""Largest kh + kw: the validity of a pixel's rows and columns is kept in the bits of one int32."""


def next_power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least ``value``."""
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class LaunchShape:
    """What a config is chosen for: the sizes of one grouped convolution, all of them host integers.

    Attributes:
        pixels: output pixels over the batch, N * OH * OW.
        in_block: input channels of one entry.
        tile_width: filters that a tile has room for.
        tiles: number of filter tiles.
        kernel: (kh, kw).
        dtype: "float16", "bfloat16" or "float32".
        processors: streaming multiprocessors of the device (default: H100 SXM).
        shared_bytes: shared memory that one program may use (default: H100).
    """

    pixels: int
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
        block_k: input channels of one step; an entry wider than that takes several steps.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
        precision: of float32 products: "ieee" (FMA), "tf32" or "tf32x3" (tensor cores); half types ignore it.
    """

    block_m: int = 128
    block_n: int = 16
    block_k: int = 32
    num_warps: int = 4
    num_stages: int = 4
    precision: str = "ieee"

    def to_list(self) -> list[int]:
        """Return the config as the integers that the op's ``config`` argument carries."""
        code = PRECISIONS.index(self.precision)
        return [self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages, code]

    @classmethod
    def from_list(cls, values: Sequence[int]) -> KernelConfig:
        """Read what ``to_list`` wrote; ValueError for another length or precision code."""
        if len(values) != 6 or not 0 <= values[5] < len(PRECISIONS):
            raise ValueError(
                f"config is {list(values)}: expected no integers, or block_m, block_n, block_k, num_warps, "
                f"num_stages and a precision code in 0..{len(PRECISIONS) - 1}"
            )
        block_m, block_n, block_k, num_warps, num_stages, code = values
        return cls(block_m, block_n, block_k, num_warps, num_stages, PRECISIONS[code])


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
    if config.precision not in PRECISIONS:
        return f"precision is {config.precision!r}: supported are {', '.join(PRECISIONS)}"
    if shape.dtype not in ITEM_BYTES:
        return f"dtype is {shape.dtype}: supported are {', '.join(ITEM_BYTES)}"
    if sum(shape.kernel) > MAX_KERNEL_REACH:
        return f"kernel_size is {shape.kernel}: kh + kw may be at most {MAX_KERNEL_REACH}"
    if config.block_m * config.block_n // (32 * config.num_warps) > 128:
        return (
            f"a block of {config.block_m} x {config.block_n} outputs over {config.num_warps} warps spills: "
            "at most 128 accumulators a thread are supported"
        )
    needed = shared_bytes(config, shape.dtype)
    if needed > shape.shared_bytes:
        return f"the pipeline needs {needed} bytes of shared memory, the device has {shape.shared_bytes}"
    return None


def shared_bytes(config: KernelConfig, dtype: str) -> int:
    """Return the shared memory of the software pipeline in bytes: the stages of both operands."""
    stage = config.block_k * (config.block_m + config.block_n) * ITEM_BYTES[dtype]
    return stage * config.num_stages


def choose_config(shape: LaunchShape) -> tuple[KernelConfig, str]:
    """Return the config that plain rules pick for ``shape``, and the rule's name."""
    block_n = min(128, max(16, next_power_of_two(shape.tile_width)))
    block_k = min(32, max(16, next_power_of_two(shape.in_block)))
    if shape.dtype == "float32":
        return KernelConfig(64, min(64, block_n), block_k, 4, 3), "float32: FMA"
    return KernelConfig(128, block_n, block_k, 4, 4), "half: tensor cores"


def heuristic_config(shape: LaunchShape) -> KernelConfig:
    """Return the config of ``choose_config`` without its reason."""
    return choose_config(shape)[0]
