"""The grouped convolution in plain torch: a gather and a matrix product per tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lhc_triton.runtime.epilogue import finish


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
    layout: str,
) -> Tensor:
    """Run one grouped convolution; arguments and result as in ``reference.grouped_conv2d``."""
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    top, bottom, left, right = padding
    in_block = weight.shape[1]
    in_blocks = -(-x.shape[1] // in_block)
    padded = F.pad(x.to(sums), (left, right, top, bottom, 0, in_blocks * in_block - x.shape[1]))
    n, _, height, width = padded.shape
    oh = (height - dh * (kh - 1) - 1) // sh + 1
    ow = (width - dw * (kw - 1) - 1) // sw + 1
    blocks = padded.view(n, in_blocks, in_block, height, width)

    tile_ptr, entries = tables[0].tolist(), tables[1].tolist()
    weight = weight.to(sums)
    y = padded.new_zeros((n, out_channels, oh, ow))
    for tile, filters in enumerate(tables[2].tolist()):
        first, last = tile_ptr[tile], tile_ptr[tile + 1]
        if first == last:
            continue
        windows = []
        for entry in entries[first:last]:
            tap, block = divmod(entry, in_blocks)
            top_row, left_column = tap // kw * dh, tap % kw * dw
            rows = slice(top_row, top_row + (oh - 1) * sh + 1, sh)
            columns = slice(left_column, left_column + (ow - 1) * sw + 1, sw)
            windows.append(blocks[:, block, :, rows, columns])
        gathered = torch.cat(windows, 1).flatten(2)
        live = [f for f in filters if f >= 0]
        w = weight[first:last].flatten(0, 1)[:, : len(live)]
        y[:, live] = torch.matmul(w.t(), gathered).view(n, len(live), oh, ow)
    return finish(y, bias, residual, scale, activation=activation, pool=pool, layout=layout, dtype=x.dtype)
