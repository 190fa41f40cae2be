"""Masks from effects, rigid shapes, expansion and counts, against loops and formulas written by hand."""

import math

import pytest
import torch
from blocked_masks import blocked_convolutions, effects_of, mask_by_loops
from hypothesis import given, settings
from hypothesis import strategies as st

from lhc_triton.topology import (
    LHCConfig,
    block_grid,
    count_weights,
    expand_mask,
    learned_mask,
    rescued_groups,
    rigid_shapes,
)

quick = settings(max_examples=40, deadline=None)

# The 15 shapes of the method, in its order, rows from top to bottom.
METHOD_SHAPES = """
... ... ... .X. X.. ..X XX. .XX ... ... XXX ... XX. .XX XXX
... .X. XXX .X. .X. .X. XX. .XX XX. .XX XXX XXX XX. .XX XXX
... ... ... .X. ..X X.. ... ... XX. .XX ... XXX XX. .XX XXX
"""


def drawn_shapes() -> torch.Tensor:
    rows = [line.split() for line in METHOD_SHAPES.split("\n") if line]
    return torch.tensor([[[c == "X" for c in row[s]] for row in rows] for s in range(15)])


@pytest.mark.parametrize("density", [None, 1e-6, 0.1, 1, 1.0])
def test_config_takes_every_density_up_to_one_and_none(density):
    assert LHCConfig(density=density).density == density


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"density": 0}, ValueError, r"density=0 is out of range: give one in \(0, 1\]"),
        ({"density": 1.01}, ValueError, "density=1.01"),
        ({"density": -0.1}, ValueError, "density=-0.1"),
        ({"density": math.nan}, ValueError, "density=nan"),
        ({"density": "0.1"}, TypeError, "density='0.1' is not a number"),
        ({"density": True}, TypeError, "density=True"),
        ({"in_block": 0}, ValueError, "in_block=0 is not supported"),
        ({"out_block": -4}, ValueError, "out_block=-4"),
        ({"in_block": 2.0}, TypeError, "in_block=2.0 is not an int"),
        ({"out_block": True}, TypeError, "out_block=True"),
        ({"shapes": "round"}, ValueError, "shapes='round' is not supported: choose 'free' or 'rigid'"),
        ({"shapes": ["free"]}, ValueError, "shapes="),
    ],
)
def test_config_refuses(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        LHCConfig(**arguments)
    assert "\n" not in str(caught.value)


def test_block_grid_counts_cropped_blocks():
    assert block_grid(64, 64, 32, 16) == (4, 2)
    assert block_grid(65, 33, 32, 16) == (5, 2)
    assert block_grid(3, 1, 32, 16) == (1, 1)


def test_rigid_shapes_of_3x3_are_the_methods_15_in_its_order():
    assert torch.equal(rigid_shapes((3, 3)), drawn_shapes())
    assert torch.equal(rigid_shapes(3), drawn_shapes())


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 1), (5, 5), (7, 7), (3, 5), (1, 7)])
def test_rigid_shapes_of_odd_kernels_are_distinct_and_hold_empty_centre_and_full(kernel):
    shapes = rigid_shapes(kernel)
    assert shapes.shape[1:] == kernel
    assert len(torch.unique(shapes.flatten(1), dim=0)) == len(shapes)
    centre = torch.zeros(kernel, dtype=torch.bool)
    centre[kernel[0] // 2, kernel[1] // 2] = True
    assert not shapes[0].any()
    assert torch.equal(shapes[1], centre)
    assert any(shape.all() for shape in shapes)
    assert (shapes[1:] & centre).flatten(1).any(1).all(), "every shape but the empty one holds the centre"


@pytest.mark.parametrize(
    ("kernel", "count"), [((1, 1), 2), ((1, 3), 5), ((3, 1), 5), ((5, 5), 15), ((3, 5), 13)]
)
def test_rigid_shapes_drop_duplicates(kernel, count):
    assert len(rigid_shapes(kernel)) == count


@pytest.mark.parametrize("kernel", [(2, 2), (2, 3), (3, 4), (0, 1), 4])
def test_rigid_shapes_refuse_kernels_without_a_centre(kernel):
    with pytest.raises(ValueError, match="has no rigid shapes: use odd sizes, or shapes='free'"):
        rigid_shapes(kernel)


def test_free_mask_is_one_above_zero_and_zero_elsewhere():
    effects = torch.tensor([0.5, 0.0, -0.0, -0.5, 1e-30, 3.0]).view(1, 6, 1, 1)
    assert learned_mask(effects).flatten().tolist() == [1, 0, 0, 0, 1, 1]


def test_free_mask_gradient_is_straight_through_inside_one_and_a_tenth_outside():
    effects = torch.tensor([0.0, 0.999, -0.999, 1.0, -1.0, 2.0, -7.0], dtype=torch.float64).view(1, 7, 1, 1)
    effects.requires_grad_()
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).double().view(1, 7, 1, 1)
    learned_mask(effects).backward(g)
    factor = torch.tensor([1, 1, 1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64).view(1, 7, 1, 1)
    torch.testing.assert_close(effects.grad, g * factor, rtol=1e-15, atol=0)


def test_free_mask_keeps_the_best_entry_of_a_dead_group():
    effects = torch.full((2, 3, 3, 3), -1.0)
    effects[0, 2, 1, 0] = -0.25
    effects[1, 0, 0, 0] = 0.1
    mask = learned_mask(effects)
    assert mask[0].sum() == 1
    assert mask[0, 2, 1, 0] == 1
    assert mask[1].sum() == 1
    assert mask[1, 0, 0, 0] == 1
    assert rescued_groups(effects) == 1


def test_free_mask_rescues_one_entry_of_equals_only():
    assert learned_mask(torch.zeros(3, 4, 3, 3)).flatten(1).sum(1).tolist() == [1, 1, 1]
    assert rescued_groups(torch.zeros(3, 4, 3, 3)) == 3


@quick
@given(blocked_convolutions())
def test_free_masks_never_lose_a_group(case):
    out_channels, in_channels, in_block, out_block, kernel, seed = case
    effects = effects_of(block_grid(out_channels, in_channels, in_block, out_block), kernel, seed) - 1.5
    mask = learned_mask(effects)
    assert ((mask == 0) | (mask == 1)).all()
    assert mask.flatten(1).any(1).all()
    dead = sum(not bool((group > 0).any()) for group in effects)
    assert rescued_groups(effects) == dead
    assert mask.sum() == (effects > 0).sum() + dead


def test_rigid_mask_takes_the_shape_of_the_largest_effect():
    shapes = drawn_shapes()
    effects = torch.zeros(3, 5, 15)
    effects.view(15, 15).fill_diagonal_(1.0)
    assert torch.equal(learned_mask(effects, shapes).view(15, 3, 3)[1:].bool(), shapes[1:])


def test_rigid_mask_takes_the_first_shape_on_a_tie_and_stays_binary():
    effects = torch.zeros(1, 2, 15)
    effects[0, 0, 2:4] = 1.0
    effects[0, 1, [5, 9, 14]] = 1.0
    mask = learned_mask(effects, drawn_shapes())
    assert torch.equal(mask[0, 0].bool(), drawn_shapes()[2])
    assert torch.equal(mask[0, 1].bool(), drawn_shapes()[5])


def test_rigid_mask_gives_a_dead_group_its_best_shape_that_is_not_empty():
    effects = torch.zeros(2, 3, 15)
    effects[..., 0] = 5.0
    effects[0, 1, 7] = 0.5
    effects[1, 2, 3] = 6.0
    mask = learned_mask(effects, drawn_shapes()).bool()
    assert torch.equal(mask[0, 1], drawn_shapes()[7])
    assert not mask[0, [0, 2]].any()
    assert torch.equal(mask[1, 2], drawn_shapes()[3])
    assert not mask[1, :2].any()
    assert rescued_groups(effects, drawn_shapes()) == 1


def test_rigid_mask_gradient_sums_the_shapes_taps_and_is_damped_far_from_the_blocks_mean():
    shapes = drawn_shapes()
    effects = torch.randn(4, 3, 15, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1.5
    g = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    effects.requires_grad_()
    learned_mask(effects, shapes).backward(g)
    damped = 0
    for o in range(4):
        for i in range(3):
            mean = sum(effects[o, i].tolist()) / 15
            for s in range(15):
                taps = sum(float(g[o, i, r, c]) for r in range(3) for c in range(3) if shapes[s, r, c])
                near = abs(effects[o, i, s].item() - mean) < 1
                damped += not near
                expected = taps * (1.0 if near else 0.1)
                assert float(effects.grad[o, i, s]) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert 0 < damped < 4 * 3 * 15


@quick
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 3]),
    st.integers(0, 99),
)
def test_rigid_masks_are_shapes_and_never_lose_a_group(groups, blocks, kh, kw, seed):
    shapes = rigid_shapes((kh, kw))
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(groups, blocks, len(shapes), generator=generator)
    effects[..., 0] += 2.0
    mask = learned_mask(effects, shapes)
    assert mask.flatten(1).any(1).all()
    assert all(any(torch.equal(m.bool(), s) for s in shapes) for m in mask.flatten(0, 1))


