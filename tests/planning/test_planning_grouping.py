import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import partitions
from planning_cases import CPU, CUDA, QUICK, layer, random_layer, topologies

from lhc_triton.planning import COST_MODELS, Tile
from lhc_triton.planning.grouping import candidate_widths, exact_batches, form_tiles
from lhc_triton.planning.planner import choose_tiles
from lhc_triton.planning.schema import ConvGeometry, LayerTopology

# Arithmetic is all that costs: a union can only lose.
ARITHMETIC = dataclasses.replace(
    CPU, launch_us=0.0, tile_us=0.0, entry_us=0.0, memory_gbs=1e9, entry_gbs=1e9,
    sparse_gmacs=((4, ((1, 50.0),)),),
)  # fmt: skip
# A tile costs more than anything in it: whatever fits is merged.
OVERHEAD = dataclasses.replace(ARITHMETIC, tile_us=1e9)


@QUICK
@given(topologies(), st.sampled_from(sorted(COST_MODELS)), st.data())
def test_tiles_partition_the_groups_and_hold_the_union_of_their_patterns(topology, backend, data):
    cost = COST_MODELS[backend]
    width = data.draw(st.sampled_from(candidate_widths(topology.out_block, topology.geometry.out_channels)))
    tiles = form_tiles(topology, cost, width)
    assert sorted(g for tile in tiles for g in tile.groups) == list(range(topology.groups))
    for tile in tiles:
        union = sorted({entry for g in tile.groups for entry in topology.pattern_of(g)})
        assert list(tile.entries) == union
        assert tile.groups == tuple(sorted(tile.groups))
        assert 0 < sum(len(topology.group_filters(g)) for g in tile.groups) <= width
    lengths = [len(tile.entries) for tile in tiles]
    assert lengths == sorted(lengths, reverse=True)


@QUICK
@given(topologies())
def test_tiles_stay_exact_where_no_union_pays(topology):
    width = candidate_widths(topology.out_block, topology.geometry.out_channels)[-1]
    for tile in form_tiles(topology, ARITHMETIC, width):
        assert {topology.pattern_of(group) for group in tile.groups} == {tile.entries}


