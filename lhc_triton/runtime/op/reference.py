"""The oracle: the grouped convolution as its definition reads, in plain torch, slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lhc_triton.runtime.op.epilogue import finish, result_dtype
from lhc_triton.runtime.op.packing import check_tables


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    tables: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    *,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    pool: str,
) -> Tensor:
    """Run one grouped convolution, tile by tile and entry by entry.

    Sums are kept in float32; in float64 for float64 inputs and, so that they are exact, for int8. An infinite
    or NaN input reaches only the filters of the tiles that hold its entry, an infinite or NaN weight only the
    pixels whose tap lies in the image.

    Args:
        x: [N, C, H, W] in any memory format.
        weight: [E, in_block, tile_width], the entries of all tiles one after another.
        tables: tile_ptr [T + 1], entries [E + 1], filters [T, tile_width]; see ``packing``.
        bias: [O] or None.
        residual: [N, O, OH, OW] or None.
        scale: [O] or None.
        out_channels: O.
        kernel_size: (kh, kw).
        stride: (vertical, horizontal).
        padding: zero border in pixels as (top, bottom, left, right).
        dilation: (vertical, horizontal).
        activation: "none", "relu" or "silu".
        pool: "none" or "max2x2".

    Returns:
        [N, O, OH, OW] in x's type, float32 for int8 (halved sizes with pooling).
    """
    sums = torch.float64 if x.dtype in (torch.float64, torch.int8) else torch.float32
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    top, bottom, left, right = padding
    padded = F.pad(x.to(sums), (left, right, top, bottom))
    n, channels, height, width = padded.shape
    oh = (height - dh * (kh - 1) - 1) // sh + 1
    ow = (width - dw * (kw - 1) - 1) // sw + 1
    in_block = weight.shape[1]
    in_blocks = -(-channels // in_block)

    tile_ptr, entries, tile_filters = (table.tolist() for table in tables)
    check_tables(tile_ptr, entries, tile_filters, kh * kw * in_blocks, out_channels)
    y = padded.new_zeros((n, out_channels, oh, ow))
    for tile, filters in enumerate(tile_filters):
        total = padded.new_zeros((n, len(filters), oh, ow))
        for e in range(tile_ptr[tile], tile_ptr[tile + 1]):
            tap, block = divmod(entries[e], in_blocks)
            r, s = divmod(tap, kw)
            first = block * in_block
            window = padded[
                :,
                first : first + in_block,
                r * dh : r * dh + (oh - 1) * sh + 1 : sh,
                s * dw : s * dw + (ow - 1) * sw + 1 : sw,
            ]
            w = weight[e, : window.shape[1]].to(sums)
            rows = _inside(oh, sh, r * dh - top, x.shape[2], x.device)
            columns = _inside(ow, sw, s * dw - left, x.shape[3], x.device)
            product = torch.einsum("nchw,cf->nfhw", window, w)
            total += product.where(rows[:, None] & columns, 0.0)
        for column, f in enumerate(filters):
            if f >= 0:
                y[:, f] = total[:, column]
    return finish(y, bias, residual, scale, activation=activation, pool=pool, dtype=result_dtype(x.dtype))


def _inside(count: int, stride: int, shift: int, size: int, device: torch.device) -> Tensor:
    """Return which of ``count`` outputs have this tap inside an axis of ``size`` pixels."""
    places = torch.arange(count, device=device) * stride + shift
    return (places >= 0) & (places < size)
