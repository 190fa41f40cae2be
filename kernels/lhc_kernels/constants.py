"""What the kernels are specialised on: the same for a launch and for a compile ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from .configs import KernelConfig, store_run

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when this module was imported: kernels then run on the CPU."""

REDUCED_VALUES = 2048
"""Outputs of one program that adds the parts of split entries: 16 for each of 128 threads."""


@dataclass(frozen=True)
class Specialisation:
    """The compile-time facts of one grouped convolution.

    Attributes:
        dtype: of the activations and weights: "float16", "bfloat16", "float32" or "int8".
        in_channels: I.
        in_block: input channels of an entry.
        tile_width: filters that a tile has room for.
        out_channels: O.
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        dilation: (vertical, horizontal).
        border: whether any tap of any pixel can lie outside the image.
        bias, scale, residual: whether each is given.
        activation: "none", "relu" or "silu".
        index64: whether a tensor has about 2^31 elements or more.
    """

    dtype: str = "float16"
    in_channels: int = 256
    in_block: int = 32
    tile_width: int = 16
    out_channels: int = 256
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    border: bool = True
    bias: bool = True
    scale: bool = False
    residual: bool = False
    activation: str = "relu"
    index64: bool = False

    @property
    def out_dtype(self) -> str:
        """The dtype of the result and the residual: float32 for int8, else the activations'."""
        return "float32" if self.dtype == "int8" else self.dtype

    def _epilogue(self) -> dict[str, Any]:
        return {
            "TILE_WIDTH": self.tile_width,
            "HAS_BIAS": self.bias,
            "HAS_SCALE": self.scale,
            "HAS_RESIDUAL": self.residual,
            "ACTIVATION": self.activation,
            "INDEX64": self.index64,
            "RUN": store_run(self.out_channels, self.tile_width, self.out_dtype),
        }

    def _convolution(self) -> dict[str, Any]:
        return {
            "IN_CHANNELS": self.in_channels,
            "IN_BLOCK": self.in_block,
            "KERNEL_H": self.kernel[0],
            "KERNEL_W": self.kernel[1],
            "DILATION_H": self.dilation[0],
            "DILATION_W": self.dilation[1],
            "UPCAST": INTERPRETED and self.dtype == "bfloat16",
            **self._epilogue(),
        }

    def pointer_constants(self, config: KernelConfig) -> dict[str, Any]:
        """Return the constants of ``grouped_conv2d_fwd_kernel``."""
        return self._convolution() | {
            "STRIDE_H": self.stride[0],
            "STRIDE_W": self.stride[1],
            "BORDER": self.border,
            "PRECISION": config.precision,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "ENTRIES": config.entries,
            "PERSISTENT": config.variant == "persistent",
            "RESIDENT": config.variant == "resident",
            "SPLITS": config.splits,
            "K_MAJOR": self.dtype == "int8",
        }

    def reduce_constants(self, config: KernelConfig) -> dict[str, Any]:
        """Return the constants of ``reduce_splits_kernel``."""
        return self._epilogue() | {
            "BLOCK_M": REDUCED_VALUES // config.block_n,
            "BLOCK_N": config.block_n,
            "SPLITS": config.splits,
        }

    def box_constants(self, config: KernelConfig, box: tuple[int, int, int]) -> dict[str, Any]:
        """Return the constants of ``grouped_conv2d_box_fwd_kernel`` for a box (images, rows, columns)."""
        return self._convolution() | {
            "BOX_N": box[0],
            "BOX_H": box[1],
            "BOX_W": box[2],
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        }
