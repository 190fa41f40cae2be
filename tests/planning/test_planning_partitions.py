import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import QUICK

from lhc_triton.planning.partitions import (
    best_partition,
    cut_by_likeness,
    fill_by_overlap,
    merge_by_savings,
    move_by_savings,
    partition_us,
)

STARTS = (merge_by_savings, fill_by_overlap, cut_by_likeness)


@st.composite
def problems(draw, most=14):
    """Rows, sizes, prices: some prices rise with the filters, some are those of padded tiles."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, capacity = draw(st.integers(1, most)), draw(st.integers(2, 6))
    rows = rng.random((count, 12)) < rng.uniform(0, 0.9)
    sizes = rng.integers(1, capacity, size=count)
    # dyadic prices make every sum exact, so that all ways see the same ties
    steps = rng.integers(0, 2, size=capacity + 1) if draw(st.booleans()) else rng.integers(1, 8, capacity + 1)
    return rows, sizes, 1 + np.cumsum(steps) / 8, float(rng.integers(0, 16)) / 8


def greedy(rows, sizes, entry_us, tile_us):
    """The same merging with the whole matrix computed anew each time."""
    parts = [[i] for i in range(len(rows))]
    rows, sizes = [set(np.flatnonzero(row)) for row in rows], list(sizes)
    capacity = len(entry_us) - 1
    while True:
        best = (1e-6, None)
        for i in range(len(parts)):
            for j in range(i + 1, len(parts)):
                if not parts[i] or not parts[j] or sizes[i] + sizes[j] > capacity:
                    continue
                union = len(rows[i] | rows[j])
                before = len(rows[i]) * entry_us[sizes[i]] + len(rows[j]) * entry_us[sizes[j]]
                saved = before + tile_us - union * entry_us[sizes[i] + sizes[j]]
                if saved > best[0]:
                    best = (saved, (i, j))
        if best[1] is None:
            return [sorted(part) for part in parts if part]
        i, j = best[1]
        parts[i] += parts[j]
        parts[j] = []
        rows[i] |= rows[j]
        sizes[i] += sizes[j]


@QUICK
@given(problems())
def test_the_incremental_matrix_merges_as_a_full_recomputation_does(problem):
    assert merge_by_savings(*problem) == greedy(*problem)


def test_a_merged_tile_that_ties_with_a_later_partner_takes_its_place():
    rows = np.zeros((7, 12), dtype=bool)
    for row, entries in enumerate(((), (2, 5), (1, 4, 7, 11), (3, 6, 7, 8, 9), (1, 10), (8, 11), ())):
        rows[row, list(entries)] = True
    problem = rows, np.array([1, 1, 1, 1, 2, 1, 1]), np.array([1.125, 1.25, 1.375, 1.375]), 0.125
    assert merge_by_savings(*problem) == greedy(*problem) == [[0, 3, 5], [1], [2, 4], [6]]


def price(parts, rows, sizes, entry_us, tile_us):
    """What a partition costs, part by part; infinite where one has no room."""
    groups = [int(sizes[part].sum()) for part in parts]
    if max(groups) >= len(entry_us):
        return np.inf
    return sum(
        tile_us + rows[part].any(axis=0).sum() * entry_us[k] for part, k in zip(parts, groups, strict=True)
    )


@QUICK
@given(problems())
def test_every_way_gives_a_partition_whose_parts_have_room(problem):
    rows, sizes, entry_us, _ = problem
    for way in (*STARTS, best_partition):
        parts = way(*problem)
        assert sorted(itertools.chain(*parts)) == list(range(len(rows)))
        assert parts == sorted(sorted(part) for part in parts)
        assert all(sizes[part].sum() < len(entry_us) for part in parts)
        assert parts == way(*problem)
        assert partition_us(parts, *problem) == pytest.approx(price(parts, *problem))


@QUICK
@given(problems())
def test_merging_and_filling_never_cost_more_than_no_union(problem):
    alone = price([[tile] for tile in range(len(problem[0]))], *problem)
    for way in (merge_by_savings, fill_by_overlap, best_partition):
        assert price(way(*problem), *problem) <= alone


@QUICK
@given(problems())
def test_the_best_is_as_good_as_every_beginning(problem):
    best = price(best_partition(*problem), *problem)
    assert all(best <= price(start(*problem), *problem) for start in STARTS)


def neighbours(parts, count):
    """Every partition that one move or one swap makes of a partition."""
    home = {tile: index for index, part in enumerate(parts) for tile in part}
    for tile in range(count):
        for place in range(len(parts) + 1):
            moved = {**home, tile: place}
            yield [[t for t in range(count) if moved[t] == index] for index in range(len(parts) + 1)]
        for other in range(tile):
            swapped = {**home, tile: home[other], other: home[tile]}
            yield [[t for t in range(count) if swapped[t] == index] for index in range(len(parts))]


@QUICK
@given(problems(most=8))
def test_after_the_moves_no_move_and_no_swap_saves(problem):
    for start in STARTS:
        begun = start(*problem)
        parts = move_by_savings(begun, *problem)
        found = price(parts, *problem)
        assert found <= price(begun, *problem)
        for other in neighbours(parts, len(problem[0])):
            assert price([part for part in other if part], *problem) >= found


def test_filling_sees_what_pays_only_when_a_tile_is_full():
    rows, sizes = np.ones((4, 10), dtype=bool), np.ones(4, dtype=np.int64)
    problem = (rows, sizes, np.array([0, 1.0, 2.5, 3.5, 3.5]), 0.0)  # two cost more together than apart
    assert merge_by_savings(*problem) == [[0], [1], [2], [3]]
    assert fill_by_overlap(*problem) == best_partition(*problem) == [[0, 1, 2, 3]]


def test_a_cut_follows_likeness():
    rows = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    problem = (rows, np.ones(4, dtype=np.int64), np.ones(3), 0.0)
    assert cut_by_likeness(*problem) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("count", [300, 600, 1100])
def test_many_tiles_are_partitioned_in_bounded_time_and_no_worse_than_by_filling(count):
    rng = np.random.default_rng(count)
    rows, sizes = rng.random((count, 32)) < 0.2, np.ones(count, dtype=np.int64)
    problem = (rows, sizes, np.full(9, 1.0), 0.1)
    parts = best_partition(*problem)
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert price(parts, *problem) <= price(fill_by_overlap(*problem), *problem)
