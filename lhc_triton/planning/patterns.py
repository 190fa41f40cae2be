"""Block masks out of structured zeros: what planning needs from a network that was pruned elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .cost import CostModel
from .grouping import candidate_widths
from .plan import ConvGeometry

IN_BLOCKS = (8, 16, 32, 64, 128)
OUT_BLOCKS = (8, 16, 32, 64, 128)

# Blocks may cover this much more than the smallest ones do: a chance zero must not force smaller blocks.
SLACK = 1.02
# Tiles are rounded up to this many filters when judging whether zeros have any structure.
UNIT = 16
# With less than this share of the work to skip, a sparse kernel has nothing to win over a dense one.
LEAST_GAIN = 0.1


@dataclass(frozen=True, eq=False)
class Blocks:
    """The zeros of one weight, in blocks.

    Attributes:
        in_block, out_block: the block sizes.
        mask: boolean [filter groups, input blocks, kh, kw]; a block lives if one of its weights does.
        work: share of the dense work that exact batches of equal patterns leave, tiles rounded up to 16
            filters.
    """

    in_block: int
    out_block: int
    mask: np.ndarray
    work: float


def infer_blocks(
    live: np.ndarray, geometry: ConvGeometry, cost: CostModel, itemsize: int = 4
) -> Blocks | None:
    """Find the blocks in which a weight's zeros lie.

    Blocks of 8 to 128 input channels are tried. The filter block that goes with each is the largest of 8 to
    128 that covers hardly more than 8 filters do (smaller ones describe the same zeros with more patterns,
    and merging different patterns is the planner's task, which knows better partners than the neighbours),
    or a single filter where batches of equal filters are cheaper: that is how pruned filters, and groups
    whose filters are not adjacent, are found. Of these pairs the cheapest by the cost model wins, with equal
    patterns batched and no unions; ties go to the wider input block. Scattered single input channels cannot
    be skipped: no block of 8 is free of live ones.

    Args:
        live: boolean [O, I, kh, kw], True where the weight is not zero.
        geometry: the layer's shapes.
        cost: prices the blocks.
        itemsize: bytes per value.

    Returns:
        The blocks, or None where they leave more than nine tenths of the dense work: the zeros are too
        scattered for any block.
    """
    expected = (geometry.out_channels, geometry.in_channels, *geometry.kernel)
    if live.shape != expected:
        raise ValueError(f"the weight has shape {live.shape}, expected {expected}")
    rows = live.astype(bool, copy=False).reshape(*expected[:2], geometry.taps)
    best: tuple[float, int, int, np.ndarray] | None = None
    sizes = [size for size in IN_BLOCKS if size == IN_BLOCKS[0] or size < 2 * geometry.in_channels]
    for in_block in sizes:
        rows = _merge(rows, in_block if in_block == sizes[0] else 2, axis=1)
        out_block, mask = _adjacent_filters(rows, geometry, in_block)
        price = _price(mask, geometry, in_block, out_block, cost, itemsize)
        single = _price(rows, geometry, in_block, 1, cost, itemsize)
        if single * SLACK < price:
            price, out_block, mask = single, 1, rows
        if best is None or price <= best[0] * (1 + 1e-9):
            best = (price, in_block, out_block, mask)
    assert best is not None
    _, in_block, out_block, mask = best
    work = _work(mask, geometry, in_block, out_block)
    if work > 1 - LEAST_GAIN:
        return None
    return Blocks(in_block, out_block, mask.reshape(*mask.shape[:2], *geometry.kernel), work)


def _merge(live: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Join runs of ``count`` along an axis: a block lives if one of its parts does."""
    return np.logical_or.reduceat(live, np.arange(0, live.shape[axis], count), axis=axis)


def _adjacent_filters(rows: np.ndarray, geometry: ConvGeometry, in_block: int) -> tuple[int, np.ndarray]:
    """Return the largest filter block that covers hardly more than the smallest, with its mask."""
    size, mask = OUT_BLOCKS[0], _merge(rows, OUT_BLOCKS[0], axis=0)
    found, limit = (size, mask), _covered(mask, geometry, in_block, size) * SLACK
    while 2 * size <= OUT_BLOCKS[-1] and size < geometry.out_channels:
        size, mask = 2 * size, _merge(mask, 2, axis=0)
        if _covered(mask, geometry, in_block, size) > limit:
            break
        found = (size, mask)
    return found


def _covered(mask: np.ndarray, geometry: ConvGeometry, in_block: int, out_block: int) -> float:
    """Return the weights in live blocks."""
    filters = _sizes(geometry.out_channels, out_block)
    return float(filters @ mask.sum(axis=2) @ _sizes(geometry.in_channels, in_block))


def _sizes(channels: int, block: int) -> np.ndarray:
    first = np.arange(0, channels, block)
    return np.minimum(block, channels - first)


def _patterns(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of entries, and of filter groups, of each distinct pattern."""
    flat = np.packbits(mask.reshape(len(mask), -1), axis=1)
    counts = Counter(row.tobytes() for row in flat)
    entries = [sum(map(int.bit_count, pattern)) for pattern in counts]
    return np.array(entries), np.array(list(counts.values()))


def _price(
    mask: np.ndarray,
    geometry: ConvGeometry,
    in_block: int,
    out_block: int,
    cost: CostModel,
    itemsize: int,
) -> float:
    """Predict the us of exact batches, at the tile width where they are cheapest."""
    entries, groups = _patterns(mask)
    group = min(out_block, geometry.out_channels)
    prices = []
    for width in candidate_widths(out_block, geometry.out_channels):
        capacity = width // group
        full, rest = np.divmod(groups, capacity)
        filters = [count * group for count in range(capacity + 1)]
        times = cost.entry_times(geometry, in_block, filters, width, itemsize)
        times[0] = 0.0
        tiles = int(full.sum()) + np.count_nonzero(rest)
        prices.append(tiles * cost.tile_us + float(entries @ (full * times[capacity] + times[rest])))
    return min(prices)


def _work(mask: np.ndarray, geometry: ConvGeometry, in_block: int, out_block: int) -> float:
    entries, groups = _patterns(mask)
    filters = -(-groups * out_block // UNIT) * UNIT
    dense = -(-geometry.out_channels // UNIT) * UNIT * mask.shape[1] * mask.shape[2]
    return float(entries @ filters) / dense
