"""Kernel B, for Hopper and later at stride 1: activations come as boxes of a tensor descriptor."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import store_outputs
from .grouped_conv import decode_entry


@triton.jit(do_not_specialize=("batch", "out_height", "out_width"))
def grouped_conv2d_box_fwd_kernel(
    x_desc,
    w_desc,
    tile_ptr,
    entries_ptr,
    filters_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    batch,
    tiles,
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
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX64: tl.constexpr,
    UPCAST: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
):
    """Compute a box of BOX_N images x BOX_H rows x BOX_W columns of BLOCK_N filters of one tile.

    For an entry, the inputs of such a box are a box themselves, moved by the entry's tap; coordinates outside
    the image read zeros, so the border needs no mask. x_desc describes x [N, H, W, IN_CHANNELS] in boxes
    [BOX_N, BOX_H, BOX_W, BLOCK_K], w_desc the weights [entries * IN_BLOCK, TILE_WIDTH] in [BLOCK_K, BLOCK_N];
    BLOCK_K divides IN_BLOCK. All else is laid out as in ``grouped_conv2d_fwd_kernel``.
    """
    N_BLOCKS: tl.constexpr = (TILE_WIDTH + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = IN_BLOCK // BLOCK_K
    IN_BLOCKS: tl.constexpr = (IN_CHANNELS + IN_BLOCK - 1) // IN_BLOCK
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W

    pid = tl.program_id(0)
    pid_m = pid // (tiles * N_BLOCKS)
    pid_n = pid % (tiles * N_BLOCKS)
    tile = pid_n // N_BLOCKS
    column = (pid_n % N_BLOCKS) * BLOCK_N
    boxes_w = tl.cdiv(out_width, BOX_W)
    boxes_h = tl.cdiv(out_height, BOX_H)
    w_out = pid_m % boxes_w * BOX_W
    h_out = pid_m // boxes_w % boxes_h * BOX_H
    image = pid_m // (boxes_w * boxes_h) * BOX_N
    first = tl.load(tile_ptr + tile)
    last = tl.load(tile_ptr + tile + 1)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    entry = tl.load(entries_ptr + first)
    for step in range(first * CHUNKS, last * CHUNKS):
        _, tap_row, tap_col, channel = decode_entry(entry, IN_BLOCKS, KERNEL_H, KERNEL_W, IN_BLOCK)
        channel += (step % CHUNKS) * BLOCK_K
        h_in = h_out - pad_top + tap_row * DILATION_H
        w_in = w_out - pad_left + tap_col * DILATION_W
        # Read one step ahead; the padding element serves the last step.
        entry = tl.load(entries_ptr + (step + 1) // CHUNKS)
        a = x_desc.load([image, h_in, w_in, channel]).reshape(BLOCK_M, BLOCK_K)
        b = w_desc.load([step * BLOCK_K, column])
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc)

    place = tl.arange(0, BLOCK_M)
    w = w_out + place % BOX_W
    h = h_out + place // BOX_W % BOX_H
    n = image + place // (BOX_W * BOX_H)
    mask_m = (w < out_width) & (h < out_height) & (n < batch)
    if INDEX64:
        n = n.to(tl.int64)
    store_outputs(
        acc,
        (n * out_height + h) * out_width + w,
        mask_m,
        tile,
        column + tl.arange(0, BLOCK_N),
        filters_ptr,
        bias_ptr,
        scale_ptr,
        residual_ptr,
        y_ptr,
        out_channels,
        TILE_WIDTH,
        HAS_BIAS,
        HAS_SCALE,
        HAS_RESIDUAL,
        ACTIVATION,
        RUN,
    )
