import numpy as np
import pytest

from lhc_triton.planning.patterns import infer_blocks


def block_live(seed, groups, in_blocks, kernel, out_block, in_block, density=0.3):
    rng = np.random.default_rng(seed)
    mask = rng.random((groups, in_blocks, *kernel)) < density
    return mask.repeat(out_block, 0).repeat(in_block, 1)


@pytest.mark.parametrize("out_block", [8, 16, 32, 64])
@pytest.mark.parametrize("in_block", [16, 32, 64, 128])
def test_the_blocks_of_a_block_mask_are_found(out_block, in_block):
    live = block_live(0, 256 // out_block, 256 // in_block, (3, 3), out_block, in_block)
    blocks = infer_blocks(live)
    assert (blocks.in_block, blocks.out_block) == (in_block, out_block)
    np.testing.assert_array_equal(blocks.mask.repeat(out_block, 0).repeat(in_block, 1), live)


def test_blocks_that_the_channels_do_not_fill_are_found():
    live = block_live(1, 4, 3, (3, 3), 16, 32)[:50, :70]
    blocks = infer_blocks(live)
    assert (blocks.in_block, blocks.out_block) == (32, 16)
    assert blocks.mask.shape == (4, 3, 3, 3)


def test_a_few_chance_zeros_do_not_shrink_the_blocks():
    live = block_live(2, 8, 4, (3, 3), 16, 32)
    rng = np.random.default_rng(0)
    assert infer_blocks(live & (rng.random(live.shape) > 0.05)).in_block == 32
    assert infer_blocks(live & (rng.random(live.shape) > 0.05)).out_block == 16


def test_pruned_filters_are_found_wherever_they_are():
    rng = np.random.default_rng(3)
    live = np.ones((128, 64, 3, 3), dtype=bool)
    gone = rng.choice(128, 64, replace=False)
    live[gone] = False
    blocks = infer_blocks(live)
    assert blocks.out_block == 1
    assert blocks.work == pytest.approx(0.5)
    assert sorted({int(row.sum()) for row in blocks.mask}) == [0, blocks.mask[0].size]


def test_filters_of_one_pattern_are_found_where_they_are_not_adjacent():
    live = block_live(4, 4, 4, (3, 3), 32, 32)
    order = np.random.default_rng(0).permutation(len(live))
    blocks = infer_blocks(live[order])
    assert (blocks.in_block, blocks.out_block) == (32, 1)
    assert len({row.tobytes() for row in blocks.mask}) == 4


def test_kernel_positions_that_are_gone_everywhere_make_wide_blocks():
    live = np.zeros((64, 128, 3, 3), dtype=bool)
    live[:, :, 1, :] = True
    blocks = infer_blocks(live)
    assert (blocks.in_block, blocks.out_block) == (128, 64)
    assert blocks.work == pytest.approx(1 / 3)


def test_input_channels_pruned_in_a_row_are_found():
    live = np.ones((64, 128, 3, 3), dtype=bool)
    live[:, 32:96] = False
    blocks = infer_blocks(live)
    assert (blocks.in_block, blocks.out_block) == (32, 64)
    assert not blocks.mask[:, 1:3].any()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_scattered_zeros_have_no_blocks(density, kernel):
    live = np.random.default_rng(5).random((128, 128, *kernel)) < density
    assert infer_blocks(live) is None


def test_scattered_input_channels_are_found_one_by_one():
    live = np.ones((64, 128, 3, 3), dtype=bool)
    live[:, np.random.default_rng(6).choice(128, 64, replace=False)] = False
    blocks = infer_blocks(live)
    assert (blocks.in_block, blocks.out_block) == (1, 64)
    assert blocks.work == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 3, 3), (10, 200, 1, 1), (200, 3, 5, 5)])
def test_a_weight_without_any_live_value_is_one_empty_pattern(shape):
    blocks = infer_blocks(np.zeros(shape, dtype=bool))
    assert not blocks.mask.any()
    assert blocks.work == 0


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 3, 3), (17, 9, 2, 2)])
def test_a_dense_weight_has_no_zeros_to_skip(shape):
    assert infer_blocks(np.ones(shape, dtype=bool)) is None


def test_every_live_weight_is_covered():
    rng = np.random.default_rng(8)
    for seed in range(10):
        live = block_live(seed, 6, 5, (3, 2), 8, 16) & (rng.random((48, 80, 3, 2)) < 0.5)
        blocks = infer_blocks(live)
        covered = blocks.mask.repeat(blocks.out_block, 0).repeat(blocks.in_block, 1)[:48, :80]
        assert not (live & ~covered).any()
