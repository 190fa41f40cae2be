"""The oracle: the grouped convolution as its definition reads, in plain torch, slow and obvious."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lhc_triton.planning.backends import Backend
from lhc_triton.runtime.op.call import Call
from lhc_triton.runtime.op.epilogue import finish
from lhc_triton.runtime.op.packing import check_tables


def run(call: Call) -> Tensor:
    """Run one grouped convolution, tile by tile and entry by entry.

    Sums are kept in float32; in float64 for float64 inputs and, so that they are exact, for int8. An infinite
    or NaN input reaches only the filters of the tiles that hold its entry, an infinite or NaN weight only the
    pixels whose tap lies in the image.

    Returns:
        [N, O, OH, OW] in x's type, float32 for int8 (halved sizes with pooling).
    """
    call.check_padded()
    x, weight, geometry = call.x, call.weight, call.geometry
    sums = torch.float64 if x.dtype in (torch.float64, torch.int8) else torch.float32
    (_, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    top, bottom, left, right = geometry.padding
    padded = F.pad(x.to(sums), (left, right, top, bottom))
    oh, ow = geometry.out_size
    n, out_channels, in_block, in_blocks = (
        geometry.batch,
        geometry.out_channels,
        call.in_block,
        call.in_blocks,
    )

    tile_ptr, entries, tile_filters = (table.tolist() for table in call.tables)
    check_tables(tile_ptr, entries, tile_filters, call.entries, out_channels)
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
    return finish(y, call.epilogue, call.out_dtype)


def _inside(count: int, stride: int, shift: int, size: int, device: torch.device) -> Tensor:
    """Return which of ``count`` outputs have this tap inside an axis of ``size`` pixels."""
    places = torch.arange(count, device=device) * stride + shift
    return (places >= 0) & (places < size)


BACKEND = Backend(
    "reference",
    devices=("cpu", "cuda"),
    dtypes=("float32", "float16", "bfloat16", "float64", "int8"),
    run=run,
)
