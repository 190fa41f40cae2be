"""Handcrafted convolutions as fixed topologies of LHCConv2d: baselines beside the learned ones.

Each topology is a block mask, bool [Go, Gi, kh, kw], with the blocks that it needs: filter group g and input
block b share one bit per kernel tap. I and O are a convolution's input channels and filters.

==============  ======================================================================================
standard        every weight lives
pointwise       the centre tap only: a 1x1 convolution
groupwise       filters see the input channels of their own of ``parts`` groups only
depthwise       groupwise with one input channel in each group
hetconv         a filter keeps the full kernel for 1 in ``parts`` input channels, for the others the centre
stripe          a filter keeps 1 in ``parts`` taps, over all input channels
1xn             N adjacent filters keep the full kernels of 1 in ``parts`` input channels
asymmetric      the first half of the filters keeps the centre row (1xk), the second the centre column (kx1)
cross           the centre row and the centre column: the sum of a 1xk and a kx1 convolution
dilated_cross   the centre and the corners: the sum of a 1x1 and a dilated 2x2 convolution
==============  ======================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .conversion import FilterFn, ModelT, convert, lhc_layers
from .topology import LHCConfig, block_grid


@dataclass(frozen=True, eq=False)
class Handcrafted:
    """A fixed topology for one convolution.

    Attributes:
        config: the blocks; density None, since there is nothing to steer.
        block_mask: bool [Go, Gi, kh, kw]; no filter group is empty.
    """

    config: LHCConfig
    block_mask: Tensor


@dataclass(frozen=True)
class _Request:
    """A convolution's sizes, the blocks asked for (None: those of the published definition), and parts."""

    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    blocks: LHCConfig | None
    parts: int

    def build(self, in_block: int, out_block: int, taps: Tensor) -> Handcrafted:
        """Return the topology of these blocks from taps that broadcast to [Go, Gi, kh, kw]."""
        in_block, out_block = min(in_block, self.in_channels), min(out_block, self.out_channels)
        grid = block_grid(self.out_channels, self.in_channels, in_block, out_block)
        config = LHCConfig(density=None, in_block=in_block, out_block=out_block)
        return Handcrafted(config, taps.expand(*grid, *self.kernel).clone())

    def every_filter(self, taps: Tensor) -> Handcrafted:
        """Return the topology in which every kernel keeps the same taps [kh, kw]."""
        blocks = self.blocks or LHCConfig(in_block=self.in_channels, out_block=self.out_channels)
        return self.build(blocks.in_block, blocks.out_block, taps)
