"""Partitions of a layer's tiles into unions: several ways to begin, and moves that improve each.

A part of k filter groups and n entries costs ``tile_us + n * entry_us[k]``. All functions take

    rows: bool [T, E], the entries of each tile.
    sizes: int [T], the filter groups of each tile.
    entry_us: float [capacity + 1], us per entry of a tile with so many groups (index 0 is not read).
    tile_us: us per tile.

and return a partition of range(T), each part ascending, parts by first index. They are deterministic.
"""

from __future__ import annotations

import numpy as np

Parts = list[list[int]]

# A merge must save more than this, so that rounding never merges two tiles for nothing.
MIN_SAVING_US = 1e-6
# What takes long is left out, or ends early, where there are many tiles: 2048 of them would take 6 s to merge
# pair by pair, and 0.1 s for each round of moves; and a layer has up to four widths.
MAX_PAIRWISE = 512
MAX_MOVED_ALL = 256
MAX_MOVED = 1024
MAX_ROUNDS = 50
MAX_COMPARED = 2**22  # pairs of tiles, in all rounds together
PROMISING = 1.1  # times the cheapest beginning's time, within which others are improved as well


def best_partition(rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float) -> Parts:
    """Return the cheapest partition found: three beginnings, improved by moves and swaps.

    Merging pairs misses what pays only in a full part, and fits its parts into the capacity badly. Filling
    parts one by one looks further ahead and leaves the last ones to chance. Cutting a chain is the plain rule
    that both have to beat: where tiles are padded, on a GPU, it did beat merging, by up to 7 %.
    """
    count = len(rows)
    if count == 1:
        return [[0]]
    starts = [fill_by_overlap, cut_by_likeness]
    if count <= MAX_PAIRWISE:
        starts.insert(0, merge_by_savings)
    begun = [start(rows, sizes, entry_us, tile_us) for start in starts]
    times = [partition_us(parts, rows, sizes, entry_us, tile_us) for parts in begun]
    least = min(times)
    if count > MAX_MOVED_ALL:
        begun = [begun[times.index(least)]]
    else:
        begun = [parts for parts, us in zip(begun, times, strict=True) if us <= PROMISING * least]
    if count > MAX_MOVED:
        return begun[0]
    different = [parts for place, parts in enumerate(begun) if parts not in begun[:place]]
    moved = [move_by_savings(parts, rows, sizes, entry_us, tile_us) for parts in different]
    return min(moved, key=lambda parts: partition_us(parts, rows, sizes, entry_us, tile_us))


def partition_us(
    parts: Parts, rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float
) -> float:
    """Return what a partition costs, in us."""
    holders, groups = _filled(_homes(parts), rows.astype(np.float32), sizes)
    return len(parts) * tile_us + float(np.count_nonzero(holders, axis=1) @ entry_us[groups])


def _homes(parts: Parts) -> np.ndarray:
    """Return the part of each tile, int [T]."""
    home = np.empty(sum(map(len, parts)), dtype=np.int64)
    home[np.concatenate(parts)] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return home


