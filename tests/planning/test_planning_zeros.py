"""Zeros of other people's pruning: what blocks hold them, and what is said where none do."""

import numpy as np
import pytest

from lhc_triton.planning.patterns import best_blocks, infer_blocks
from lhc_triton.planning.zeros import describe_zeros


def n_of_m(shape, n, m, seed=0):
    """At most n of m adjacent input channels live, by chance which."""
    rng = np.random.default_rng(seed)
    out_channels, in_channels, kh, kw = shape
    runs = np.zeros((out_channels * kh * kw * in_channels // m, m), dtype=bool)
    runs[:, :n] = True
    return rng.permuted(runs, axis=1).reshape(out_channels, kh, kw, in_channels).transpose(0, 3, 1, 2)


def one_by_n(shape, n, density, seed=0):
    rng = np.random.default_rng(seed)
    out_channels, in_channels, kh, kw = shape
    mask = rng.random((out_channels // n, in_channels, 1, 1)) < density
    return mask.repeat(n, 0).repeat(kh, 2).repeat(kw, 3)


def kernel_patterns(shape, taps, different, seed=0):
    rng = np.random.default_rng(seed)
    size = shape[2] * shape[3]
    patterns = np.stack(
        [np.isin(np.arange(size), rng.choice(size, taps, replace=False)) for _ in range(different)]
    )
    return patterns[rng.integers(different, size=shape[:2])].reshape(shape)


@pytest.mark.parametrize("n", [8, 16, 32])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
def test_kernels_that_adjacent_filters_keep_whole_are_found(n, density):
    live = one_by_n((128, 64, 3, 3), n, density)
    blocks = infer_blocks(live)
    assert blocks.in_block == 1
    assert blocks.out_block == n
    assert blocks.fit == 1
    np.testing.assert_array_equal(blocks.mask.repeat(n, 0), live)


@pytest.mark.parametrize("n", [2, 4])
def test_filters_too_few_for_a_vector_are_covered_by_the_next_wider_block(n):
    blocks = infer_blocks(one_by_n((128, 64, 3, 3), n, 0.05))
    assert blocks is None or blocks.fit < 1


def test_narrow_blocks_are_only_taken_where_they_are_the_zeros_own():
    rng = np.random.default_rng(0)
    live = rng.random((128, 128, 3, 3)) < 0.1
    assert best_blocks(live).in_block >= 8


@pytest.mark.parametrize(
    ("live", "kind"),
    [
        (n_of_m((32, 64, 3, 3), 2, 4), "2:4"),
        (n_of_m((32, 64, 1, 1), 1, 4), "1:4"),
        (n_of_m((32, 64, 3, 3), 2, 8), "2:8"),
        (n_of_m((32, 576, 1, 1), 2, 4).reshape(32, 64, 3, 3), "2:4"),
        (kernel_patterns((64, 64, 3, 3), 4, 8), "8 kernel patterns of 4 taps"),
        (one_by_n((64, 64, 3, 3), 1, 0.5), "whole kernels"),
        (np.random.default_rng(0).random((64, 64, 3, 3)) < 0.5, "single weights"),
        (np.random.default_rng(0).random((64, 64, 1, 1)) < 0.3, "single weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scattered_zeros_are_named_with_what_to_do(live, kind):
    assert infer_blocks(live) is None
    text = describe_zeros(live)
    assert f"({kind})" in text
    assert text.startswith(f"{1 - live.mean():.0%} zeros, too scattered for blocks")
    assert "prune by blocks instead, with lhc.prune" in text
    assert "\n" not in text
