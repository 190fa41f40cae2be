"""Other ways to form tiles, which the planner has to beat: plain rules, pairs alone, and the optimum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.grouping import exact_batches, form_tiles
from lhc_triton.planning.partitions import MAX_PAIRWISE, cut_by_likeness, merge_by_savings
from lhc_triton.planning.schema import LayerTopology, Tile

MAX_EXHAUSTIVE = 10
"""Filter groups up to which the best partition is found: of 3^groups candidates."""

Form = Callable[[LayerTopology, CostModel, int, int], tuple[Tile, ...]]


def no_merge(topology: LayerTopology, cost: CostModel, width: int, itemsize: int = 4) -> tuple[Tile, ...]:
    """Make a tile of every filter group."""
    return tiles_of(topology, ((group,) for group in range(topology.groups)))


def equal_patterns(
    topology: LayerTopology, cost: CostModel, width: int, itemsize: int = 4
) -> tuple[Tile, ...]:
    """Batch filter groups of one pattern, and merge nothing else."""
    return tiles_of(topology, exact_batches(topology, _capacity(topology, width)))


def merge_all(topology: LayerTopology, cost: CostModel, width: int, itemsize: int = 4) -> tuple[Tile, ...]:
    """Fill tiles with the filter groups as they lie."""
    return _cut(topology, range(topology.groups), width)


def sort_and_cut(topology: LayerTopology, cost: CostModel, width: int, itemsize: int = 4) -> tuple[Tile, ...]:
    """Put filter groups in a chain, each followed by the one most like it, and cut it into full tiles."""
    rows, sizes = _rows(topology), np.ones(topology.groups, dtype=np.int64)
    prices = np.zeros(_capacity(topology, width) + 1)  # a cut does not ask what anything costs
    return tiles_of(topology, cut_by_likeness(rows, sizes, prices, 0.0))


pairwise: Form = partial(form_tiles, partition=merge_by_savings)
"""Merge the two tiles that save most, again and again: the planner without the rest of it."""


def exhaustive(topology: LayerTopology, cost: CostModel, width: int, itemsize: int = 4) -> tuple[Tile, ...]:
    """Find the best tiles there are at a width, by dynamic programming over sets of filter groups.

    Raises:
        ValueError: more than `MAX_EXHAUSTIVE` filter groups.
    """
    groups = topology.groups
    if groups > MAX_EXHAUSTIVE:
        raise ValueError(f"{groups} filter groups are too many for all partitions: up to {MAX_EXHAUSTIVE}")
    prices = cost.entry_times(topology.geometry, topology.in_block, range(width + 1), width, itemsize)
    if not cost.overlap:  # the weights' way from memory adds to an entry's time
        prices = prices + topology.in_block * width * itemsize / (cost.memory_gbs * 1e3)
    unions = np.zeros((1 << groups, topology.entries), dtype=bool)  # by set of groups, a bit each
    filters = np.zeros(1 << groups, dtype=np.int64)
    for index, row in enumerate(_rows(topology)):
        bit = 1 << index
        unions[bit : 2 * bit] = unions[:bit] | row
        filters[bit : 2 * bit] = filters[:bit] + len(topology.group_filters(index))
    tile_us = cost.tile_us + unions.sum(axis=1) * prices[np.minimum(filters, width)]
    tile_us[filters > width] = np.inf
    best, taken = np.zeros(1 << groups), np.zeros(1 << groups, dtype=np.int64)
    for chosen in range(1, 1 << groups):
        last = 1 << (chosen.bit_length() - 1)  # the tile that holds the last group, with any of the others
        rest = chosen ^ last
        others = np.zeros(1, dtype=np.int64)
        for index in range(groups):
            if rest >> index & 1:
                others = np.concatenate([others, others | 1 << index])
        times = tile_us[others | last] + best[rest ^ others]
        place = int(times.argmin())
        best[chosen], taken[chosen] = times[place], int(others[place]) | last
    parts, left = [], (1 << groups) - 1
    while left:
        tile = int(taken[left])
        parts.append([index for index in range(groups) if tile >> index & 1])
        left ^= tile
    return tiles_of(topology, parts)


PLANNER, EXHAUSTIVE = "planner", "exhaustive"
METHODS: dict[str, Form] = {
    "no merge": no_merge,
    "equal patterns": equal_patterns,
    "merge all": merge_all,
    "sort and cut": sort_and_cut,
    "pairs": pairwise,
    PLANNER: form_tiles,
    EXHAUSTIVE: exhaustive,
}
"""Ways to form tiles of one width, by name; each is tried at all widths, and its cheapest counts."""


def applies(method: str, topology: LayerTopology) -> bool:
    """Return whether a method ends in reasonable time."""
    if method == EXHAUSTIVE:
        return topology.groups <= MAX_EXHAUSTIVE
    return method != "pairs" or len(topology.patterns) <= MAX_PAIRWISE


def tiles_of(topology: LayerTopology, parts: Iterable[Sequence[int]]) -> tuple[Tile, ...]:
    """Make a tile of each set of filter groups, the longest first."""
    tiles = []
    for part in parts:
        entries = set().union(*(topology.pattern_of(group) for group in part))
        tiles.append(Tile(tuple(sorted(part)), tuple(sorted(entries))))
    return tuple(sorted(tiles, key=lambda tile: (-len(tile.entries), tile.groups)))


def _capacity(topology: LayerTopology, width: int) -> int:
    return width // min(topology.out_block, topology.geometry.out_channels)


def _cut(topology: LayerTopology, order: Sequence[int], width: int) -> tuple[Tile, ...]:
    size = _capacity(topology, width)
    return tiles_of(topology, (order[first : first + size] for first in range(0, len(order), size)))


def _rows(topology: LayerTopology) -> np.ndarray:
    """Return the entries of each filter group, bool [groups, entries]."""
    return topology.block_mask().transpose(0, 2, 3, 1).reshape(topology.groups, -1)
