"""Which filter groups run together: batches of equal patterns, then unions that the cost model likes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .cost import CostModel
from .partitions import Parts, best_partition
from .schema import LayerTopology, Tile

TILE_WIDTHS = (16, 32, 64, 128)

# Unions are sought within runs of so many tiles.
MAX_RUN = 4096


def candidate_widths(out_block: int, out_channels: int) -> tuple[int, ...]:
    """Return the tile widths that suit a layer, in filters, rising.

    They are the powers of two from 16 to 128 that hold a filter group, up to the first that holds all
    filters; a group wider than 128 filters gets the next power of two.
    """
    group = min(out_block, out_channels)
    widths = [width for width in TILE_WIDTHS if width >= group]
    if not widths:
        return (1 << (group - 1).bit_length(),)
    enough = [width for width in widths if width >= out_channels]
    return tuple(width for width in widths if not enough or width <= enough[0])


def exact_batches(topology: LayerTopology, capacity: int) -> list[tuple[int, ...]]:
    """Split the filter groups into batches of one pattern and at most ``capacity`` groups."""
    members: list[list[int]] = [[] for _ in topology.patterns]
    for group, pattern in enumerate(topology.group_pattern):
        members[pattern].append(group)
    return [
        tuple(groups[first : first + capacity])
        for groups in members
        for first in range(0, len(groups), capacity)
    ]


def form_tiles(
    topology: LayerTopology,
    cost: CostModel,
    tile_width: int,
    itemsize: int = 4,
    partition: Callable[[np.ndarray, np.ndarray, np.ndarray, float], Parts] = best_partition,
) -> tuple[Tile, ...]:
    """Form the tiles of a layer: equal patterns batched first, then unions while the model gains by them.

    Args:
        topology: the layer's patterns.
        cost: prices a union's wasted arithmetic against the reads and overheads it shares.
        tile_width: filters that a tile has room for, at least ``topology.out_block``.
        itemsize: bytes per value.
        partition: forms the unions; see `partitions`.

    Returns:
        Tiles that hold each filter group once, longest first (ties: lowest group first).
    """
    group = min(topology.out_block, topology.geometry.out_channels)
    capacity = tile_width // group
    if capacity < 1:
        raise ValueError(
            f"layer {topology.name!r}: tile width {tile_width} has no room for one group of "
            f"{topology.out_block} filters"
        )
    batches = exact_batches(topology, capacity)
    full = [batch for batch in batches if len(batch) == capacity]
    open_ = sorted(
        (batch for batch in batches if len(batch) < capacity),
        key=lambda batch: (-len(topology.pattern_of(batch[0])), batch),
    )
    tiles = [Tile(batch, topology.pattern_of(batch[0])) for batch in full]
    # The last group may be smaller. Priced in full it has no pull of its own on the others.
    filters = [groups * group for groups in range(capacity + 1)]
    entry_us = cost.entry_times(topology.geometry, topology.in_block, filters, tile_width, itemsize)
    for first in range(0, len(open_), MAX_RUN):
        run = open_[first : first + MAX_RUN]
        rows = np.zeros((len(run), topology.entries), dtype=bool)
        for row, batch in zip(rows, run, strict=True):
            row[list(topology.pattern_of(batch[0]))] = True
        sizes = np.array([len(batch) for batch in run])
        parts = partition(rows, sizes, entry_us, cost.tile_us)
        for part in parts:
            groups = tuple(sorted(group for index in part for group in run[index]))
            tiles.append(Tile(groups, tuple(np.flatnonzero(rows[part].any(axis=0)).tolist())))
    return tuple(sorted(tiles, key=lambda tile: (-len(tile.entries), tile.groups)))
