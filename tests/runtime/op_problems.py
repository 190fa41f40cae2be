"""Layers, plans and oracles for the tests of the grouped convolution."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from oracle import masked_conv2d
from torch import Tensor

import lhc_triton.runtime.op.grouped_conv2d  # noqa: F401  (registers torch.ops.lhc)
from lhc_triton.planning.schema import ConvGeometry, LayerPlan, LayerTopology, Tile
from lhc_triton.runtime.op.packing import Packed, pack

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def plan_by_hand(
    geometry: ConvGeometry,
    mask: np.ndarray,
    in_block: int,
    out_block: int,
    groups_per_tile: int = 1,
    order: np.random.Generator | None = None,
) -> LayerPlan:
    """Batch filter groups (shuffled by ``order``) into union tiles of so many groups."""
    topology = LayerTopology.from_mask("layer", geometry, in_block, out_block, mask)
    groups = np.arange(topology.groups)
    if order is not None:
        order.shuffle(groups)
    tiles = []
    for first in range(0, len(groups), groups_per_tile):
        members = tuple(int(g) for g in groups[first : first + groups_per_tile])
        entries = sorted({e for g in members for e in topology.pattern_of(g)})
        tiles.append(Tile(members, tuple(entries)))
    return LayerPlan(topology, tuple(tiles), out_block * groups_per_tile, "torch", "by hand")


@dataclass
class Problem:
    """One layer with its weights and inputs; everything follows from the seed."""

    geometry: ConvGeometry
    in_block: int = 8
    out_block: int = 4
    density: float = 0.4
    groups_per_tile: int = 1
    shuffle: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    seed: int = 0
    has_bias: bool = True
    has_residual: bool = False
    has_scale: bool = False
    activation: str = "none"
    pool: str = "none"
    layer: LayerPlan = field(init=False)
    mask: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = self.geometry
        rng = np.random.default_rng(self.seed)
        grid = (-(-g.out_channels // self.out_block), -(-g.in_channels // self.in_block), *g.kernel)
        blocks = rng.random(grid) < self.density
        order = rng if self.shuffle else None
        self.layer = plan_by_hand(g, blocks, self.in_block, self.out_block, self.groups_per_tile, order)
        mask = np.kron(blocks, np.ones((self.out_block, self.in_block, 1, 1), dtype=bool))
        self.mask = torch.from_numpy(mask[: g.out_channels, : g.in_channels])
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        fan_in = max(1.0, self.density * g.in_channels * g.taps)
        self.weight = random(g.out_channels, g.in_channels, *g.kernel) / fan_in**0.5
        self.x = random(g.batch, g.in_channels, g.height, g.width)
        if self.channels_last:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.bias = random(g.out_channels) if self.has_bias else None
        self.scale = random(g.out_channels) if self.has_scale else None
        shape = (g.batch, g.out_channels, g.out_height, g.out_width)
        self.residual = random(*shape) if self.has_residual else None

    def packed(self, backend: str = "reference") -> Packed:
        return pack(self.layer, self.weight, backend=backend)

    def arguments(self, backend: str = "reference", **changes: Any) -> dict[str, Any]:
        g = self.geometry
        packed = self.packed(backend)
        return {
            "x": self.x,
            "weight": packed.weight,
            "tables": packed.tables,
            "bias": self.bias,
            "residual": self.residual,
            "scale": self.scale,
            "out_channels": g.out_channels,
            "kernel_size": list(g.kernel),
            "stride": list(g.stride),
            "padding": list(g.padding),
            "dilation": list(g.dilation),
            "activation": self.activation,
            "pool": self.pool,
            "backend": backend,
            "config": [],
            **changes,
        }

    def run(self, backend: str, **changes: Any) -> Tensor:
        return torch.ops.lhc.grouped_conv2d(**self.arguments(backend, **changes))

    def oracle(self) -> Tensor:
        """The dense convolution of the live weights, in float64."""
        g = self.geometry
        return masked_conv2d(
            self.x, self.weight, self.mask, g.stride, g.padding, g.dilation,
            self.bias, self.residual, self.scale, self.activation, self.pool,
        )  # fmt: skip

    def magnitude(self) -> Tensor:
        """The same of absolute values: what rounding errors are in proportion to, where sums cancel."""
        tensors = ("x", "weight", "bias", "residual", "scale")
        twin = copy.copy(self)
        for name in tensors:
            value = getattr(self, name)
            setattr(twin, name, None if value is None else value.double().abs())
        return twin.oracle()


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Problem:
    """Layers of every shape that groups=1 allows, small."""
    small = st.integers
    kernel = (draw(small(1, 4)), draw(small(1, 4)))
    dilation = (draw(small(1, 2)), draw(small(1, 2)))
    padding = tuple(draw(small(0, 3)) for _ in range(4))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    pool = draw(st.sampled_from(["none", "none", "max2x2"]))
    stride = (draw(small(1, 3)), draw(small(1, 3)))
    border = (padding[0] + padding[1], padding[2] + padding[3])
    # The smallest input that gives an output, or a 2x2 one for the pool, and a little more.
    least = [
        max(1, r + (s if pool != "none" else 0) - b) for r, s, b in zip(reach, stride, border, strict=True)
    ]
    height, width = (value + draw(small(0, 7)) for value in least)
    geometry = ConvGeometry(
        draw(small(0, 3)), draw(small(1, 20)), draw(small(1, 20)), height, width, kernel, stride, padding,
        dilation,
    )  # fmt: skip
    flags = [draw(st.booleans()) for _ in range(6)]
    return Problem(
        geometry,
        in_block=draw(st.sampled_from([1, 3, 4, 8, 32])),
        out_block=draw(st.sampled_from([1, 3, 4, 16])),
        density=draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])),
        groups_per_tile=draw(small(1, 3)),
        shuffle=flags[0],
        dtype=draw(st.sampled_from(dtypes)),
        channels_last=flags[1],
        seed=draw(small(0, 2**16)),
        has_bias=flags[2],
        has_residual=flags[3],
        has_scale=flags[4],
        activation=draw(st.sampled_from(["none", "relu"])),
        pool=pool,
    )


@st.composite
def layers(draw: st.DrawFn) -> Problem:
    """Layers of any size and kind, with any epilogue, some large enough to be cut into pieces."""
    small = st.integers
    kernel = (draw(small(1, 5)), draw(small(1, 5)))
    stride, dilation = ((draw(small(1, 3)), draw(small(1, 3))) for _ in range(2))
    padding = tuple(draw(small(0, 6)) for _ in range(4))
    pool = draw(st.sampled_from(["none", "none", "max2x2"]))
    sizes = []
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1 - padding[2 * axis] - padding[2 * axis + 1]
        least = max(1, reach + (stride[axis] if pool != "none" else 0))
        sizes.append(least + draw(small(0, 12)))
    geometry = ConvGeometry(
        draw(small(0, 4)), draw(small(1, 70)), draw(small(1, 70)), *sizes, kernel, stride, padding, dilation
    )
    return Problem(
        geometry,
        in_block=draw(st.sampled_from([1, 2, 5, 8, 16, 32, 64])),
        out_block=draw(st.sampled_from([1, 2, 5, 8, 16, 24, 32, 64])),
        density=draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        groups_per_tile=draw(small(1, 4)),
        shuffle=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        seed=draw(small(0, 2**16)),
        has_bias=draw(st.booleans()),
        has_residual=draw(st.booleans()),
        has_scale=draw(st.booleans()),
        activation=draw(st.sampled_from(["none", "relu", "silu"])),
        pool=pool,
    )
