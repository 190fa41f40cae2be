"""Block masks out of structured zeros: what planning needs from a network that was pruned elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

IN_BLOCKS = (8, 16, 32, 64, 128)
OUT_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)

# Blocks may cover this much more than the live weights: a chance zero must not force smaller blocks.
SLACK = 1.02
# Below this share of zero blocks, a sparse kernel has nothing to win over a dense one.
LEAST_SPARSITY = 0.1


@dataclass(frozen=True, eq=False)
class Blocks:
    """The zeros of one weight, in blocks.

    Attributes:
        in_block, out_block: the block sizes.
        mask: boolean [filter groups, input blocks, kh, kw]; a block lives if one of its weights does.
        density: share of the weights in live blocks.
    """

    in_block: int
    out_block: int
    mask: np.ndarray
    density: float


def infer_blocks(live: np.ndarray) -> Blocks | None:
    """Find the blocks in which a weight's zeros lie.

    Among blocks of 8 to 128 input channels and 1 to 128 filters, capped by the weight's sizes, those that
    cover hardly more than the live weights are equivalent descriptions: the largest one wins, since it has
    the fewest patterns and the widest tiles. Where none covers them that well, the tightest wins, if enough
    blocks are zero. Whole filters and whole kernel positions that were pruned fall out as special cases.

    Args:
        live: boolean [O, I, kh, kw], True where the weight is not zero.

    Returns:
        The blocks, or None where fewer than a tenth of the weights lie in zero blocks.
    """
    out_channels, in_channels = live.shape[:2]
    density = float(live.mean())
    best: Blocks | None = None
    for out_block in _capped(OUT_BLOCKS, out_channels):
        rows = np.logical_or.reduceat(live, np.arange(0, out_channels, out_block), axis=0)
        filters = _sizes(out_channels, out_block)
        for in_block in _capped(IN_BLOCKS, in_channels):
            mask = np.logical_or.reduceat(rows, np.arange(0, in_channels, in_block), axis=1)
            covered = np.einsum("g,gbrs,b->", filters, mask, _sizes(in_channels, in_block))
            found = Blocks(in_block, out_block, mask, float(covered) / live.size)
            if best is None or _better(found, best, density):
                best = found
    return None if best is None or best.density > 1 - LEAST_SPARSITY else best


def _better(a: Blocks, b: Blocks, density: float) -> bool:
    tight_a, tight_b = (x.density <= density * SLACK for x in (a, b))
    if tight_a and tight_b:
        return (a.in_block * a.out_block, a.in_block) > (b.in_block * b.out_block, b.in_block)
    if tight_a or tight_b:
        return tight_a
    return a.density < b.density


def _capped(sizes: tuple[int, ...], channels: int) -> list[int]:
    return sorted({min(size, channels) for size in sizes})


def _sizes(channels: int, block: int) -> np.ndarray:
    sizes = np.full(math.ceil(channels / block), block, dtype=np.float64)
    sizes[-1] = channels - block * (len(sizes) - 1)
    return sizes
