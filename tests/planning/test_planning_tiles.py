import dataclasses
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import CPU, CUDA, QUICK, random_layer, topologies

from lhc_triton.planning import LayerTopology, plan_layer
from lhc_triton.planning.grouping import candidate_widths, form_tiles

# Tiles, entries and sums are free, and a wide tile computes no faster: a union can only lose.
FREE = dataclasses.replace(
    CPU, tile_us=0.0, entry_us=0.0, entry_gbs=1e12, sum_gbs=1e12, sparse_gmacs=((4, ((1, 50.0),)),)
)


def computed(planned):
    """The weights that the tiles compute, as counts [O, I, kh, kw], written without the plan's methods."""
    topology, geometry = planned.topology, planned.topology.geometry
    kh, kw = geometry.kernel
    counts = np.zeros((geometry.out_channels, geometry.in_channels, kh, kw), dtype=int)
    for tile in planned.tiles:
        for group in tile.groups:
            rows = slice(group * topology.out_block, (group + 1) * topology.out_block)
            for entry in tile.entries:
                tap, block = divmod(entry, -(-geometry.in_channels // topology.in_block))
                columns = slice(block * topology.in_block, (block + 1) * topology.in_block)
                counts[rows, columns, tap // kw, tap % kw] += 1
    return counts


@QUICK
@given(topologies(), st.sampled_from([CPU, CUDA]))
def test_the_tiles_compute_every_live_weight_once_and_are_charged_for_what_they_compute(topology, cost):
    planned, geometry = plan_layer(topology, cost), topology.geometry
    counts = computed(planned)
    live = topology.block_mask().repeat(topology.out_block, 0).repeat(topology.in_block, 1)
    assert (counts[live[: geometry.out_channels, : geometry.in_channels]] == 1).all()
    assert counts.max(initial=0) <= 1
    assert planned.planned_macs == counts.sum() * geometry.out_pixels


@QUICK
@given(topologies(), st.data())
def test_equal_patterns_take_as_few_tiles_as_they_fit_in(topology, data):
    width = data.draw(st.sampled_from(candidate_widths(topology.out_block, topology.geometry.out_channels)))
    capacity = width // min(topology.out_block, topology.geometry.out_channels)
    tiles = Counter(tile.entries for tile in form_tiles(topology, FREE, width))
    groups = Counter(topology.pattern_of(group) for group in range(topology.groups))
    for pattern in groups:
        assert tiles[pattern] == -(-groups[pattern] // capacity)
    assert set(tiles) == set(groups)


@QUICK
@given(topologies(), st.sampled_from([CPU, CUDA]), st.randoms(use_true_random=False))
def test_tiles_do_not_depend_on_how_the_patterns_are_numbered(topology, cost, random):
    order = list(range(len(topology.patterns)))
    random.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    other = LayerTopology(
        topology.name,
        topology.geometry,
        topology.in_block,
        topology.out_block,
        tuple(topology.patterns[old] for old in order),
        tuple(place[index] for index in topology.group_pattern),
    )
    assert plan_layer(other, cost).tiles == plan_layer(topology, cost).tiles


def test_the_last_group_may_be_smaller_and_comes_once_in_the_order():
    topology = random_layer(0, groups=5, out_block=16)
    cropped = dataclasses.replace(topology, geometry=dataclasses.replace(topology.geometry, out_channels=67))
    planned = plan_layer(cropped, CPU)
    assert sorted(planned.filter_order) == list(range(67))
    assert len(cropped.group_filters(4)) == 3
