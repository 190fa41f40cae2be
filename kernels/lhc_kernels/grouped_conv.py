"""The grouped, structured-sparse convolution: its Triton kernel and the function that launches it."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_epilogue, check_tensors, dtype_name, output_size, pair
from .choice import heuristic_config
from .configs import KernelConfig, LaunchShape, config_problem, store_run

INT32_ELEMENTS = 2**31 - 512
"""Tensors of fewer elements are indexed with int32; the margin is the padding of a block of pixels."""


@triton.jit
def _decode(entry, IN_BLOCKS: tl.constexpr, KERNEL_W: tl.constexpr, IN_BLOCK: tl.constexpr):
    """Return kernel row, kernel column and first channel of ``entry = tap * IN_BLOCKS + block``."""
    # Entries are never negative, and an unsigned division by a constant is the cheaper one.
    tap = (entry.to(tl.uint32) // IN_BLOCKS).to(tl.int32)
    tap_row = (tap.to(tl.uint32) // KERNEL_W).to(tl.int32)
    return tap_row, tap - tap_row * KERNEL_W, (entry - tap * IN_BLOCKS) * IN_BLOCK


@triton.jit
def _store(
    acc,
    offs_m,
    mask_m,
    filters,
    mask_n,
    residual_ptr,
    y_ptr,
    out_channels,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """Finish the epilogue on float32 sums [BLOCK_M, BLOCK_N] and scatter them to their filters."""
    y_offs = offs_m[:, None] * out_channels + filters[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + y_offs, mask=mask_y, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # keeps NaN, as torch does; a maximum would drop it
    tl.store(y_ptr + y_offs, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit
def grouped_conv2d_fwd_kernel(
    x_ptr,
    w_ptr,
    tile_ptr,
    entries_ptr,
    filters_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    tiles,
    height,
    width,
    out_height,
    out_width,
    out_channels,
    pad_top,
    pad_left,
    IN_CHANNELS: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ENTRIES: tl.constexpr,
    RUN: tl.constexpr,
):
    """Compute BLOCK_M output pixels of one filter tile (or of BLOCK_N filters of a wider one).

    K runs over the tile's entries, ENTRIES * BLOCK_K input channels a step: an implicit GEMM that visits
    live blocks only. IN_CHANNELS and IN_BLOCK are compile-time constants because loads are vectorised and
    pipelined only where the compiler can prove their offsets aligned. Layouts, all contiguous in this order:
    x [N, H, W, IN_CHANNELS]; y and residual [N, OH, OW, out_channels]; w [entries, IN_BLOCK, TILE_WIDTH];
    filters [tiles, TILE_WIDTH], -1 where a tile is not full; tile_ptr [tiles + 1], where each tile's entries
    start; entries, with one element of padding at its end because it is read one step ahead.
    """
    N_BLOCKS: tl.constexpr = (TILE_WIDTH + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (IN_BLOCK + BLOCK_K - 1) // BLOCK_K
    PADDED: tl.constexpr = CHUNKS * BLOCK_K != IN_BLOCK
    IN_BLOCKS: tl.constexpr = (IN_CHANNELS + IN_BLOCK - 1) // IN_BLOCK

    # Programs of the same pixels are neighbours, so that the filter tiles share activations in L2.
    pid = tl.program_id(0)
    pid_m = pid // (tiles * N_BLOCKS)
    pid_n = pid % (tiles * N_BLOCKS)
    tile = pid_n // N_BLOCKS
    offs_n = (pid_n % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, ENTRIES * BLOCK_K)
    first = tl.load(tile_ptr + tile)
    last = tl.load(tile_ptr + tile + 1)
    w_row = first * IN_BLOCK
    if INDEX64:
        pid_m = pid_m.to(tl.int64)
        w_row = first.to(tl.int64) * IN_BLOCK
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < pixels

    row = offs_m // out_width
    iw = (offs_m % out_width) * STRIDE_W - pad_left
    ih = (row % out_height) * STRIDE_H - pad_top
    # Bit r says that kernel row r of this pixel lies inside the image, bit KERNEL_H + s the same of column s.
    inside = tl.zeros((BLOCK_M,), tl.int32)
    for r in tl.static_range(KERNEL_H):
        y_in = ih + r * DILATION_H
        inside |= ((y_in >= 0) & (y_in < height) & mask_m).to(tl.int32) << r
    for s in tl.static_range(KERNEL_W):
        x_in = iw + s * DILATION_W
        inside |= ((x_in >= 0) & (x_in < width)).to(tl.int32) << (KERNEL_H + s)
    inside = inside[:, None]
    x_base = ((((row // out_height) * height + ih) * width + iw) * IN_CHANNELS)[:, None]
    w_ptrs = w_ptr + w_row * TILE_WIDTH + offs_k[:, None] * TILE_WIDTH + offs_n[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    entry = tl.load(entries_ptr + first)
    second = tl.load(entries_ptr + first + 1, mask=first < last, other=0)
    for step in range(first * CHUNKS, last * CHUNKS, ENTRIES):
        start = (step % CHUNKS) * BLOCK_K
        mask_w = offs_n[None, :] < TILE_WIDTH
        tap_row, tap_col, channel = _decode(entry, IN_BLOCKS, KERNEL_W, IN_BLOCK)
        channel = channel + start + offs_k
        if ENTRIES == 2:
            # Two entries side by side in K. A gather [BLOCK_M, 2, IN_BLOCK] reshaped to two dimensions would
            # send the activations through registers; selecting by k keeps them in shared memory for wgmma.
            row_2, col_2, channel_2 = _decode(second, IN_BLOCKS, KERNEL_W, IN_BLOCK)
            in_first = offs_k < IN_BLOCK
            tap_row = tl.where(in_first, tap_row, row_2)[None, :]
            tap_col = tl.where(in_first, tap_col, col_2)[None, :]
            channel = tl.where(in_first, channel, channel_2 - IN_BLOCK + offs_k)
            mask_w = mask_w & (offs_k < (last - step) * IN_BLOCK)[:, None]
        mask_x = ((inside >> tap_row) & (inside >> (KERNEL_H + tap_col)) & 1) != 0
        if ENTRIES == 2:
            mask_x = mask_x & (offs_k < (last - step) * IN_BLOCK)[None, :]
        if PADDED:
            mask_x = mask_x & (start + offs_k < IN_BLOCK)[None, :]
            mask_w = mask_w & (start + offs_k < IN_BLOCK)[:, None]
        if IN_CHANNELS % IN_BLOCK != 0:
            mask_x = mask_x & (channel < IN_CHANNELS)[None, :]
        if INDEX64:
            tap_row = tap_row.to(tl.int64)
        x_step = (tap_row * DILATION_H * width + tap_col * DILATION_W) * IN_CHANNELS + channel
        # Read one step ahead: a load in front of its own use would cost pipeline stages.
        ahead = (step + ENTRIES) // CHUNKS
        entry = tl.load(entries_ptr + ahead, mask=ahead <= last, other=0)
        if ENTRIES == 2:
            second = tl.load(entries_ptr + ahead + 1, mask=ahead < last, other=0)

        a = tl.load(x_ptr + (x_base + x_step), mask=mask_x, other=0.0)
        b = tl.load(w_ptrs, mask=mask_w, other=0.0)
        if PADDED:
            w_ptrs += tl.minimum(BLOCK_K, IN_BLOCK - start) * TILE_WIDTH
        else:
            w_ptrs += ENTRIES * BLOCK_K * TILE_WIDTH
        if UPCAST:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    filters = tl.load(filters_ptr + tile * TILE_WIDTH + offs_n, mask=offs_n < TILE_WIDTH, other=-1)
    mask_n = filters >= 0
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + filters, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + filters, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if RUN == 1:
        _store(acc, offs_m, mask_m, filters, mask_n, residual_ptr, y_ptr, out_channels, HAS_RESIDUAL, RELU)
    else:
        # Filters that come in aligned runs are stored RUN at a time. The test is the same for the whole
        # program and lies behind the loop, so it costs neither divergence nor pipelining.
        lead = tl.load(
            filters_ptr + tile * TILE_WIDTH + offs_n // RUN * RUN, mask=offs_n < TILE_WIDTH, other=-1
        )
        regular = tl.where(lead < 0, filters < 0, (filters == lead + offs_n % RUN) & (lead % RUN == 0))
        if tl.min(regular.to(tl.int32), axis=0) == 1:
            aligned = tl.multiple_of(lead, RUN)
            _store(
                acc,
                offs_m,
                mask_m,
                aligned + offs_n % RUN,
                aligned >= 0,
                residual_ptr,
                y_ptr,
                out_channels,
                HAS_RESIDUAL,
                RELU,
            )
        else:
            _store(
                acc, offs_m, mask_m, filters, mask_n, residual_ptr, y_ptr, out_channels, HAS_RESIDUAL, RELU
            )


INTERPRETED = not isinstance(grouped_conv2d_fwd_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when this module was imported: kernels then run on the CPU."""


