"""Kernel A, for every GPU, stride and dilation: activations come through pointers, pixel by pixel."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import store_outputs


@triton.jit
def decode_entry(
    entry,
    IN_BLOCKS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    IN_BLOCK: tl.constexpr,
):
    """Return tap, kernel row, kernel column and first channel of ``entry = tap * IN_BLOCKS + block``."""
    # Entries are never negative, and an unsigned division by a constant is the cheaper one.
    tap = (entry.to(tl.uint32) // IN_BLOCKS).to(tl.int32)
    channel = (entry - tap * IN_BLOCKS) * IN_BLOCK
    if KERNEL_H * KERNEL_W == 1:
        return tap, tap * 0, tap * 0, channel
    tap_row = (tap.to(tl.uint32) // KERNEL_W).to(tl.int32)
    return tap, tap_row, tap - tap_row * KERNEL_W, channel


@triton.jit
def _turns(m_blocks, n_blocks, PERSISTENT: tl.constexpr, RESIDENT: tl.constexpr):
    """Return how many work items this program has."""
    if RESIDENT:
        return tl.cdiv(m_blocks - tl.program_id(0), tl.num_programs(0)) * n_blocks
    if PERSISTENT:
        return tl.cdiv(m_blocks * n_blocks - tl.program_id(0), tl.num_programs(0))
    return 1


@triton.jit
def _place(turn, m_blocks, n_blocks, PERSISTENT: tl.constexpr, RESIDENT: tl.constexpr):
    """Return the block of pixels and the block of filters of a program's turn."""
    workers = tl.num_programs(0)
    if RESIDENT:
        # All tiles of the same pixels one after the other, whose activations may still be in L1.
        return tl.program_id(0) + turn // n_blocks * workers, turn % n_blocks
    item = tl.program_id(0) + turn * workers
    if not PERSISTENT:
        # Neighbours work on the same pixels, so that the filter tiles share activations in L2.
        return item // n_blocks, item % n_blocks
    # As many blocks of pixels as there are programs form a group, and a group goes through the tiles in
    # turn: all programs then work on equally long tiles, the longest first, and the group's activations
    # can stay in L2 from tile to tile.
    group = item // (workers * n_blocks)
    rest = item - group * workers * n_blocks
    size = tl.minimum(m_blocks - group * workers, workers)
    return group * workers + rest % size, rest // size


@triton.jit
def _offset(
    tap_row,
    tap_col,
    channel,
    width,
    IN_CHANNELS: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    INDEX64: tl.constexpr,
):
    """Return how far a tap's channel lies from the first channel of a pixel's first tap."""
    if INDEX64:
        tap_row = tap_row.to(tl.int64)
    return (tap_row * DILATION_H * width + tap_col * DILATION_W) * IN_CHANNELS + channel


@triton.jit
def _inside(
    ih,
    iw,
    mask_m,
    height,
    width,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BORDER: tl.constexpr,
    BIT_A_TAP: tl.constexpr,
):
    """Return each pixel's bits, which say what lies in the image; `_is_inside` reads them.

    Bit ``t`` stands for tap t. A kernel of too many taps for that has a bit for each of its rows, one that is
    never set, and one for each of its columns.
    """
    rows = tl.zeros(ih.shape, tl.int32)
    columns = tl.zeros(iw.shape, tl.int32)
    for s in tl.static_range(KERNEL_W):
        x_in = iw + s * DILATION_W
        columns |= (((x_in >= 0) & (x_in < width)) | (not BORDER)).to(tl.int32) << s
    for r in tl.static_range(KERNEL_H):
        y_in = ih + r * DILATION_H
        row = (((y_in >= 0) & (y_in < height)) | (not BORDER)) & mask_m
        if BIT_A_TAP:
            rows |= tl.where(row, columns << r * KERNEL_W, 0)
        else:
            rows |= row.to(tl.int32) << r
    return rows if BIT_A_TAP else rows | columns << (KERNEL_H + 1)


@triton.jit
def _is_inside(inside, tap, tap_row, tap_col, KERNEL_H: tl.constexpr, BIT_A_TAP: tl.constexpr):
    """Return whether a tap of each pixel lies in the image; the tap behind the last one never does."""
    if BIT_A_TAP:
        return (inside >> tap & 1) != 0
    return ((inside >> tap_row) & (inside >> (KERNEL_H + 1 + tap_col)) & 1) != 0