@quick
@given(blocked_convolutions())
def test_expand_mask_repeats_every_block_and_crops_the_last(case):
    out_channels, in_channels, in_block, out_block, kernel, seed = case
    grid = block_grid(out_channels, in_channels, in_block, out_block)
    block_mask = (effects_of(grid, kernel, seed) > 0).double()
    expected = mask_by_loops(block_mask, out_channels, in_channels, in_block, out_block)
    assert torch.equal(expand_mask(block_mask, out_channels, in_channels, in_block, out_block), expected)


@quick
@given(blocked_convolutions())
def test_expand_masks_gradient_is_the_sum_over_the_block(case):
    out_channels, in_channels, in_block, out_block, kernel, seed = case
    grid = block_grid(out_channels, in_channels, in_block, out_block)
    block_mask = torch.ones(*grid, *kernel, dtype=torch.float64, requires_grad=True)
    g = effects_of((out_channels, in_channels), kernel, seed)
    expand_mask(block_mask, out_channels, in_channels, in_block, out_block).backward(g)
    for o in range(grid[0]):
        for i in range(grid[1]):
            rows, columns = slice(o * out_block, (o + 1) * out_block), slice(i * in_block, (i + 1) * in_block)
            torch.testing.assert_close(block_mask.grad[o, i], g[rows, columns].sum(dim=(0, 1)))


@quick
@given(blocked_convolutions())
def test_counts_are_exact_with_cropped_blocks_and_their_gradient_is_the_block_size(case):
    out_channels, in_channels, in_block, out_block, kernel, seed = case
    grid = block_grid(out_channels, in_channels, in_block, out_block)
    block_mask = (effects_of(grid, kernel, seed) > 0).float().requires_grad_()
    layout = out_channels, in_channels, in_block, out_block
    count = count_weights(block_mask, *layout)
    assert count.item() == mask_by_loops(block_mask.detach(), *layout).sum().item()
    assert count_weights(block_mask.detach().bool(), *layout).item() == count.item()
    count.backward()
    sizes = torch.zeros(grid)
    for o in range(out_channels):
        for i in range(in_channels):
            sizes[o // out_block, i // in_block] += 1
    assert torch.equal(block_mask.grad, sizes[:, :, None, None].expand_as(block_mask))


def test_counts_stay_exact_where_half_precision_would_round():
    block_mask = torch.ones(16, 16, 3, 3, dtype=torch.float16)
    assert count_weights(block_mask, 255, 253, 16, 16).item() == 255 * 253 * 9
