import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import QUICK, layer, topologies

from lhc_triton.planning import ConvGeometry, LayerTopology


def test_geometry_counts_what_a_convolution_computes():
    geometry = ConvGeometry(2, 3, 8, 11, 9, (3, 5), (2, 1), (1, 0, 2, 1), (2, 1))
    assert (geometry.out_height, geometry.out_width) == (4, 8)
    assert geometry.out_pixels == 2 * 4 * 8
    assert geometry.weights == 8 * 3 * 15
    assert geometry.macs == geometry.weights * geometry.out_pixels
    assert geometry.in_values == 2 * 3 * 11 * 9
    assert geometry.out_values == 2 * 8 * 4 * 8


def test_entries_are_numbered_tap_by_tap():
    mask = np.zeros((1, 2, 2, 3), dtype=bool)
    mask[0, 1, 1, 2] = True  # tap 1 * 3 + 2, block 1
    topology = LayerTopology.from_mask("a", ConvGeometry(1, 10, 4, 8, 8, (2, 3)), 8, 4, mask)
    assert topology.patterns == ((5 * 2 + 1,),)
    assert topology.entry_channels(11) == range(8, 10)
    assert topology.entries == 12


def test_equal_patterns_are_one_pattern_in_order_of_first_use():
    topology = layer([[0, 2], [1], [0, 2], []])
    assert topology.patterns == ((0, 2), (1,), ())
    assert topology.group_pattern == (0, 1, 0, 2)


@QUICK
@given(topologies())
def test_a_topology_gives_its_mask_back(topology):
    again = LayerTopology.from_mask(
        topology.name, topology.geometry, topology.in_block, topology.out_block, topology.block_mask()
    )
    assert again == topology


@QUICK
@given(topologies())
def test_live_weights_are_those_of_the_expanded_mask(topology):
    geometry = topology.geometry
    mask = topology.block_mask().repeat(topology.out_block, 0).repeat(topology.in_block, 1)
    live = mask[: geometry.out_channels, : geometry.in_channels].sum()
    assert topology.live_weights == live
    assert topology.live_macs == live * geometry.out_pixels
    assert topology.density == pytest.approx(live / geometry.weights)


@pytest.mark.parametrize(
    ("block", "part"), [(128, 128), (256, 128), (384, 128), (192, 64), (200, 100), (129, 43), (131, 1)]
)
def test_wide_blocks_are_split_into_equal_parts(block, part):
    rng = np.random.default_rng(0)
    geometry = ConvGeometry(1, 300, 500, 8, 8, (1, 1))
    mask = rng.random((-(-500 // block), -(-300 // block), 1, 1)) < 0.5
    wide = LayerTopology.from_mask("a", geometry, block, block, mask)
    split = wide.split(128)
    assert (split.in_block, split.out_block) == (part, part)
    assert split.live_weights == wide.live_weights
    dense = [t.block_mask().repeat(t.out_block, 0).repeat(t.in_block, 1)[:500, :300] for t in (wide, split)]
    np.testing.assert_array_equal(*dense)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"layer 'a': the block mask has shape \(2, 1, 3, 3\), expected"):
        LayerTopology.from_mask("a", ConvGeometry(1, 32, 16, 8, 8), 32, 16, np.ones((2, 1, 3, 3), bool))


@QUICK
@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 50), st.floats(0, 1))
def test_a_mask_comes_back_from_its_topology_and_cropped_blocks_count_exactly(seed, filters, channels, share):
    geometry = ConvGeometry(2, channels, filters, 7, 8, (2, 3))
    mask = np.random.default_rng(seed).random((-(-filters // 16), -(-channels // 32), 2, 3)) < share
    topology = LayerTopology.from_mask("a", geometry, 32, 16, mask)
    np.testing.assert_array_equal(topology.block_mask(), mask)
    live = sum(mask[o // 16, i // 32].sum() for o in range(filters) for i in range(channels))
    assert topology.live_weights == live
    assert topology.density == live / (filters * channels * 6)