# Sizes that change from call to call are no part of what is compiled: not that one is 1, or a multiple of 16.
@triton.jit(do_not_specialize=("pixels", "height", "width", "out_height", "out_width"))
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
    BORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ENTRIES: tl.constexpr,
    PERSISTENT: tl.constexpr,
    RESIDENT: tl.constexpr,
    SPLITS: tl.constexpr,
    K_MAJOR: tl.constexpr,
    RUN: tl.constexpr,
):
    """Compute BLOCK_M output pixels of one filter tile (or of BLOCK_N filters of a wider one).

    K runs over the tile's entries, ENTRIES * BLOCK_K input channels a step: an implicit GEMM that visits
    live blocks only. IN_CHANNELS and IN_BLOCK are compile-time constants because loads are vectorised and
    pipelined only where the compiler can prove their offsets aligned. Layouts, all contiguous in this order:
    x [N, H, W, IN_CHANNELS]; y and residual [N, OH, OW, out_channels]; w [entries, IN_BLOCK, TILE_WIDTH], or
    with K_MAJOR [entries, TILE_WIDTH, IN_BLOCK], which is the only order that int8 tensor cores read;
    filters [tiles, TILE_WIDTH], -1 where a tile is not full; tile_ptr [tiles + 1], where each tile's entries
    start; entries, with one element of padding at its end because it is read one step ahead. With
    PERSISTENT, a program goes on to further blocks; with RESIDENT, through all tiles of the same pixels,
    and then to further ones. With SPLITS > 1, axis 1 of the grid counts parts of a
    tile's entries, and y is the workspace [SPLITS, pixels, tiles, TILE_WIDTH] of plain sums.
    """
    N_BLOCKS: tl.constexpr = (TILE_WIDTH + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (IN_BLOCK + BLOCK_K - 1) // BLOCK_K
    PADDED: tl.constexpr = CHUNKS * BLOCK_K != IN_BLOCK
    IN_BLOCKS: tl.constexpr = (IN_CHANNELS + IN_BLOCK - 1) // IN_BLOCK
    ACC: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    # The entry that fills the last step of an odd tile: its tap is outside of every image.
    NOTHING: tl.constexpr = KERNEL_H * KERNEL_W * IN_BLOCKS
    BIT_A_TAP: tl.constexpr = KERNEL_H * KERNEL_W < 32
    BITS: tl.constexpr = BORDER or ENTRIES == 2

    m_blocks = tl.cdiv(pixels, BLOCK_M)
    n_blocks = tiles * N_BLOCKS
    # Compiled: a loop of one turn disappears, and one of many keeps the inner loop's copies in flight.
    for turn in range(_turns(m_blocks, n_blocks, PERSISTENT, RESIDENT)):
        pid_m, pid_n = _place(turn, m_blocks, n_blocks, PERSISTENT, RESIDENT)
        tile = pid_n // N_BLOCKS
        offs_n = (pid_n % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, ENTRIES * BLOCK_K)
        first = tl.load(tile_ptr + tile)
        last = tl.load(tile_ptr + tile + 1)
        if SPLITS > 1:
            count = last - first
            last = first + count * (tl.program_id(1) + 1) // SPLITS
            first += count * tl.program_id(1) // SPLITS
        if INDEX64:
            pid_m = pid_m.to(tl.int64)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < pixels

        row = offs_m // out_width
        iw = (offs_m % out_width) * STRIDE_W - pad_left
        ih = (row % out_height) * STRIDE_H - pad_top
        if BITS:
            inside = _inside(
                ih, iw, mask_m, height, width, KERNEL_H, KERNEL_W, DILATION_H, DILATION_W, BORDER, BIT_A_TAP
            )[:, None]
        x_base = ((((row // out_height) * height + ih) * width + iw) * IN_CHANNELS)[:, None]
        if RESIDENT:
            # Copies of 16 bytes pass L1 by, those of 8 go through it. The compiler takes the widest that it
            # can prove aligned, so it is told less than what holds: the first tile starts at 0.
            x_base += tl.multiple_of(tl.load(tile_ptr), 64 // x_ptr.dtype.element_ty.primitive_bitwidth)
        if K_MAJOR:
            offs_w = offs_n[None, :] * IN_BLOCK + offs_k[:, None]
            if ENTRIES == 2:
                offs_w += (offs_k // IN_BLOCK * (TILE_WIDTH - 1) * IN_BLOCK)[:, None]
        else:
            offs_w = offs_k[:, None] * TILE_WIDTH + offs_n[None, :]

        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        entry = tl.load(entries_ptr + first)
        second = tl.load(entries_ptr + first + 1, mask=first + 1 < last, other=NOTHING)
        for step in range(first * CHUNKS, last * CHUNKS, ENTRIES):
            start = (step % CHUNKS) * BLOCK_K
            tap, tap_row, tap_col, channel = decode_entry(entry, IN_BLOCKS, KERNEL_H, KERNEL_W, IN_BLOCK)
            x_step = _offset(tap_row, tap_col, channel, width, IN_CHANNELS, DILATION_H, DILATION_W, INDEX64)
            mask_w = offs_n[None, :] < TILE_WIDTH
            if ENTRIES == 2:
                # Two entries side by side in K. A gather [BLOCK_M, 2, IN_BLOCK] reshaped to two dimensions
                # would send the activations through registers; selecting by k keeps them in shared memory.
                # Whole offsets are selected, because what is the same for all threads costs next to nothing.
                tap_2, row_2, col_2, channel_2 = decode_entry(second, IN_BLOCKS, KERNEL_H, KERNEL_W, IN_BLOCK)
                step_2 = _offset(row_2, col_2, channel_2, width, IN_CHANNELS, DILATION_H, DILATION_W, INDEX64)
                in_first = offs_k < IN_BLOCK
                x_step = tl.where(in_first, x_step + offs_k, step_2 - IN_BLOCK + offs_k)
                tap = tl.where(in_first, tap, tap_2)[None, :]
                tap_row = tl.where(in_first, tap_row, row_2)[None, :]
                tap_col = tl.where(in_first, tap_col, col_2)[None, :]
                channel = tl.where(in_first, channel + offs_k, channel_2 - IN_BLOCK + offs_k)
                mask_w = mask_w & (offs_k < (last - step) * IN_BLOCK)[:, None]
            else:
                x_step = x_step + start + offs_k
                channel = channel + start + offs_k
            if BITS:
                mask_x = _is_inside(inside, tap, tap_row, tap_col, KERNEL_H, BIT_A_TAP)
            else:
                mask_x = mask_m[:, None]
            if PADDED:
                mask_x = mask_x & (start + offs_k < IN_BLOCK)[None, :]
                mask_w = mask_w & (start + offs_k < IN_BLOCK)[:, None]
            if IN_CHANNELS % IN_BLOCK != 0:
                mask_x = mask_x & (channel < IN_CHANNELS)[None, :]
            block = step // CHUNKS
            if INDEX64:
                block = block.to(tl.int64)
            w_step = block * IN_BLOCK * TILE_WIDTH + start * (1 if K_MAJOR else TILE_WIDTH)
            # Read one step ahead: a load in front of its own use would cost pipeline stages.
            ahead = (step + ENTRIES) // CHUNKS
            entry = tl.load(entries_ptr + ahead, mask=ahead <= last, other=0)
            if ENTRIES == 2:
                second = tl.load(entries_ptr + ahead + 1, mask=ahead + 1 < last, other=NOTHING)

            a = tl.load(x_ptr + (x_base + x_step), mask=mask_x, other=0)
            b = tl.load(w_ptr + w_step + offs_w, mask=mask_w, other=0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

        if SPLITS > 1:
            rows = (tl.program_id(1).to(offs_m.dtype) * pixels + offs_m) * tiles + tile
            offs_y = rows[:, None] * TILE_WIDTH + offs_n[None, :]
            tl.store(y_ptr + offs_y, acc, mask=mask_m[:, None] & (offs_n[None, :] < TILE_WIDTH))
        else:
            store_outputs(
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
                TILE_WIDTH,
                HAS_BIAS,
                HAS_SCALE,
                HAS_RESIDUAL,
                ACTIVATION,
                RUN,
            )


@triton.jit(do_not_specialize=("pixels",))
def reduce_splits_kernel(
    sums_ptr,
    filters_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    tiles,
    out_channels,
    TILE_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Add the parts [SPLITS, pixels, tiles, TILE_WIDTH] of BLOCK_M pixels and BLOCK_N filters, and finish.

    The parts are added in their order, so that the same launch gives the same bits every time.
    """
    N_BLOCKS: tl.constexpr = (TILE_WIDTH + BLOCK_N - 1) // BLOCK_N
    pid_m = tl.program_id(0) // (tiles * N_BLOCKS)
    pid_n = tl.program_id(0) % (tiles * N_BLOCKS)
    tile = pid_n // N_BLOCKS
    if INDEX64:
        pid_m = pid_m.to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid_n % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < pixels
    mask = mask_m[:, None] & (offs_n[None, :] < TILE_WIDTH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), sums_ptr.dtype.element_ty)
    for split in tl.static_range(SPLITS):
        rows = ((offs_m + split * pixels) * tiles + tile)[:, None]
        acc += tl.load(sums_ptr + rows * TILE_WIDTH + offs_n[None, :], mask=mask, other=0)
    store_outputs(
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
        TILE_WIDTH,
        HAS_BIAS,
        HAS_SCALE,
        HAS_RESIDUAL,
        ACTIVATION,
        RUN,
    )
