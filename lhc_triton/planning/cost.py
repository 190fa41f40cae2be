"""What a layer costs: the one place where device numbers live, used by the planner and by dispatch.

The model is deliberately small, so that it can be calibrated by changing numbers. For a layer with tiles
``t`` of ``e(t)`` entries and ``f(t)`` filters, over P output pixels of the batch:

    sparse = launch + moving inputs, outputs and weights + sum over tiles (tile_us + e(t) * entry(f(t)))
    entry  = entry_us + read + sums + compute
             read:    P * in_block values at entry_gbs, and in_block * f weights for every weight_pixels
             sums:    P * f values, read and written, at sum_gbs
             compute: P * in_block * f MACs at rate(f)
             (fewer than spread_pixels do not keep all cores busy: sums and compute take up to twice as long)
    dense  = dense_launch + max(MACs at the dense rate, bytes moved at memory_gbs)

A backend that does these one after the other (matrix products in torch) pays their sum; where they overlap (a
pipelined GPU kernel, which keeps its sums in registers) the longest one counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np

from .schema import ConvGeometry, LayerTopology, OtherWork, Tile

_T = TypeVar("_T")

ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def itemsize_of(dtype: str) -> int:
    """Return the bytes per value of a compute type named as torch does; ValueError if it is not supported."""
    if dtype not in ITEMSIZES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(ITEMSIZES)}")
    return ITEMSIZES[dtype]


@dataclass(frozen=True)
class CostModel:
    """Predicts the time of one layer on one kind of device.

    Attributes:
        device: the device kind, "cpu" or "cuda".
        sparse_backend: the backend whose time ``sparse_us`` predicts.
        source: where the numbers come from, for people.
        dense_gmacs: (bytes per value, 1e9 MACs/s) of the best dense convolution.
        sparse_gmacs: (bytes per value, ((filters in a tile, 1e9 MACs/s), ...)) of a tile's arithmetic, by
            rising tile width; widths in between are interpolated, narrower ones cost as the narrowest.
        memory_gbs: 1e9 bytes/s from main memory.
        entry_gbs: 1e9 bytes/s at which a tile reads the pixels of one entry.
        sum_gbs: 1e9 bytes/s at which a tile reads and writes its sums, once for each entry.
        launch_us, dense_launch_us: us per layer call, sparse and dense, however little work there is.
        weight_pixels: pixels that a tile reads the weights of an entry for; with 0 they stay at hand.
        tile_us: us per tile.
        entry_us: us per entry of a tile.
        spread_pixels: pixels from which a tile's arithmetic runs at its full rate; with fewer it is slower in
            proportion, down to half the rate.
        overlap: whether reads, sums and arithmetic hide behind each other.
        pads_tiles: whether a tile that is not full costs as much as a full one.
        copies_input: whether the backend first copies the input into a zero border (an image that needs none
            is read where it is), and then computes on all pixels of the bordered image.
        skips_border: whether taps that lie outside the image cost nothing.
        takes_dense: whether the backend may also run layers that have no zeros.
        min_block: channels that an entry costs at the least (the K side of the device's matrix unit).
        margin: a sparse backend is chosen only below ``margin`` x the predicted dense time.
    """

    device: str
    sparse_backend: str
    source: str
    dense_gmacs: tuple[tuple[int, float], ...]
    sparse_gmacs: tuple[tuple[int, tuple[tuple[int, float], ...]], ...]
    memory_gbs: float
    entry_gbs: float
    sum_gbs: float
    launch_us: float
    dense_launch_us: float
    tile_us: float
    entry_us: float
    overlap: bool
    pads_tiles: bool
    copies_input: bool
    takes_dense: bool = False
    skips_border: bool = False
    min_block: int = 1
    weight_pixels: int = 0
    spread_pixels: int = 0
    margin: float = 1.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"cost model {item.name} = {value}: expected a finite number >= 0")
        for name in ("memory_gbs", "entry_gbs", "sum_gbs", "margin"):
            if getattr(self, name) <= 0:
                raise ValueError(f"cost model {name} = {getattr(self, name)}: expected a number above 0")
        rates = [rate for _, rate in self.dense_gmacs]
        for _, table in self.sparse_gmacs:
            widths = [width for width, _ in table]
            if not widths or widths != sorted(set(widths)) or widths[0] < 1:
                raise ValueError(f"cost model sparse_gmacs has tile widths {widths}: expected rising widths")
            rates += [rate for _, rate in table]
        if not self.dense_gmacs or not self.sparse_gmacs or any(not rate > 0 for rate in rates):
            raise ValueError("cost model rates must not be empty, and each one above 0")

    @classmethod
    def for_device(cls, device: str, backend: str = "auto", tf32: bool = True) -> CostModel:
        """Return the model that prices a backend on a device kind.

        Args:
            device: "cpu" or "cuda".
            backend: one that a model of this device prices; any other name, "auto" among them, stands for
                the device's fastest sparse backend.
            tf32: whether a GPU may round products of float32 to TF32, dense and sparse alike.

        Raises:
            ValueError: for another device kind.
        """
        models = [model for model in COST_MODELS.values() if model.device == device]
        if not models:
            known = ", ".join(sorted({model.device for model in COST_MODELS.values()}))
            raise ValueError(
                f"no cost model for device {device!r}; supported: {known}; else give cost=CostModel(...)"
            )
        model = next((model for model in models if model.sparse_backend == backend), models[0])
        return TRITON_IEEE if model is TRITON and not tf32 else model

    def scaled(self, dense: float, sparse: float, source: str) -> CostModel:
        """Return the model of a machine that takes so many times as long, dense and sparse.

        Args:
            dense: factor on the time of dense convolutions, memory traffic apart.
            sparse: the same for the sparse backend.
            source: where the factors come from.
        """
        return replace(
            self,
            source=source,
            dense_gmacs=tuple((size, rate / dense) for size, rate in self.dense_gmacs),
            dense_launch_us=self.dense_launch_us * dense,
            sparse_gmacs=tuple(
                (size, tuple((width, rate / sparse) for width, rate in table))
                for size, table in self.sparse_gmacs
            ),
            entry_gbs=self.entry_gbs / sparse,
            sum_gbs=self.sum_gbs / sparse,
            launch_us=self.launch_us * sparse,
            tile_us=self.tile_us * sparse,
            entry_us=self.entry_us * sparse,
        )

    def dense_us(self, geometry: ConvGeometry, itemsize: int = 4) -> float:
        """Predict the time in us of the dense convolution, for values of ``itemsize`` bytes."""
        compute = geometry.macs / self._dense_rate(itemsize)
        values = geometry.in_values + geometry.out_values + geometry.weights
        return self.dense_launch_us + max(compute, values * itemsize / (self.memory_gbs * 1e3))

    def other_us(self, work: OtherWork, itemsize: int = 4) -> float:
        """Predict the time in us of other work: its arithmetic at the dense rate, or its way from memory."""
        compute = work.macs / self._dense_rate(itemsize)
        return max(compute, work.moved_bytes / (self.memory_gbs * 1e3))

    def _dense_rate(self, itemsize: int) -> float:
        """Return the MACs per us of a dense convolution."""
        size, rate = _nearest(self.dense_gmacs, itemsize)
        return rate * size / max(size, itemsize) * 1e3

    def layer_us(self, geometry: ConvGeometry, itemsize: int = 4) -> float:
        """Predict the us of a sparse call apart from its launch and tiles: moving inputs and outputs."""
        values = geometry.in_values + geometry.out_values
        as_it_is = geometry.taps == 1 and geometry.stride == (1, 1) and not any(geometry.padding)
        if self.copies_input and not as_it_is:
            (sh, sw), pixels = geometry.stride, self._pixels(geometry)
            values += (
                geometry.in_channels * pixels * min(sh, geometry.kernel[0]) * min(sw, geometry.kernel[1])
            )
        return values * itemsize / (self.memory_gbs * 1e3)

    def _pixels(self, geometry: ConvGeometry) -> int:
        """Return the pixels that a tile computes: the outputs, or all of the bordered image at the stride."""
        if not self.copies_input:
            return geometry.out_pixels
        top, bottom, left, right = geometry.padding
        sh, sw = geometry.stride
        # At stride 1, one row's border serves the next row as well.
        rows = geometry.height + (max(top, bottom) if sh == sw == 1 else top + bottom)
        columns = geometry.width + (max(left, right) if sh == sw == 1 else left + right)
        return max(geometry.out_pixels, geometry.batch * math.ceil(rows / sh) * math.ceil(columns / sw))

    def entry_times(
        self,
        geometry: ConvGeometry,
        in_block: int,
        filters: Sequence[int],
        tile_width: int,
        itemsize: int = 4,
    ) -> np.ndarray:
        """Predict the us of one entry of a tile, for each count of filters in the tile (float64 array)."""
        size, table = _nearest(self.sparse_gmacs, itemsize)
        widths, rates = zip(*table, strict=True)
        counts = np.asarray(filters, dtype=np.float64)
        if self.pads_tiles:
            counts = np.full_like(counts, tile_width)
        counts = np.maximum(counts, widths[0])
        pixels = self._pixels(geometry) * (_inside(geometry) if self.skips_border else 1.0)
        values = pixels * max(in_block, self.min_block)
        rate = np.interp(counts, widths, rates) * (size / max(size, itemsize))
        compute = values * counts / (rate * 1e3)
        sums = 2 * pixels * counts * itemsize / (self.sum_gbs * 1e3)
        rereads = counts / self.weight_pixels if self.weight_pixels else 0.0
        read = values * (1 + rereads) * itemsize / (self.entry_gbs * 1e3)
        slower = min(2.0, max(1.0, self.spread_pixels / max(pixels, 1)))
        compute, sums = compute * slower, sums * slower
        if self.overlap:
            return self.entry_us + np.maximum(np.maximum(compute, sums), read)
        return self.entry_us + compute + sums + read

    def tiles_us(
        self, topology: LayerTopology, tiles: Sequence[Tile], tile_width: int, itemsize: int = 4
    ) -> float:
        """Predict the time in us of a layer's tiles, one after the other."""
        filters = [sum(len(topology.group_filters(g)) for g in tile.groups) for tile in tiles]
        times = self.entry_times(topology.geometry, topology.in_block, filters, tile_width, itemsize)
        entries = (len(tile.entries) * us for tile, us in zip(tiles, times.tolist(), strict=True))
        return len(tiles) * self.tile_us + math.fsum(entries)

    def sparse_us(
        self, topology: LayerTopology, tiles: Sequence[Tile], tile_width: int, itemsize: int = 4
    ) -> float:
        """Predict the time in us of a layer that runs as these tiles, by ``sparse_backend``."""
        work = self.tiles_us(topology, tiles, tile_width, itemsize)
        weights = sum(len(tile.entries) for tile in tiles) * topology.in_block * tile_width
        move = self.layer_us(topology.geometry, itemsize) + weights * itemsize / (self.memory_gbs * 1e3)
        return self.launch_us + (max(work, move) if self.overlap else work + move)


@functools.lru_cache(maxsize=1024)
def _inside(geometry: ConvGeometry) -> float:
    """Return the share of (output pixel, tap) pairs whose input pixel lies in the image."""
    share = 1.0
    sizes = (geometry.height, geometry.width)
    for axis, outputs in enumerate((geometry.out_height, geometry.out_width)):
        firsts = np.arange(outputs)[:, None] * geometry.stride[axis] - geometry.padding[2 * axis]
        taps = firsts + np.arange(geometry.kernel[axis]) * geometry.dilation[axis]
        share *= float(((taps >= 0) & (taps < sizes[axis])).mean())
    return share


def _nearest(table: Sequence[tuple[int, _T]], itemsize: int) -> tuple[int, _T]:
    """Return the row for values of this size: the same, else the next wider, else the widest there is."""
    rows = sorted(table, key=lambda row: row[0])
    return next((row for row in rows if row[0] >= itemsize), rows[-1])


# Fitted, by least squares of relative errors, to 117 layer calls of the torch backend: 13 shapes from
# 64->64@56 to 512->512@7 (3x3, 1x1, stride 2), in_block 8 to 128, tiles of 16 to 128 filters, density 0.1
# and 0.3, float32, 2 cores of a Xeon with AVX-512 and AMX. Each time is the least of several calls, since
# the machine was shared. The model is off by 15 % (rms), and picks the faster of sparse and dense in 108 of
# them. The arithmetic rate did not depend on the tile's width: what hurts narrow tiles is what they read,
# and their number. The dense convolution, in its faster layout, did 142 to 216 GMAC/s. In bfloat16 it did
# 620 to 1320 GMAC/s (AMX), while the torch backend computes half types in float32; so dense wins there.
TORCH = CostModel(
    device="cpu",
    sparse_backend="torch",
    source="measured on 2 cores of a Xeon with AVX-512 and AMX, torch 2.13",
    dense_gmacs=((2, 1000.0), (4, 190.0)),
    sparse_gmacs=((4, ((16, 178.0),)),),
    memory_gbs=10.0,
    entry_gbs=117.0,
    sum_gbs=93.0,
    launch_us=35.0,
    dense_launch_us=20.0,
    tile_us=4.7,
    entry_us=1.8,
    spread_pixels=1000,
    overlap=False,
    pads_tiles=False,
    copies_input=True,
    margin=0.9,
)

# H100 on paper, modelled and not measured. Every tile reads its activations from L2, and each program of 128
# pixels its weights: half as much again with 64 filters, as much again with 128. At 5.5 TB/s that bounds
# tiles of 16, 64 and 128 fp16 filters near 78, 235 and 352 TFLOP/s of useful work, while a dense convolution
# reaches 70 % of the 800 TFLOP/s peak: at density 0.2 and 0.3 tiles of 128 promise 3.1 and 2.1 times its
# speed, tiles of 64 2.1 and 1.4 times, tiles of 16 no gain. Float32 products are TF32's, as torch's are by
# default. Memory moves 3 TB/s. Sums stay in registers.
TRITON = CostModel(
    device="cuda",
    sparse_backend="triton",
    source="an H100 on paper: modelled, not measured",
    dense_gmacs=((1, 560e3), (2, 280e3), (4, 140e3)),
    sparse_gmacs=((1, ((16, 560e3),)), (2, ((16, 280e3),)), (4, ((16, 140e3),))),
    memory_gbs=3000.0,
    entry_gbs=5500.0,
    weight_pixels=128,
    sum_gbs=1e9,
    launch_us=5.0,
    dense_launch_us=5.0,
    tile_us=0.02,
    entry_us=0.0,
    overlap=True,
    pads_tiles=True,
    copies_input=False,
    min_block=16,
    margin=0.9,
)

# Without TF32, products of float32 are plain multiply-adds, dense and sparse: 70 % of 33e3 GMAC/s.
TRITON_IEEE = replace(
    TRITON,
    dense_gmacs=(*TRITON.dense_gmacs[:2], (4, 23e3)),
    sparse_gmacs=(*TRITON.sparse_gmacs[:2], (4, ((16, 23e3),))),
)

# Fitted, by least squares of relative errors, to 315 layer calls of the native kernel and 45 dense ones
# (prepacked weights): 3x3, 7x7, 1x1, stride 2, 3 to 2048 channels, batch 1, 8 and 64, blocks 32x16, 32x64
# and 128x16, density 0.05 to 1, float32, 2 cores of an EPYC (Zen 4) with AVX-512. Off by 19 % and 12 %
# (rms). Taps outside the image cost nothing, what a tile reads stays in the caches, and a vector that lacks
# filters costs as much as a full one.
NATIVE = CostModel(
    device="cpu",
    sparse_backend="native",
    source="measured on 2 cores of an EPYC (Zen 4) with AVX-512, torch 2.13",
    dense_gmacs=((2, 230.0), (4, 114.0)),
    sparse_gmacs=((4, ((16, 103.0), (32, 114.0))),),
    memory_gbs=46.0,
    entry_gbs=1e9,
    sum_gbs=1e9,
    launch_us=3.0,
    dense_launch_us=60.0,
    tile_us=0.09,
    entry_us=0.0,
    overlap=False,
    pads_tiles=False,
    copies_input=False,
    takes_dense=True,
    skips_border=True,
    margin=0.95,
)

COST_MODELS = {model.sparse_backend: model for model in (NATIVE, TORCH, TRITON)}
"""By the backend they price; on each device kind the fastest backend first."""
