"""The grouped convolution in plain torch: matrix products on shifted views, and no gather.

The input is copied once into planes with a zero border, laid out flat, so that a kernel tap is nothing but an
offset: input block and tap together are a strided view [in_block, pixels], and one ``addmm`` per entry adds
its share to the tile's outputs. Products are computed on the bordered grid and cropped afterwards; a stride
splits the planes into one per phase (row parity, column parity), where it becomes an offset again. On two
cores this took 0.4 to 0.8 of the time of gathering each tile's inputs for one large product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from lhc_triton.planning.backends import Backend
from lhc_triton.planning.cost import TORCH
from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.op import reference
from lhc_triton.runtime.op.call import Call
from lhc_triton.runtime.op.epilogue import finish
from lhc_triton.runtime.op.packing import check_tables

# Inputs of an entry and outputs of a tile that should stay in a core's L2 cache while the tile is computed.
CACHED_BYTES = 3 << 19
MIN_CHUNK = 1024


def run(call: Call) -> Tensor:
    """Run one grouped convolution; the result is as that of ``reference.run``.

    Half types are computed in float32 and rounded once, at the end.
    """
    call.check_padded()
    x, geometry, epilogue = call.x, call.geometry, call.epilogue
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type == "cpu" and not math.isfinite(call.weight.sum(dtype=torch.float64)):
        # Zeros around the input would make NaN of an infinite weight: rare, so not worth masks.
        return reference.run(call)
    grid = _grid(geometry)
    planes = _planes(x, grid, call.in_block, sums)
    shape = (geometry.out_channels, grid.n * grid.height * grid.width)
    if planes.channels_last:
        out = planes.data.new_empty(shape[::-1]).t()
    else:
        out = planes.data.new_empty(shape)
    with_sums = epilogue.scale is None  # the first product of a tile brings the bias along
    _accumulate(out, planes, grid, call, epilogue.bias if with_sums else None)

    view = out.as_strided(
        (grid.n, geometry.out_channels, grid.out_height, grid.out_width),
        (
            grid.height * grid.width * out.stride(1),
            out.stride(0),
            grid.width * out.stride(1),
            out.stride(1),
        ),
    )
    return finish(view, replace(epilogue, bias=None) if with_sums else epilogue, x.dtype)


@dataclass(frozen=True)
class _Grid:
    """The bordered pixel grid of one phase, on which outputs are computed.

    Attributes:
        n: images.
        height, width: rows and columns of the grid, from one image (row) to the next.
        out_height, out_width: the outputs, in the grid's upper left corner.
        taps: for each kernel tap, its (row phase, column phase) and its offset in the phase's grid.
        stride, padding: of the convolution.
    """

    n: int
    height: int
    width: int
    out_height: int
    out_width: int
    taps: tuple[tuple[tuple[int, int], int], ...]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]

    @property
    def pixels(self) -> int:
        """Grid pixels from the first to the last output; those in between that are none are cropped."""
        if not self.n:
            return 0
        return ((self.n - 1) * self.height + self.out_height - 1) * self.width + self.out_width

    @property
    def is_input(self) -> bool:
        """Whether the grid is the input itself: one tap, no stride, no border."""
        return len(self.taps) == 1 and self.stride == (1, 1) and not any(self.padding)


@functools.lru_cache(maxsize=1024)
def _grid(geometry: ConvGeometry) -> _Grid:
    n, h, w, kernel = geometry.batch, geometry.height, geometry.width, geometry.kernel
    (sh, sw), (top, bottom, left, right), (dh, dw) = geometry.stride, geometry.padding, geometry.dilation
    out_height, out_width = geometry.out_size
    if sh == sw == 1:
        # The zeros right of a row serve as the zeros left of the next one; images likewise. The outputs must
        # fit all the same, and they are the wider where the border exceeds the kernel's reach.
        height, width = max(h + max(top, bottom), out_height), max(w + max(left, right), out_width)
    else:
        height, width = -(-(h + top + bottom) // sh), -(-(w + left + right) // sw)
    taps = tuple(
        ((r * dh % sh, s * dw % sw), r * dh // sh * width + s * dw // sw)
        for r, s in product(range(kernel[0]), range(kernel[1]))
    )
    return _Grid(n, height, width, out_height, out_width, taps, (sh, sw), (top, bottom, left, right))


@dataclass(frozen=True)
class _Planes:
    """The bordered input, one flat matrix [channels, pixels] per phase.

    Attributes:
        data: the matrices' memory.
        starts: for each phase, where its matrix starts in ``data``, in elements.
        strides: elements from one channel, and from one pixel, to the next.
        channels_last: whether neighbouring channels are adjacent.
    """

    data: Tensor
    starts: dict[tuple[int, int], int]
    strides: tuple[int, int]
    channels_last: bool


def _planes(x: Tensor, grid: _Grid, in_block: int, dtype: torch.dtype) -> _Planes:
    n, channels, h, w = x.shape
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    padded_channels = -(-channels // in_block) * in_block
    if grid.is_input and channels == padded_channels and x.dtype == dtype:
        if channels_last:
            return _Planes(x, {(0, 0): int(x.storage_offset())}, (1, channels), True)
        if n == 1 and x.is_contiguous():
            return _Planes(x, {(0, 0): int(x.storage_offset())}, (h * w, 1), False)

    phases = sorted({phase for phase, _ in grid.taps})
    image = grid.height * grid.width
    # Shared borders leave the last row's own border to the slack.
    rows = max(n * image, grid.pixels + max(offset for _, offset in grid.taps))
    strides = (1, padded_channels) if channels_last else (rows, 1)
    data = torch.zeros(len(phases) * rows * padded_channels, dtype=dtype, device=x.device)
    starts = {phase: index * rows * padded_channels for index, phase in enumerate(phases)}
    top, _, left, _ = grid.padding
    for (row, column), start in starts.items():
        # Grid row i of this phase is input row i * stride + row - top.
        first_row, first_column = -((row - top) // grid.stride[0]), -((column - left) // grid.stride[1])
        first_row, first_column = max(first_row, 0), max(first_column, 0)
        source = x[
            :,
            :,
            first_row * grid.stride[0] + row - top :: grid.stride[0],
            first_column * grid.stride[1] + column - left :: grid.stride[1],
        ]
        target = data.as_strided(
            source.shape,
            (image * strides[1], strides[0], grid.width * strides[1], strides[1]),
            start + (first_row * grid.width + first_column) * strides[1],
        )
        target.copy_(source)
    return _Planes(data, starts, strides, channels_last)


@dataclass(frozen=True)
class _Tile:
    """One tile as the loop wants it.

    Attributes:
        runs: its entries as (entry, row of the packed weight, how many neighbouring blocks of one tap).
        columns: columns of the packed weight in use.
        segments: runs of adjacent filters as (first filter, first column, how many).
    """

    runs: tuple[tuple[int, int, int], ...]
    columns: int
    segments: tuple[tuple[int, int, int], ...]

    @property
    def direct(self) -> bool:
        """Whether the tile's outputs lie side by side, so that products can be written in place."""
        return len(self.segments) == 1 and self.segments[0][1] == 0


