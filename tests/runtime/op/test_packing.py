"""Canonical blocks and the tile packing."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from op_problems import Problem, plan_by_hand, problems

from lhc_triton.planning.schema import ConvGeometry, LayerPlan, LayerTopology, Tile
from lhc_triton.runtime.op.packing import (
    blocks_from_weight,
    live_pairs,
    pack,
    pack_blocks,
    weight_from_blocks,
)

GEOMETRY = ConvGeometry(1, 7, 10, 5, 5)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_blocks_keep_the_live_weights_and_nothing_else(problem):
    topology = problem.layer.topology
    blocks = blocks_from_weight(topology, problem.weight)
    assert torch.equal(weight_from_blocks(topology, blocks), problem.weight * problem.mask)
    groups, entries = live_pairs(topology)
    assert blocks.shape == (len(groups), topology.out_block, topology.in_block)
    assert [*zip(groups, entries, strict=True)] == sorted(zip(groups, entries, strict=True))
    for block, group, entry in zip(blocks, groups.tolist(), entries.tolist(), strict=True):
        filters, channels = topology.group_filters(group), topology.entry_channels(entry)
        r, s = divmod(entry // topology.in_blocks, topology.geometry.kernel[1])
        want = problem.weight[filters.start : filters.stop, channels.start : channels.stop, r, s]
        assert torch.equal(block[: len(filters), : len(channels)], want)
        assert block.count_nonzero() == want.count_nonzero()


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_packed_tiles_hold_each_filter_once_in_its_column(problem):
    layer, topology = problem.layer, problem.layer.topology
    packed = problem.packed()
    tile_ptr, entries, filters = (table.numpy() for table in packed.tables)
    assert all(table.dtype == torch.int32 for table in packed.tables)
    assert filters.shape == (len(layer.tiles), layer.tile_width)
    assert entries[-1] == 0
    assert len(entries) == tile_ptr[-1] + 1
    live = filters[filters >= 0]
    assert tuple(live) == layer.filter_order
    dense = torch.zeros_like(problem.weight)
    for t, tile in enumerate(layer.tiles):
        rows = range(tile_ptr[t], tile_ptr[t + 1])
        assert tuple(entries[rows.start : rows.stop]) == tile.entries
        for row in rows:
            channels = topology.entry_channels(int(entries[row]))
            r, s = divmod(int(entries[row]) // topology.in_blocks, topology.geometry.kernel[1])
            assert not packed.weight[row, len(channels) :].any()
            for column, f in enumerate(filters[t]):
                values = packed.weight[row, : len(channels), column]
                if f < 0:
                    assert not values.any()
                else:
                    dense[f, channels.start : channels.stop, r, s] = values
    assert torch.equal(dense, problem.weight * problem.mask)


def test_packing_blocks_equals_packing_the_weight():
    problem = Problem(GEOMETRY, groups_per_tile=2, shuffle=True)
    blocks = blocks_from_weight(problem.layer.topology, problem.weight)
    one, other = pack_blocks(problem.layer, blocks), pack(problem.layer, problem.weight)
    assert torch.equal(one.weight, other.weight)
    assert all(torch.equal(a, b) for a, b in zip(one.tables, other.tables, strict=True))


def test_the_asked_type_and_device_are_given():
    problem = Problem(GEOMETRY)
    packed = pack(problem.layer, problem.weight, torch.float16, "meta", backend="triton")
    assert packed.weight.dtype == torch.float16
    assert packed.weight.device.type == "meta"
    assert all(table.device.type == "meta" for table in packed.tables)
    packed = pack(problem.layer, problem.weight, device="meta", backend="torch")
    assert all(table.device.type == "cpu" for table in packed.tables), (
        "the torch backend reads them on the host"
    )


def test_packing_does_not_track_gradients():
    problem = Problem(GEOMETRY)
    packed = pack(problem.layer, torch.nn.Parameter(problem.weight))
    assert not packed.weight.requires_grad


def test_a_large_layer_packs_at_once():
    geometry = ConvGeometry(1, 512, 512, 7, 7)
    mask = np.random.default_rng(0).random((32, 16, 3, 3)) < 0.1
    layer = plan_by_hand(geometry, mask, 32, 16)
    packed = pack(layer, torch.randn(512, 512, 3, 3))
    assert packed.weight.shape == (mask.sum(), 32, 16)


def layer_with(tiles: tuple[Tile, ...], width: int = 8) -> LayerPlan:
    mask = np.ones((3, 1, 3, 3), dtype=bool)
    return LayerPlan(LayerTopology.from_mask("c1", GEOMETRY, 8, 4, mask), tiles, width, "torch", "by hand")


EVERY = tuple(range(9))
GOOD = (Tile((0, 2), EVERY), Tile((1,), EVERY))


@pytest.mark.parametrize(
    ("tiles", "width", "message"),
    [
        ((Tile((0, 1), EVERY),), 8, "filter group 2 is in no tile"),
        ((Tile((0, 1), EVERY), Tile((1, 2), EVERY)), 8, "filter group 1 is in two tiles"),
        (GOOD, 4, "tile 0 holds more filters than its 4 columns"),
        ((Tile((0, 2), EVERY), Tile((1,), (0, 1))), 8, "the tile of filter group 1 lacks entries"),
        ((Tile((0, 2), (*EVERY, 9)), Tile((1,), EVERY)), 8, r"an entry outside 0\.\.8"),
        ((Tile((0, 2), (*EVERY, -1)), Tile((1,), EVERY)), 8, r"an entry outside 0\.\.8"),
        ((Tile((0, 3), EVERY), Tile((1, 2), EVERY)), 8, r"filter group 3, outside 0\.\.2"),
        ((Tile((0, 2), (*EVERY, 4)), Tile((1,), EVERY)), 8, "tile 0 holds an entry twice"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tiles, width, message):
    weight = torch.randn(10, 7, 3, 3)
    pack(layer_with(GOOD), weight)
    with pytest.raises(ValueError, match=f"'c1': .*{message}"):
        pack(layer_with(tiles, width), weight)


def test_weights_of_another_layer_are_refused():
    layer = layer_with(GOOD)
    with pytest.raises(
        ValueError, match=r"'c1': the weight has shape \(10, 7, 1, 1\), expected \(10, 7, 3, 3\)"
    ):
        pack(layer, torch.zeros(10, 7, 1, 1))
    blocks = blocks_from_weight(layer.topology, torch.zeros(10, 7, 3, 3))
    with pytest.raises(ValueError, match=r"the blocks have shape \(26, 4, 8\), expected \(27, 4, 8\)"):
        pack_blocks(layer, blocks[1:])
    with pytest.raises(ValueError, match="the blocks have shape"):
        weight_from_blocks(layer.topology, blocks[:, 1:])
    wider = dataclasses.replace(layer.topology, in_block=4)
    with pytest.raises(ValueError, match="the blocks have shape"):
        weight_from_blocks(wider, blocks)