def kernel_constants(
    config: KernelConfig,
    dtype: str,
    *,
    in_channels: int,
    in_block: int,
    tile_width: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    bias: bool,
    scale: bool,
    residual: bool,
    relu: bool,
    index64: bool,
) -> dict[str, Any]:
    """Return the kernel's compile-time constants: the same for a launch and a compile ahead of time."""
    return {
        "IN_CHANNELS": in_channels,
        "IN_BLOCK": in_block,
        "TILE_WIDTH": tile_width,
        "KERNEL_H": kernel_size[0],
        "KERNEL_W": kernel_size[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "HAS_BIAS": bias,
        "HAS_SCALE": scale,
        "HAS_RESIDUAL": residual,
        "RELU": relu,
        "PRECISION": config.precision,
        "INDEX64": index64,
        "UPCAST": INTERPRETED and dtype == "bfloat16",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "ENTRIES": config.entries,
        "RUN": store_run(out_channels, tile_width, dtype),
    }


def _check_devices(x: Tensor, others: Sequence[Tensor]) -> None:
    stray = {str(t.device) for t in others} - {str(x.device)}
    if stray:
        raise ValueError(f"x is on {x.device}, other tensors on {', '.join(sorted(stray))}: move them")
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "x is on the CPU: the Triton kernel needs a GPU, or TRITON_INTERPRET=1 set before the start"
        )


