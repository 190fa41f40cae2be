"""Block masks written as loops, and sizes to draw."""

import torch
from hypothesis import strategies as st


def mask_by_loops(block_mask, out_channels, in_channels, in_block, out_block):
    mask = torch.empty(out_channels, in_channels, *block_mask.shape[2:], dtype=block_mask.dtype)
    for o in range(out_channels):
        for i in range(in_channels):
            mask[o, i] = block_mask[o // out_block, i // in_block]
    return mask


@st.composite
def blocked_convolutions(draw):
    """(out_channels, in_channels, in_block, out_block, kernel, seed), blocks dividing or not."""
    channels, block, tap = st.integers(1, 20), st.integers(1, 24), st.integers(1, 4)
    kernel = draw(tap), draw(tap)
    return draw(channels), draw(channels), draw(block), draw(block), kernel, draw(st.integers(0, 2**31))


def effects_of(grid, kernel, seed):
    return torch.randn(*grid, *kernel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
