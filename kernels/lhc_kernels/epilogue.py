"""What follows the sums in every kernel: scale, bias, residual, activation, scatter to the filters."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "silu")


@triton.jit
def _finish(
    acc,
    offs_m,
    mask_m,
    filters,
    mask_n,
    residual_ptr,
    y_ptr,
    out_channels,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add the residual to float32 values [BLOCK_M, BLOCK_N], activate, and store them to their filters."""
    y_offs = offs_m[:, None] * out_channels + filters[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + y_offs, mask=mask_y, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0.0, 0.0, acc)  # keeps NaN, as torch does; a maximum would drop it
    elif ACTIVATION == "silu":
        decay = tl.exp(-tl.abs(acc))  # never overflows
        acc = acc * tl.where(acc < 0.0, decay, 1.0) / (1.0 + decay)
    tl.store(y_ptr + y_offs, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit
def store_outputs(
    acc,
    offs_m,
    mask_m,
    tile,
    offs_n,
    filters_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    out_channels,
    TILE_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RUN: tl.constexpr,
):
    """Turn the sums [BLOCK_M, BLOCK_N] of columns ``offs_n`` of a tile into outputs, and scatter them.

    y and residual are [pixels, out_channels], contiguous; filters [tiles, TILE_WIDTH], -1 where a tile is not
    full; bias and scale [out_channels].
    """
    acc = acc.to(tl.float32)
    filters = tl.load(filters_ptr + tile * TILE_WIDTH + offs_n, mask=offs_n < TILE_WIDTH, other=-1)
    mask_n = filters >= 0
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + filters, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + filters, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if RUN == 1:
        _finish(
            acc,
            offs_m,
            mask_m,
            filters,
            mask_n,
            residual_ptr,
            y_ptr,
            out_channels,
            HAS_RESIDUAL,
            ACTIVATION,
        )
        return
    # Filters that come in aligned runs are stored RUN at a time. The test is the same for the whole program
    # and lies behind the loop, so it costs neither divergence nor pipelining.
    run = tile * TILE_WIDTH + offs_n // RUN * RUN
    lead = tl.load(filters_ptr + run, mask=offs_n < TILE_WIDTH, other=-1)
    regular = tl.where(lead < 0, filters < 0, (filters == lead + offs_n % RUN) & (lead % RUN == 0))
    if tl.min(regular.to(tl.int32), axis=0) == 1:
        aligned = tl.multiple_of(lead, RUN)
        _finish(
            acc,
            offs_m,
            mask_m,
            aligned + offs_n % RUN,
            aligned >= 0,
            residual_ptr,
            y_ptr,
            out_channels,
            HAS_RESIDUAL,
            ACTIVATION,
        )
    else:
        _finish(
            acc,
            offs_m,
            mask_m,
            filters,
            mask_n,
            residual_ptr,
            y_ptr,
            out_channels,
            HAS_RESIDUAL,
            ACTIVATION,
        )
