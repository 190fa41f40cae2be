"""Which filter groups run together: batches of equal patterns, then unions that the cost model likes."""

from __future__ import annotations

import numpy as np

from .cost import CostModel
from .schema import LayerTopology, Tile

TILE_WIDTHS = (16, 32, 64, 128)

# A merge must save more than this, so that rounding never merges two tiles for nothing.
MIN_SAVING_US = 1e-6
# Pairs are compared within runs of this many tiles, which bounds the savings matrix to 128 MiB.
MAX_PAIRWISE = 4096
# Partitions of so many tiles are improved by moves and swaps, at most so many.
MAX_MOVED = 16
MAX_MOVES = 200


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


def merge_by_savings(
    rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float
) -> list[list[int]]:
    """Merge tiles pairwise, the largest saving first, until no merge saves time.

    A tile of k groups and n entries costs ``tile_us + n * entry_us[k]``; merging two adds up their groups and
    takes the union of their entries. The matrix of pair savings is kept up to date row by row, with each
    row's best partner, so one merge costs O(tiles x entries). Ties go to the pair with the lowest indices.

    Args:
        rows: bool [T, E], the entries of each tile.
        sizes: int [T], the filter groups of each tile.
        entry_us: float [capacity + 1], us per entry of a tile with so many groups (index 0 is not read).
        tile_us: us per tile.

    Returns:
        The tiles' indices, merged: a partition of range(T), each part ascending, parts by first index.
    """
    count, capacity = len(rows), len(entry_us) - 1
    parts: list[list[int]] = [[i] for i in range(count)]
    if count < 2:
        return parts
    live = rows.astype(np.float32)  # float32 counts exactly up to 2**24 entries, and multiplies by BLAS
    sizes = sizes.astype(np.int64)
    entries = live.sum(axis=1, dtype=np.float64)
    entry_us = np.asarray(entry_us, dtype=np.float64)

    def savings(tile: int | slice, shared: np.ndarray) -> np.ndarray:
        both = sizes + (sizes[tile] if isinstance(tile, int) else sizes[:, None])
        mine = entries[tile] if isinstance(tile, int) else entries[:, None]
        own = cost[tile] if isinstance(tile, int) else cost[:, None]
        union = (mine + entries) - shared
        saved = (own + cost) + tile_us - union * entry_us[np.minimum(both, capacity)]
        return np.where(both <= capacity, saved, -np.inf)

    cost = entries * entry_us[sizes]
    table = savings(slice(None), live @ live.T)
    np.fill_diagonal(table, -np.inf)
    partner = table.argmax(axis=1)
    best = table[np.arange(count), partner]
    while True:
        keep = int(best.argmax())
        if not best[keep] > MIN_SAVING_US:
            return [sorted(part) for part in parts if part]
        gone = int(partner[keep])
        parts[keep] += parts[gone]
        parts[gone] = []
        np.maximum(live[keep], live[gone], out=live[keep])
        sizes[keep] += sizes[gone]
        entries[keep] = live[keep].sum(dtype=np.float64)
        cost[keep] = entries[keep] * entry_us[sizes[keep]]
        sizes[gone] = capacity + 1  # a tile that is gone fits with none
        table[gone, :] = table[:, gone] = -np.inf
        row = savings(keep, live @ live[keep])
        row[keep] = -np.inf
        table[keep, :] = table[:, keep] = row
        stale = (partner == keep) | (partner == gone)
        stale[keep] = stale[gone] = True
        better = (row > best) & ~stale
        partner[better], best[better] = keep, row[better]
        again = np.flatnonzero(stale)
        partner[again] = table[again].argmax(axis=1)
        best[again] = table[again, partner[again]]