@functools.lru_cache(maxsize=1024)
def _read_tiles(
    tile_ptr: bytes, entries: bytes, filters: bytes, in_blocks: int, taps: int, out_channels: int
) -> tuple[_Tile, ...]:
    """Decode the tables (their int32 bytes, so that equal tables are decoded once)."""
    ptr = np.frombuffer(tile_ptr, np.int32).tolist()
    codes = np.frombuffer(entries, np.int32).tolist()
    columns_of = np.frombuffer(filters, np.int32).reshape(len(ptr) - 1, -1).tolist()
    check_tables(ptr, codes, columns_of, taps * in_blocks, out_channels)
    tiles = []
    for t, row_filters in enumerate(columns_of):
        runs: list[tuple[int, int, int]] = []
        expected = -1
        for row in range(ptr[t], ptr[t + 1]):
            entry = codes[row]
            if entry == expected and entry % in_blocks:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((entry, row, 1))
            expected = entry + 1
        segments: list[tuple[int, int, int]] = []
        for column, f in enumerate(row_filters):
            if f < 0:
                continue
            first, first_column, count = segments[-1] if segments else (-1, -1, 0)
            if segments and (f, column) == (first + count, first_column + count):
                segments[-1] = (first, first_column, count + 1)
            else:
                segments.append((f, column, 1))
        columns = segments[-1][1] + segments[-1][2] if segments else 0
        tiles.append(_Tile(tuple(runs), columns, tuple(segments)))
    return tuple(tiles)


