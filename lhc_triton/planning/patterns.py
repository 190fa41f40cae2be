"""Block masks out of structured zeros: what planning needs from a network that was pruned elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

IN_BLOCKS = (8, 16, 32, 64, 128)
NARROW_BLOCKS = (4, 2, 1)
OUT_BLOCKS = (8, 16, 32, 64, 128)

# Blocks may cover this much more than the smallest ones do: a chance zero must not force smaller blocks.
SLACK = 1.02
# An entry costs as much as its channels and this many more: a tile's sums are read and written once for each
# entry, which takes the torch backend the time of 7 channels' arithmetic on a CPU (see cost.TORCH).
ENTRY_CHANNELS = 8
# Narrow blocks cost more for what they hold: they have to be the zeros' own, with this share of live weights.
NARROW_FIT = 0.75
# Below this share of the work to skip, a sparse kernel has nothing to win over a dense one.
LEAST_GAIN = 0.1


@dataclass(frozen=True, eq=False)
class Blocks:
    """The zeros of one weight, in blocks.

    Attributes:
        in_block, out_block: the block sizes.
        mask: boolean [filter groups, input blocks, kh, kw]; a block lives if one of its weights does.
        work: share of the dense work that batches of equal patterns leave, batches rounded up to 8 filters.
        fit: share of live weights in the blocks that live.
    """

    in_block: int
    out_block: int
    mask: np.ndarray
    work: float
    fit: float


def infer_blocks(live: np.ndarray) -> Blocks | None:
    """Find the blocks in which a weight's zeros lie.

    Blocks of 8 to 128 input channels are tried. The filter block that goes with each is the largest of 8 to
    128 that covers hardly more than 8 filters do: smaller ones describe the same zeros with more patterns,
    and merging different patterns is the planner's task, which finds better partners than the neighbours.
    Where batches of equal single filters leave less work than that, blocks of one filter are taken: that is
    how pruned filters are found, and filters of one pattern that are not adjacent. Of these pairs the one
    with the least work wins, where each entry counts its channels and 8 more; ties go to the wider block.
    The rule does not ask for the device, so a network has one topology on all of them.

    Kernel positions and runs of input channels that are gone fall out as special cases. Where these blocks
    hold many zeros, those of 4, 2 and 1 channels are tried, and taken if they hold few: so input channels are
    found that are gone here and there, and kernels that are kept whole for some adjacent filters (1xN).

    Args:
        live: boolean [O, I, kh, kw], True where the weight is not zero.

    Returns:
        The blocks, or None where they leave more than nine tenths of the dense work: the zeros are too
        scattered for blocks.
    """
    blocks = best_blocks(live)
    return blocks if blocks.work <= 1 - LEAST_GAIN else None


def best_blocks(live: np.ndarray) -> Blocks:
    """Return the blocks that `infer_blocks` finds, however much work they leave."""
    wide = _cheapest(live, [size for size in IN_BLOCKS if size == IN_BLOCKS[0] or size < 2 * live.shape[1]])
    if wide.fit >= NARROW_FIT:
        return wide
    narrow = (_cheapest(live, [size]) for size in NARROW_BLOCKS)
    return next((b for b in narrow if b.fit >= NARROW_FIT and b.work < wide.work), wide)


def _cheapest(live: np.ndarray, sizes: list[int]) -> Blocks:
    """Return the blocks of the least price; each size is twice the one before."""
    out_channels, in_channels, kh, kw = live.shape
    rows = live.astype(bool, copy=False).reshape(out_channels, in_channels, kh * kw)
    best: tuple[float, int, int, np.ndarray] | None = None
    for in_block in sizes:
        rows = _merge(rows, in_block if in_block == sizes[0] else 2, axis=1)
        out_block, mask = _adjacent_filters(rows, live.shape, in_block)
        work, single = _work(mask, out_block, out_channels), _work(rows, 1, out_channels)
        if single * SLACK < work:
            work, out_block, mask = single, 1, rows
        price = work * (in_block + ENTRY_CHANNELS)
        if best is None or price <= best[0]:
            best = (price, in_block, out_block, mask)
    assert best is not None
    _, in_block, out_block, mask = best
    dense = _padded(out_channels) * mask.shape[1] * mask.shape[2]
    covered = _covered(mask, live.shape, in_block, out_block)
    return Blocks(
        in_block,
        out_block,
        mask.reshape(*mask.shape[:2], kh, kw),
        _work(mask, out_block, out_channels) / dense,
        float(live.sum()) / covered if covered else 1.0,
    )


def _merge(live: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Join runs of ``count`` along an axis: a block lives if one of its parts does."""
    parts = np.moveaxis(live, axis, 0)
    merged = parts[::count].copy(order="K")
    for place in range(1, count):  # several times faster than reduceat
        part = parts[place::count]
        merged[: len(part)] |= part
    return np.moveaxis(merged, 0, axis)


def _adjacent_filters(rows: np.ndarray, shape: tuple[int, ...], in_block: int) -> tuple[int, np.ndarray]:
    """Return the largest filter block that covers hardly more than the smallest, with its mask."""
    size, mask = OUT_BLOCKS[0], _merge(rows, OUT_BLOCKS[0], axis=0)
    found, limit = (size, mask), _covered(mask, shape, in_block, size) * SLACK
    while 2 * size <= OUT_BLOCKS[-1] and size < shape[0]:
        size, mask = 2 * size, _merge(mask, 2, axis=0)
        if _covered(mask, shape, in_block, size) > limit:
            break
        found = (size, mask)
    return found


def _covered(mask: np.ndarray, shape: tuple[int, ...], in_block: int, out_block: int) -> float:
    """Return the weights in live blocks."""
    filters, channels = _sizes(shape[0], out_block), _sizes(shape[1], in_block)
    return float(filters @ mask.sum(axis=2) @ channels)


def _sizes(channels: int, block: int) -> np.ndarray:
    return np.minimum(block, channels - np.arange(0, channels, block))


def _work(mask: np.ndarray, out_block: int, out_channels: int) -> float:
    """Return filters x entries of the batches of equal patterns."""
    rows = np.packbits(mask.reshape(len(mask), -1), axis=1)
    width, data = rows.shape[1], rows.tobytes()
    patterns = [data[start : start + width] for start in range(0, len(data), width)]
    filters = {pattern: count * out_block for pattern, count in Counter(patterns).items()}
    filters[patterns[-1]] -= len(mask) * out_block - out_channels  # the last block may be smaller
    return sum(int.from_bytes(pattern).bit_count() * _padded(count) for pattern, count in filters.items())


def _padded(filters: int) -> int:
    return -(-filters // OUT_BLOCKS[0]) * OUT_BLOCKS[0]
