"""Probes of masks, and how near filter groups are to sharing patterns, against loops and numpy."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from lhc_triton.topology import mask_correlation, pattern_distance, shape_counts


def mask(seed, shape=(4, 3, 3, 3), density=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("seed", range(5))
def test_correlation_is_pearsons_over_the_bits(seed):
    before, after = mask(seed), mask(seed + 100, density=0.2)
    expected = np.corrcoef(before.flatten().numpy(), after.flatten().numpy())[0, 1]
    assert mask_correlation(before, after) == pytest.approx(expected, abs=1e-12)
    assert mask_correlation(after.double(), before) == mask_correlation(before, after)


@pytest.mark.parametrize("seed", range(20))
def test_correlation_of_a_mask_with_itself_is_exactly_one_and_with_its_opposite_minus_one(seed):
    some = mask(seed)
    assert mask_correlation(some, some) == 1.0
    assert mask_correlation(some, ~some) == -1.0


def test_correlation_of_constant_masks_is_one_only_where_they_are_equal():
    ones, zeros = torch.ones(2, 2, 3, 3, dtype=torch.bool), torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    assert mask_correlation(ones, ones) == mask_correlation(zeros, zeros) == 1.0
    assert mask_correlation(ones, zeros) == 0.0
    assert mask_correlation(ones, mask(0, (2, 2, 3, 3))) == 0.0


def test_correlation_refuses_masks_of_two_layers():
    with pytest.raises(ValueError, match=r"\(4, 3, 3, 3\) and \(4, 3, 1, 1\): give two of one layer"):
        mask_correlation(mask(0), mask(0, (4, 3, 1, 1)))


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 5)])
def test_shape_counts_name_each_kernel_and_add_up(kernel):
    some = mask(1, (5, 4, *kernel), density=0.8)
    expected = Counter(
        "/".join("".join("1" if bit else "0" for bit in row) for row in some[g, b].tolist())
        for g in range(5)
        for b in range(4)
    )
    counts = shape_counts(some.float())
    assert counts == expected
    assert sum(counts.values()) == 20
    assert list(counts.items()) == sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def distance_by_loops(block_mask, sharers):
    rows = block_mask.flatten(1).numpy()
    others = min(sharers, len(rows)) - 1
    if others < 1:
        return 0.0
    total = 0
    for g, row in enumerate(rows):
        total += sum(sorted(int((row != other).sum()) for h, other in enumerate(rows) if h != g)[:others])
    return total / (len(rows) * others * rows.shape[1])


@pytest.mark.parametrize("sharers", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64])
def test_pattern_distance_is_the_mean_difference_to_the_nearest_groups(sharers, dtype):
    for seed in range(5):
        some = mask(seed, (6, 2, 3, 3))
        found = pattern_distance(some.to(dtype), sharers)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(distance_by_loops(some, sharers), rel=1e-12)


@pytest.mark.parametrize(("sharers", "zero"), [(2, True), (3, True), (4, False)])
def test_pattern_distance_is_zero_where_enough_groups_share_every_pattern(sharers, zero):
    two = mask(3, (2, 2, 3, 3)).repeat_interleave(3, dim=0)
    assert (pattern_distance(two, sharers).item() == 0) is zero


def test_pattern_distances_gradient_pulls_differing_entries_together_and_no_others():
    block_mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1.0]]).view(3, 1, 2, 2).requires_grad_()
    pattern_distance(block_mask, 2).backward()
    # The nearest of group 0 is 1, of 1 is 0, of 2 is 1.
    expected = torch.tensor([[0, 1, 0, 0], [0, -1, 0, 0], [-1, 0, 1, 1]]) / 12
    torch.testing.assert_close(block_mask.grad.view(3, 4), expected)


def test_pattern_distance_of_a_single_group_has_a_gradient_of_zero():
    block_mask = torch.ones(1, 2, 3, 3, requires_grad=True)
    pattern_distance(block_mask, 4).backward()
    assert not block_mask.grad.any()
    assert math.isfinite(pattern_distance(torch.zeros(3, 2, 3, 3), 3).item())
