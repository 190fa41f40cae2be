"""What kind of zeros a weight has, in words, where blocks do not hold them."""

from __future__ import annotations

import numpy as np

from .patterns import best_blocks

RUNS = (4, 8, 16)  # the M of N:M
MOST_KERNELS = 16  # different kernel patterns; pattern pruning trains with 4 to 12


def describe_zeros(live: np.ndarray) -> str:
    """Return one line on zeros that blocks do not hold: their share and kind, the best blocks, what to do.

    Known kinds: N:M (at most N of M weights in a row live, along the input channels or along a filter's
    weights in memory; A. Mishra et al., arXiv 2104.08378), kernel patterns (each kernel keeps as many taps,
    in a few arrangements; W. Niu et al., PatDNN, ASPLOS 2020), whole kernels, single weights.

    Args:
        live: boolean [O, I, kh, kw], True where the weight is not zero.
    """
    blocks = best_blocks(live)
    kind = _n_of_m(live) or _kernel_patterns(live) or _whole_kernels(live) or "single weights"
    return (
        f"{1 - live.mean():.0%} zeros, too scattered for blocks ({kind}): the best blocks,"
        f" {blocks.in_block} channels x {blocks.out_block} filters, leave {blocks.work:.0%} of the work;"
        " prune by blocks instead, with lhc.prune"
    )


def _n_of_m(live: np.ndarray) -> str | None:
    """Name an N:M pattern."""
    channels = live.transpose(0, 2, 3, 1).reshape(-1, live.shape[1])
    flat = live.reshape(len(live), -1)
    for rows in (channels, flat):
        for run in RUNS:
            if rows.shape[1] % run:
                continue
            counts = rows.reshape(-1, run).sum(axis=1)
            most = int(counts.max())
            # Chance does not fill every run alike: of few runs it might.
            if 0 < most < run and counts.mean() > 0.9 * most and len(counts) >= 16:
                return f"{most}:{run}"
    return None


def _kernel_patterns(live: np.ndarray) -> str | None:
    kernels = live.reshape(-1, live.shape[2] * live.shape[3])
    taps = kernels.sum(axis=1)
    kept = kernels[taps > 0]
    if live.shape[2] * live.shape[3] < 4 or len(kept) == 0 or taps.max() == kernels.shape[1]:
        return None
    different = len(np.unique(kept, axis=0))
    if different > min(MOST_KERNELS, len(kept) // 4) or len(set(taps[taps > 0].tolist())) > 1:
        return None
    return f"{different} kernel patterns of {int(taps.max())} taps"


def _whole_kernels(live: np.ndarray) -> str | None:
    kernels = live.reshape(-1, live.shape[2] * live.shape[3])
    return (
        "whole kernels" if kernels.shape[1] > 1 and bool((kernels.all(1) | ~kernels.any(1)).all()) else None
    )