def _filled(
    home: np.ndarray, live: np.ndarray, sizes: np.ndarray, spare: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tiles of each part have an entry [parts, E], and its groups; spare parts are empty."""
    count = int(home.max()) + 1 + spare
    holders = (np.arange(count)[:, None] == home).astype(np.float32) @ live
    return holders, np.bincount(home, sizes, count).astype(np.int64)


def merge_by_savings(rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float) -> Parts:
    """Merge tiles pairwise, the largest saving first, until no merge saves time.

    Merging two adds up their groups and takes the union of their entries. The matrix of pair savings is kept
    up to date row by row, with each row's best partner, so one merge costs O(tiles x entries). Ties go to the
    pair with the lowest indices.
    """
    count, capacity = len(rows), len(entry_us) - 1
    parts: Parts = [[i] for i in range(count)]
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
        better = ~stale & ((row > best) | ((row == best) & (keep < partner)))
        partner[better], best[better] = keep, row[better]
        again = np.flatnonzero(stale)
        partner[again] = table[again].argmax(axis=1)
        best[again] = table[again, partner[again]]


def fill_by_overlap(rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float) -> Parts:
    """Fill one part after the other with the tiles that add the fewest entries, as far as that saves time.

    A part begins with the longest tile that is left and grows until it is full; then it is cut back to where
    it saved most. So a part may grow through members that do not pay by themselves, which no merging of pairs
    would look at. O(parts x tiles x entries) in all.
    """
    capacity = len(entry_us) - 1
    columns = np.ascontiguousarray(rows.T).astype(np.float32)
    entries = columns.sum(axis=0)
    alone = (entries * entry_us[sizes] + tile_us).tolist()
    prices, groups_of = entry_us.tolist(), sizes.tolist()
    smallest, largest = int(sizes.min()), int(sizes.max())
    free = entries.copy()  # -1 where a tile has its part
    parts: Parts = []
    while free[tile := int(free.argmax())] >= 0:
        part, missing, groups, separate = [tile], ~rows[tile], groups_of[tile], alone[tile]
        length = int(entries[tile])
        free[tile] = -1
        # What each tile would add; columns[x].sum(axis=0) without the time it takes to call that.
        extra = np.where(free < 0, np.inf, entries - np.add.reduce(columns[rows[tile]]))
        best, keep = MIN_SAVING_US, 1
        while groups + smallest <= capacity:
            fits = (
                extra if groups + largest <= capacity else np.where(groups + sizes <= capacity, extra, np.inf)
            )
            tile = int(fits.argmin())
            if fits[tile] == np.inf:
                break
            part.append(tile)
            extra[tile] = np.inf
            added = (rows[tile] & missing).nonzero()[0]
            if len(added):
                extra -= np.add.reduce(columns[added])
                missing[added] = False
                length += len(added)
            groups += groups_of[tile]
            separate += alone[tile]
            saving = separate - tile_us - length * prices[groups]
            if saving > best:
                best, keep = saving, len(part)
        free[part[:keep]] = -1
        parts.append(sorted(part[:keep]))
    return sorted(parts)


def cut_by_likeness(rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float) -> Parts:
    """Cut a chain of tiles, each one followed by the one most like it, wherever a part is full."""
    capacity = len(entry_us) - 1
    live = rows.astype(np.float32)
    entries, shared = live.sum(axis=1), live @ live.T
    free = np.ones(len(rows), dtype=bool)
    tile, filled = int(entries.argmax()), capacity
    parts: Parts = []
    for _ in range(len(rows)):
        if filled + sizes[tile] > capacity:
            parts.append([])
            filled = 0
        parts[-1].append(tile)
        filled += int(sizes[tile])
        free[tile] = False
        tile = int(np.where(free, entries - 2 * shared[tile], np.inf).argmin())
    return sorted(sorted(part) for part in parts)


def move_by_savings(
    parts: Parts, rows: np.ndarray, sizes: np.ndarray, entry_us: np.ndarray, tile_us: float
) -> Parts:
    """Improve a partition: move a tile to another part or a part of its own, or swap two, while that saves.

    In each round the savings of all moves and swaps are computed at once, as products of matrices, and every
    tile names its best; the largest are made whose parts no larger one has touched.

    Args:
        parts: a partition of range(T).
        rows: see above, as the others.
        sizes: as there.
        entry_us: as there.
        tile_us: as there.

    Returns:
        A partition that costs no more.
    """
    tiles, capacity = np.arange(len(rows)), len(entry_us) - 1
    live = rows.astype(np.float32)
    entries = live.sum(axis=1)
    prices, fixed = np.append(entry_us, 0.0), np.full(capacity + 2, tile_us)
    fixed[0], fixed[-1] = 0.0, np.inf  # nothing is free, and more than the capacity has no room
    home = _homes(parts)

    def cost(union: np.ndarray, groups: np.ndarray) -> np.ndarray:
        groups = np.minimum(groups, capacity + 1)
        return union * prices[groups] + fixed[groups]

    for _ in range(min(MAX_ROUNDS, MAX_COMPARED // len(rows) ** 2)):
        holders, groups = _filled(home, live, sizes, spare=1)  # for a part of one's own
        union = (holders > 0).astype(np.float32)
        lengths = union.sum(axis=1)
        own = cost(lengths, groups)
        rest = (holders[home] - live > 0).astype(np.float32)  # each tile's part without it
        rest_lengths, rest_groups = rest.sum(axis=1), groups[home] - sizes

        relief = own[home] - cost(rest_lengths, rest_groups)
        joined = cost(lengths + entries[:, None] - live @ union.T, groups + sizes[:, None])
        moves = relief[:, None] + own - joined
        moves[tiles, home] = -np.inf
        target = moves.argmax(axis=1)
        # A tile's part with the other in its place; the transpose is the other's part with the tile.
        placed = cost(rest_lengths[:, None] + entries - rest @ live.T, rest_groups[:, None] + sizes)
        swaps = own[home][:, None] + own[home] - placed - placed.T
        swaps[home[:, None] == home] = -np.inf
        other = swaps.argmax(axis=1)

        by_move, by_swap = moves[tiles, target], swaps[tiles, other]
        saving = np.maximum(by_move, by_swap)
        order = [t for t in np.argsort(-saving, kind="stable").tolist() if saving[t] > MIN_SAVING_US]
        if not order:
            break
        touched = np.zeros(len(groups), dtype=bool)
        before = home.copy()
        for tile in order:
            swapped = by_swap[tile] > by_move[tile]
            source, place = before[tile], before[other[tile]] if swapped else target[tile]
            if touched[source] or touched[place]:
                continue
            touched[[source, place]] = True
            home[tile] = place
            if swapped:
                home[other[tile]] = source
        home = np.unique(home, return_inverse=True)[1]
    ends = np.cumsum(np.bincount(home))[:-1]
    return sorted(part.tolist() for part in np.split(np.argsort(home, kind="stable"), ends))