def moved_by_savings(
    parts: list[list[int]], rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float
) -> list[list[int]]:
    """Improve a partition: move a tile to another part or a part of its own, or swap two, while that saves.

    Pairwise merging never undoes a merge, and may fill a part with the second best. A part of k groups and n
    entries costs ``tile_us + n * entry_us[k]``, as in `merge_by_savings`. In each round the best change of
    every tile is found, and the best of all is made.

    Args:
        parts: a partition of range(T), as `merge_by_savings` returns it.
        rows: as there.
        sizes: as there.
        entry_us: as there.
        tile_us: as there.

    Returns:
        A partition that costs no more, each part ascending, parts by first index.
    """
    count, capacity = len(rows), len(entry_us) - 1
    home = np.empty(count, dtype=np.int64)
    for index, part in enumerate(parts):
        home[part] = index
    counts = np.zeros((count, rows.shape[1]), dtype=np.int32)  # of the tiles of each part that have an entry
    groups = np.zeros(count, dtype=np.int64)
    np.add.at(counts, home, rows.astype(np.int32))
    np.add.at(groups, home, sizes)

    def cost(entries: np.ndarray, members: np.ndarray) -> np.ndarray:
        times = entries * entry_us[np.minimum(members, capacity)] + tile_us
        return np.where(members > capacity, np.inf, np.where(members > 0, times, 0.0))

    for _ in range(MAX_MOVES):
        present = counts > 0
        own = cost(present.sum(axis=1), groups)
        best_saving, best = MIN_SAVING_US, None
        for tile in range(count):
            source = int(home[tile])
            left = counts[source] - rows[tile]
            rest = groups[source] - sizes[tile]
            relief = own[source] - float(cost((left > 0).sum(), rest))
            joined = cost((present | rows[tile]).sum(axis=1), groups + sizes[tile])
            saving = relief + own - joined
            saving[source] = -np.inf
            target = int(saving.argmax())
            if saving[target] > best_saving:
                best_saving, best = float(saving[target]), (tile, target, -1)
            others = np.flatnonzero(home != source)
            if not len(others):
                continue
            places = home[others]
            mine = ((left + rows[others]) > 0).sum(axis=1)
            theirs = ((counts[places] - rows[others] + rows[tile]) > 0).sum(axis=1)
            after = cost(mine, rest + sizes[others]) + cost(
                theirs, groups[places] - sizes[others] + sizes[tile]
            )
            saving = own[source] + own[places] - after
            other = int(saving.argmax())
            if saving[other] > best_saving:
                best_saving, best = float(saving[other]), (tile, int(places[other]), int(others[other]))
        if best is None:
            break
        tile, target, other = best
        for moving, place in ((tile, target), (other, int(home[tile]))):
            if moving >= 0:
                counts[home[moving]] -= rows[moving]
                groups[home[moving]] -= sizes[moving]
                counts[place] += rows[moving]
                groups[place] += sizes[moving]
                home[moving] = place
    found = [np.flatnonzero(home == index).tolist() for index in range(count)]
    return sorted(part for part in found if part)


def _cut(rows: np.ndarray, sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Fill parts one after the other with the tiles in the order of their entries."""
    parts: list[list[int]] = []
    filled = capacity
    for tile in np.lexsort(rows.T[::-1]).tolist():
        if filled + sizes[tile] > capacity:
            parts.append([])
            filled = 0
        parts[-1].append(tile)
        filled += int(sizes[tile])
    return parts


def _cost(
    parts: list[list[int]], rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float
) -> float:
    return sum(tile_us + rows[part].any(axis=0).sum() * entry_us[sizes[part].sum()] for part in parts)


def form_tiles(
    topology: LayerTopology, cost: CostModel, tile_width: int, itemsize: int = 4
) -> tuple[Tile, ...]:
    """Form the tiles of a layer: equal patterns batched first, then unions while the model gains by them.

    Args:
        topology: the layer's patterns.
        cost: prices a union's wasted arithmetic against the reads and overheads it shares.
        tile_width: filters that a tile has room for, at least ``topology.out_block``.
        itemsize: bytes per value.

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
    for first in range(0, len(open_), MAX_PAIRWISE):
        run = open_[first : first + MAX_PAIRWISE]
        rows = np.zeros((len(run), topology.entries), dtype=bool)
        for row, batch in zip(rows, run, strict=True):
            row[list(topology.pattern_of(batch[0]))] = True
        sizes = np.array([len(batch) for batch in run])
        parts = merge_by_savings(rows, sizes, entry_us, cost.tile_us)
        if len(run) <= MAX_MOVED:
            starts = (parts, _cut(rows, sizes, capacity))
            parts = min(
                (moved_by_savings(start, rows, sizes, entry_us, cost.tile_us) for start in starts),
                key=lambda found: _cost(found, rows, sizes, entry_us, cost.tile_us),
            )
        for part in parts:
            groups = tuple(sorted(group for index in part for group in run[index]))
            tiles.append(Tile(groups, tuple(np.flatnonzero(rows[part].any(axis=0)).tolist())))
    return tuple(sorted(tiles, key=lambda tile: (-len(tile.entries), tile.groups)))
