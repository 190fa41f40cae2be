"""Checks of a launch's arguments on sizes and types alone: nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .configs import ITEM_BYTES


def pair(name: str, values: Sequence[int], least: int) -> tuple[int, int]:
    """Return ``values`` as a pair; ValueError unless they are two integers >= ``least``."""
    if len(values) != 2 or any(v < least for v in values):
        raise ValueError(f"{name} is {list(values)}: expected two integers >= {least}")
    return int(values[0]), int(values[1])


def dtype_name(x: Tensor) -> str:
    """Return for example "float16"."""
    return str(x.dtype).removeprefix("torch.")


def check_tensors(x: Tensor, weight: Tensor, tables: Sequence[Tensor], out_channels: int) -> None:
    """Check activations, packed weight and tables against each other; ValueError or TypeError."""
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected [N, C, H, W] with at least one channel")
    if dtype_name(x) not in ITEM_BYTES:
        raise TypeError(f"x is {dtype_name(x)}: supported are {', '.join(ITEM_BYTES)}; cast it")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {dtype_name(weight)}, x is {dtype_name(x)}: cast one of them")
    if weight.dim() != 3 or 0 in weight.shape[1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [entries, in_block, tile_width]")
    if len(tables) != 3 or any(t.dtype != torch.int32 for t in tables):
        kinds = ", ".join(dtype_name(t) for t in tables)
        raise ValueError(f"tables are {kinds or 'missing'}: expected int32 tile_ptr, entries and filters")
    tiles = tables[0].numel() - 1
    expected = ((tiles + 1,), (weight.shape[0] + 1,), (tiles, weight.shape[2]))
    given = tuple(tuple(t.shape) for t in tables)
    if tiles < 1 or given != expected:
        raise ValueError(
            f"tables have shapes {given}: expected tile_ptr [T + 1], entries [E + 1] and filters "
            f"[T, tile_width] for a weight of shape {tuple(weight.shape)}"
        )
    if not 1 <= out_channels <= tiles * weight.shape[2]:
        raise ValueError(
            f"out_channels is {out_channels}: {tiles} tiles hold 1 to {tiles * weight.shape[2]} filters"
        )


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the type of the result and of a residual: float32 for int8, else x's own."""
    return torch.float32 if x.dtype == torch.int8 else x.dtype


def check_epilogue(
    x: Tensor, size: tuple[int, ...], vectors: dict[str, Tensor | None], images: dict[str, Tensor | None]
) -> None:
    """Check per-filter vectors and images of the output's ``size`` (N, O, OH, OW); ValueError."""
    if x.dtype == torch.int8 and vectors["scale"] is None:
        raise ValueError("x is int8 and no scale is given: expected a floating scale of one factor a filter")
    wanted = output_dtype(x)
    for name, vector in vectors.items():
        if vector is not None and (tuple(vector.shape) != (size[1],) or not vector.is_floating_point()):
            raise ValueError(
                f"{name} is {dtype_name(vector)} of shape {tuple(vector.shape)}: "
                f"expected a floating tensor of shape ({size[1]},)"
            )
    for name, image in images.items():
        if image is not None and (tuple(image.shape) != size or image.dtype != wanted):
            raise ValueError(
                f"{name} is {dtype_name(image)} of shape {tuple(image.shape)}: "
                f"expected {str(wanted).removeprefix('torch.')} of shape {size}"
            )


def output_size(
    x: Tensor,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: Sequence[int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Return (N, O, OH, OW); ValueError where the padding is malformed or no output is left."""
    if len(padding) != 4 or any(p < 0 for p in padding):
        raise ValueError(f"padding is {list(padding)}: expected four integers >= 0: top, bottom, left, right")
    top, bottom, left, right = padding
    rows = (x.shape[2] + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (x.shape[3] + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    if rows < 1 or columns < 1:
        raise ValueError(
            f"x of {x.shape[2]} x {x.shape[3]} pixels is smaller than the kernel: kernel_size "
            f"{list(kernel)}, dilation {list(dilation)}, padding {list(padding)}"
        )
    return x.shape[0], out_channels, rows, columns