def launch_shape(x: Tensor, weight: Tensor, tiles: int, pixels: int, kernel: tuple[int, int]) -> LaunchShape:
    """Return what a config is chosen for; asks the device for its properties, never for data.

    Args:
        x: the activations, for dtype and device.
        weight: [E, in_block, tile_width].
        tiles: T.
        pixels: N * OH * OW.
        kernel: (kh, kw).
    """
    shape = LaunchShape(pixels, x.shape[1], weight.shape[1], weight.shape[2], tiles, kernel, dtype_name(x))
    if x.device.type != "cuda":
        return shape
    device = torch.cuda.get_device_properties(x.device)
    shared = getattr(device, "shared_memory_per_block_optin", 0) or device.shared_memory_per_block
    return replace(shape, processors=device.multi_processor_count, shared_bytes=shared)


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    tables: Sequence[Tensor],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
    config: Sequence[int] = (),
    out: Tensor | None = None,
) -> Tensor:
    """Convolve with the live blocks only: ``y[n, f] = act(scale[f] * sum(w * x) + bias[f] + residual)``.

    Sums run over the entries of the filter's tile and are accumulated in float32; infinities and NaN in ``x``
    reach a filter only through them. A tile without entries gives ``act(bias + residual)``. Only sizes are
    checked, so nothing waits for the device: the tables' contents are the packer's to get right. Not
    differentiable.

    Args:
        x: [N, C, H, W], float16, bfloat16 or float32; copied to channels_last where it is not.
        weight: [E, in_block, tile_width] of x's dtype: the tiles' entries, tile by tile; rows past C and
            columns past a tile's filters are zero.
        tables: int32 tensors: tile_ptr [T + 1]; entries [E + 1], each ``tap * in_blocks + block`` with
            ``tap = r * kw + s``, the last one padding; filters [T, tile_width], each output channel once,
            -1 where a tile is not full.
        bias: [out_channels], floating, added before the residual and the activation.
        residual: [N, out_channels, OH, OW] of x's dtype, added before the activation.
        scale: [out_channels], floating, multiplies the sums before the bias is added.
        out_channels: O.
        kernel_size: (kh, kw), kh + kw at most 31.
        stride: (vertical, horizontal).
        padding: zero border in pixels: (top, bottom, left, right).
        dilation: (vertical, horizontal).
        activation: "none" or "relu" (which keeps NaN, as torch does).
        config: ``KernelConfig.to_list()``; empty takes the heuristic.
        out: channels_last tensor [N, O, OH, OW] of x's dtype that takes the result.

    Returns:
        [N, out_channels, OH, OW] in x's dtype, channels_last.

    Raises:
        ValueError: sizes, devices, a config or an option that do not fit.
        TypeError: an unsupported dtype, or x and weight of different ones.
    """
    check_tensors(x, weight, tables, out_channels)
    kernel = pair("kernel_size", kernel_size, 1)
    strides = pair("stride", stride, 1)
    dilations = pair("dilation", dilation, 1)
    size = output_size(x, out_channels, kernel, strides, padding, dilations)
    if activation not in ("none", "relu"):
        raise ValueError(f"activation is {activation!r}: supported are 'none' and 'relu'")
    check_epilogue(x, size, {"bias": bias, "scale": scale}, {"residual": residual, "out": out})
    if out is not None and not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("out is not channels_last: allocate it with memory_format=torch.channels_last")

    tiles = tables[0].numel() - 1
    pixels = size[0] * size[2] * size[3]
    shape = launch_shape(x, weight, tiles, pixels, kernel)
    chosen = KernelConfig.from_list(config) if len(config) else heuristic_config(shape)
    problem = config_problem(chosen, shape)
    if problem is not None:
        raise ValueError(problem)
    _check_devices(x, [t for t in (weight, *tables, bias, scale, residual, out) if t is not None])

    if out is None:
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if pixels == 0:
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    constants = kernel_constants(
        chosen,
        shape.dtype,
        in_channels=x.shape[1],
        in_block=weight.shape[1],
        tile_width=weight.shape[2],
        out_channels=out_channels,
        kernel_size=kernel,
        stride=strides,
        dilation=dilations,
        bias=bias is not None,
        scale=scale is not None,
        residual=residual is not None,
        relu=activation == "relu",
        index64=max(x.numel(), out.numel(), weight.numel()) >= INT32_ELEMENTS,
    )
    grid = (-(-pixels // chosen.block_m) * tiles * -(-weight.shape[2] // chosen.block_n),)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        grouped_conv2d_fwd_kernel[grid](
            x,
            weight.contiguous(),
            *(t.contiguous() for t in tables),
            None if bias is None else bias.contiguous(),
            None if scale is None else scale.contiguous(),
            residual,
            out,
            pixels,
            tiles,
            x.shape[2],
            x.shape[3],
            size[2],
            size[3],
            out_channels,
            padding[0],
            padding[2],
            **constants,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            enable_fp_fusion=True,  # for float32; Triton 3.10 switches fused multiply-adds off by default
        )
    return out
