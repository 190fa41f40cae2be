"""Topologies for the planning tests: drawn by hypothesis, or written by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from lhc_triton.planning import ConvGeometry, CostModel, LayerTopology

QUICK = settings(max_examples=40, deadline=None)
CPU = CostModel.for_device("cpu", "torch")
CUDA = CostModel.for_device("cuda")


@st.composite
def geometries(draw):
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return ConvGeometry(
        batch=draw(st.integers(1, 3)),
        in_channels=draw(st.integers(1, 40)),
        out_channels=draw(st.integers(1, 90)),
        height=draw(st.integers(3, 20)),
        width=draw(st.integers(3, 20)),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 4)),
        dilation=(1, 1),
    )


@st.composite
def topologies(draw):
    """Random layers whose groups draw their patterns from a small pool, as learned layers do."""
    geometry = draw(geometries())
    in_block = draw(st.sampled_from([4, 8, 16, 32]))
    out_block = draw(st.sampled_from([1, 3, 8, 16, 24]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))
    groups = -(-geometry.out_channels // out_block)
    in_blocks = -(-geometry.in_channels // in_block)
    pool = rng.random((draw(st.integers(1, 6)), in_blocks, *geometry.kernel)) < density
    mask = pool[rng.integers(len(pool), size=groups)]
    return LayerTopology.from_mask("layer", geometry, in_block, out_block, mask)


def layer(rows, *, out_block=16, in_block=32, size=14, name="layer", batch=1):
    """A 1x1 layer from one list of live input blocks per filter group; row length by the largest."""
    in_blocks = 1 + max((entry for row in rows for entry in row), default=0)
    mask = np.zeros((len(rows), in_blocks, 1, 1), dtype=bool)
    for group, row in enumerate(rows):
        mask[group, list(row)] = True
    geometry = ConvGeometry(
        batch, in_blocks * in_block, len(rows) * out_block, size, size, (1, 1), (1, 1), (0, 0, 0, 0)
    )
    return LayerTopology.from_mask(name, geometry, in_block, out_block, mask)


def random_layer(seed, *, groups=16, in_blocks=8, density=0.1, size=14, name="layer", out_block=16, batch=1):
    """A 3x3 layer whose groups have random patterns of equal length."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((groups, in_blocks * 9), dtype=bool)
    for row in rows:
        row[rng.choice(rows.shape[1], max(1, round(density * rows.shape[1])), replace=False)] = True
    mask = rows.reshape(groups, 3, 3, in_blocks).transpose(0, 3, 1, 2)
    geometry = ConvGeometry(batch, in_blocks * 32, groups * out_block, size, size)
    return LayerTopology.from_mask(name, geometry, 32, out_block, mask)