def _accumulate(
    out: Tensor,
    planes: _Planes,
    grid: _Grid,
    call: Call,
    bias: Tensor | None,
) -> None:
    """Write bias plus products of every tile into ``out`` [O, grid pixels]."""
    in_block, width, in_blocks, tables = call.in_block, call.tile_width, call.in_blocks, call.tables
    tile_ptr, entries, filters = (table.cpu().numpy().tobytes() for table in tables)
    tiles = _read_tiles(tile_ptr, entries, filters, in_blocks, len(grid.taps), out.shape[0])
    biases: Sequence[Tensor | None] = [None] * len(tiles)
    if bias is not None:
        biases = bias.to(out.dtype)[tables[2].clamp(min=0)].unsqueeze(2).unbind(0)
    weight = call.weight.to(out.dtype).contiguous()
    # One unbind makes a view per entry in a quarter of the time that slicing takes.
    weights = weight.transpose(1, 2).unbind(0)
    channel_step, pixel_step = planes.strides

    chunk = max(MIN_CHUNK, CACHED_BYTES // ((in_block + width) * out.element_size()))
    for start in range(0, grid.pixels, chunk):
        pixels = min(chunk, grid.pixels - start)
        bases = [planes.starts[phase] + (offset + start) * pixel_step for phase, offset in grid.taps]
        inputs: list[Tensor] = []
        for base in bases:
            inputs += planes.data.as_strided(
                (in_blocks, in_block, pixels), (in_block * channel_step, channel_step, pixel_step), base
            ).unbind(0)
        for tile, column_bias in zip(tiles, biases, strict=True):
            if tile.direct:
                first, _, count = tile.segments[0]
                target = out[first : first + count, start : start + pixels]
            else:
                target = _like(out, tile.columns, pixels)
            if column_bias is not None:
                column_bias = column_bias[: tile.columns]
            for number, (entry, row, blocks) in enumerate(tile.runs):
                if blocks == 1:
                    x, w = inputs[entry], weights[row]
                else:
                    depth = blocks * in_block
                    base = bases[entry // in_blocks] + entry % in_blocks * in_block * channel_step
                    x = planes.data.as_strided((depth, pixels), (channel_step, pixel_step), base)
                    w = weight[row : row + blocks].view(depth, width).t()
                if tile.columns < width:
                    w = w[: tile.columns]
                if number:
                    target.addmm_(w, x)
                elif column_bias is None:
                    torch.mm(w, x, out=target)
                else:
                    torch.addmm(column_bias, w, x, out=target)
            if not tile.runs and column_bias is None:
                target.zero_()
            elif not tile.runs and column_bias is not None:
                target.copy_(column_bias.expand_as(target))
            if not tile.direct:
                for first, begin, count in tile.segments:
                    out[first : first + count, start : start + pixels] = target[begin : begin + count]


def _like(out: Tensor, rows: int, pixels: int) -> Tensor:
    """Return new memory [rows, pixels] with the order of strides of ``out``."""
    if out.stride(0) == 1:
        return out.new_empty((pixels, rows)).t()
    return out.new_empty((rows, pixels))


BACKEND = Backend(
    "torch",
    devices=("cpu", "cuda"),
    dtypes=("float32", "float16", "bfloat16", "float64"),
    run=run,
    auto={"cpu": 1},
    price=TORCH,
)