def test_whatever_fits_is_merged_where_tiles_are_dear():
    topology = layer([[0], [1], [2], [3], [4]])
    assert form_tiles(topology, OVERHEAD, 128) == (Tile((0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),)
    assert [len(tile.groups) for tile in form_tiles(topology, OVERHEAD, 32)] == [2, 2, 1]


def test_equal_patterns_fill_tiles_before_any_union():
    topology = layer([[0, 1], [2], [0, 1], [2], [0, 1], [0, 1]])
    assert exact_batches(topology, 2) == [(0, 2), (4, 5), (1, 3)]
    assert form_tiles(topology, CPU, 32) == (
        Tile((0, 2), (0, 1)),
        Tile((4, 5), (0, 1)),
        Tile((1, 3), (2,)),
    )


def test_similar_patterns_meet_in_one_tile():
    topology = layer([[0, 1, 2], [5, 6, 7], [0, 1, 3], [5, 6, 8]], size=56)
    tiles = form_tiles(topology, CUDA, 32)
    assert tiles == (Tile((0, 2), (0, 1, 2, 3)), Tile((1, 3), (5, 6, 7, 8)))


def test_ties_go_to_the_lowest_groups():
    topology = layer([[0], [1], [2], [3]])
    assert form_tiles(topology, OVERHEAD, 32) == (Tile((0, 1), (0, 1)), Tile((2, 3), (2, 3)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", sorted(COST_MODELS))
def test_merging_never_makes_a_layer_dearer(seed, backend):
    cost, topology = COST_MODELS[backend], random_layer(seed, density=0.3)
    exact = [Tile((g,), topology.pattern_of(g)) for g in range(topology.groups)]
    merged = form_tiles(topology, cost, 64)
    assert cost.sparse_us(topology, merged, 64) <= cost.sparse_us(topology, exact, 64)


@pytest.mark.parametrize(
    ("out_block", "out_channels", "widths"),
    [
        (16, 512, (16, 32, 64, 128)),
        (16, 40, (16, 32, 64)),
        (16, 10, (16,)),
        (64, 512, (64, 128)),
        (24, 96, (32, 64, 128)),
        (100, 300, (128,)),
        (200, 800, (256,)),
        (1, 3, (16,)),
    ],
)
def test_tile_widths_hold_a_group_and_go_no_wider_than_the_layer(out_block, out_channels, widths):
    assert candidate_widths(out_block, out_channels) == widths


def test_a_tile_too_narrow_for_a_group_is_refused():
    with pytest.raises(ValueError, match="layer 'layer': tile width 16 has no room for one group of 32"):
        form_tiles(layer([[0], [1]], out_block=32), CPU, 16)


def test_many_groups_are_merged_in_runs(monkeypatch):
    monkeypatch.setattr("lhc_triton.planning.grouping.MAX_RUN", 5)
    topology = random_layer(0, groups=12)
    tiles = form_tiles(topology, OVERHEAD, 128)
    assert sorted(g for tile in tiles for g in tile.groups) == list(range(12))
    assert len(tiles) == 3


def tiles_of(topology, parts):
    return [Tile(tuple(p), tuple(sorted(set().union(*(topology.pattern_of(g) for g in p))))) for p in parts]


def small_layer(seed):
    """3 to 7 groups, some alike, of random sizes."""
    rng = np.random.default_rng(seed)
    groups, in_blocks, kernel = int(rng.integers(3, 8)), int(rng.integers(2, 9)), int(rng.choice([1, 3]))
    in_block, out_block = int(rng.choice([4, 8, 32])), int(rng.choice([8, 16, 32]))
    kinds = rng.random((int(rng.integers(1, 4)), in_blocks, kernel, kernel)) < rng.choice([0.1, 0.3, 0.7])
    mask = kinds[rng.integers(len(kinds), size=groups)]
    mask = mask ^ (rng.random(mask.shape) < rng.choice([0, 0.05, 0.2]))
    side = int(rng.choice([4, 7, 14, 28, 56]))
    geometry = ConvGeometry(
        int(rng.choice([1, 8])),
        in_block * in_blocks,
        out_block * groups,
        side,
        side,
        (kernel, kernel),
        (1, 1),
        (kernel // 2,) * 4,
    )
    return LayerTopology.from_mask("small", geometry, in_block, out_block, mask)


@pytest.mark.parametrize("backend", sorted(COST_MODELS))
def test_small_layers_are_planned_within_2_percent_of_the_best_there_is(backend):
    cost = COST_MODELS[backend]
    for seed in range(30):
        topology = small_layer(seed)
        best = float("inf")
        for width in candidate_widths(topology.out_block, topology.geometry.out_channels):
            capacity = width // min(topology.out_block, topology.geometry.out_channels)
            for parts in partitions(list(range(topology.groups))):
                if max(map(len, parts)) <= capacity:
                    best = min(best, cost.sparse_us(topology, tiles_of(topology, parts), width))
        assert choose_tiles(topology, cost)[2] <= 1.02 * best, seed


@pytest.mark.parametrize("backend", sorted(COST_MODELS))
@pytest.mark.parametrize("seed", range(4))
def test_no_simple_rule_plans_better(backend, seed):
    cost, topology = COST_MODELS[backend], random_layer(seed, in_blocks=8, groups=24, density=0.2)
    found = choose_tiles(topology, cost)[2]
    order = sorted(range(topology.groups), key=topology.pattern_of)
    for width in candidate_widths(topology.out_block, topology.geometry.out_channels):
        capacity = width // topology.out_block
        for groups in (1, capacity):
            for ranked in (range(topology.groups), order):  # merged as they lie, or sorted and cut
                parts = [sorted(list(ranked)[g : g + groups]) for g in range(0, topology.groups, groups)]
                assert found <= cost.sparse_us(topology, tiles_of(topology, parts), width) * (1 + 1e-9)
