"""Random block masks with an exact number of live entries, for layers nobody has trained."""

from __future__ import annotations

import math

import numpy as np


def random_mask(
    out_channels: int,
    in_channels: int,
    kernel: tuple[int, int],
    density: float,
    in_block: int = 32,
    out_block: int = 16,
    share: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draw a block mask with exactly ``round(density * entries)`` live entries, without replacement.

    Every filter group keeps at least one entry, so a small layer may end up denser than asked for:
    ``mask.mean()`` is the density that was reached, over entries.

    Args:
        out_channels: O of the layer.
        in_channels: I of the layer.
        kernel: (kh, kw).
        density: wanted live share of the entries, in (0, 1].
        in_block: channels that share one mask bit.
        out_block: filters that share one mask bit.
        share: adjacent filters that share one pattern, a multiple of ``out_block``; None: ``out_block``.
            The count is then exact over the shared patterns.
        seed: the same seed gives the same mask on every machine.

    Returns:
        Boolean array [ceil(O / out_block), ceil(I / in_block), kh, kw].

    Raises:
        ValueError: a density outside (0, 1], a size below 1, or a share that out_block does not divide.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: expected a share in (0, 1]")
    if min(out_channels, in_channels, in_block, out_block, *kernel) < 1:
        raise ValueError(
            f"out_channels={out_channels}, in_channels={in_channels}, kernel={kernel}, in_block={in_block}, "
            f"out_block={out_block}: expected sizes of at least 1"
        )
    share = out_block if share is None else share
    if share < out_block or share % out_block:
        raise ValueError(f"share={share}: expected a multiple of out_block={out_block}")
    rows = math.ceil(out_channels / share)
    columns = math.ceil(in_channels / in_block) * kernel[0] * kernel[1]
    drawn = _draw(rows, columns, round(density * rows * columns), np.random.default_rng(seed))
    groups = math.ceil(out_channels / out_block)
    spread = np.repeat(drawn, share // out_block, axis=0)[:groups]
    return spread.reshape(groups, -1, *kernel)


def _draw(rows: int, columns: int, live: int, rng: np.random.Generator) -> np.ndarray:
    """Boolean [rows, columns] with max(live, rows) ones and no empty row."""
    live = max(live, rows)
    mask = np.zeros((rows, columns), dtype=bool)
    mask.flat[rng.choice(rows * columns, size=live, replace=False)] = True
    # An empty row takes one entry from a row that can spare it: the total stays exact, and only the
    # rows concerned stray from a uniform draw.
    for row in np.flatnonzero(~mask.any(axis=1)):
        spare = np.argwhere(mask & (mask.sum(axis=1, keepdims=True) > 1))
        mask[tuple(spare[rng.integers(len(spare))])] = False
        mask[row, rng.integers(columns)] = True
    return mask


def expand(
    mask: np.ndarray, out_channels: int, in_channels: int, in_block: int, out_block: int
) -> np.ndarray:
    """Spread a block mask to the weight's shape [O, I, kh, kw]; the last blocks are cropped."""
    full = mask.repeat(out_block, axis=0).repeat(in_block, axis=1)
    return full[:out_channels, :in_channels]
