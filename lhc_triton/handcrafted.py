"""Handcrafted convolutions as fixed topologies of LHCConv2d: baselines beside the learned ones.

Each is a block mask [Go, Gi, kh, kw] with the blocks that it needs. I and O are a convolution's input
channels and filters; g and b count its filter groups and input blocks from 0.

standard
    Every weight lives.
pointwise
    The centre tap only: a 1x1 convolution.
groupwise
    Filters and input channels fall into ``parts`` groups, a filter sees those of its own: nn.Conv2d with
    groups=parts (A. Krizhevsky et al., AlexNet, NeurIPS 2012; S. Xie et al., ResNeXt, CVPR 2017).
depthwise
    Groupwise with one input channel to a group: nn.Conv2d with groups=I (F. Chollet, Xception, CVPR 2017).
hetconv
    Each filter keeps the full kernel for 1 in ``parts`` input channels and the centre tap for the others;
    from filter to filter the full ones move on by one channel, cyclically: kernel (g, b) is full where
    ``(b - g) % parts == 0`` (P. Singh et al., HetConv, CVPR 2019, with parts for their P). That is with
    blocks of 1 and 1. In wider blocks filter groups take the place of filters; blocks of I / parts and
    O / parts give the sum of a groupwise and a pointwise convolution, which is what the 1 and 1 blocks come
    to when channels and filters are sorted by their place in the cycle.
stripe
    Each filter keeps ceil(kh * kw / parts) taps, the same for all input channels: the granularity of
    stripe-wise pruning (F. Meng et al., Pruning Filter in Filter, NeurIPS 2020; blocks of I and 1). There the
    taps are learned; here, by a choice of ours, group g goes on in row-major order where g - 1 stopped.
1xn
    N = out_block adjacent filters keep the full kernels of the same 1 in ``parts`` input channels: the
    granularity of the 1xN pattern (M. Lin et al., arXiv 2105.14713; blocks of 1 and N, N = 4). There the
    channels are learned; here, by a choice of ours, they are those with ``(b - g) % parts == 0``.
asymmetric
    The first half of the filters keeps the centre row, the second the centre column: a 1xk and a kx1
    convolution side by side, outputs concatenated (C. Szegedy et al., Inception v3, CVPR 2016, figure 7).
cross
    Centre row and centre column: the sum of a 1xk and a kx1 convolution, the skeleton of a kernel
    (X. Ding et al., ACNet, ICCV 2019).
dilated_cross
    The centre and the corners, a diagonal cross in 3x3: the sum of a 1x1 convolution and of a 2x2 one dilated
    to the corners. Ours, after the method's crosses (arXiv 2301.05440).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .conversion import ConfigFn, FilterFn, ModelT, convert, lhc_layers
from .topology import LHCConfig, block_grid


@dataclass(frozen=True, eq=False)
class Handcrafted:
    """A fixed topology of one convolution.

    Attributes:
        config: its blocks; free shapes, and no density target since there is nothing to steer.
        block_mask: bool [Go, Gi, kh, kw]; no filter group is empty.
    """

    config: LHCConfig
    block_mask: Tensor


def handcrafted(
    name: str, conv: nn.Conv2d, blocks: LHCConfig | None = None, *, parts: int = 4
) -> Handcrafted:
    """Return the handcrafted topology of that name for one convolution.

    Args:
        name: one of HANDCRAFTED; the module's docstring defines them.
        conv: gives O, I and the kernel's size; it is left as it is.
        blocks: whose in_block and out_block to use, made smaller where the topology would not come out
            exactly (to a common divisor of the block and what it must fill); the rest of it is not read. None
            takes the blocks of the published definition, and the widest possible where it names none.
        parts: how many groups, or 1 in how many: see the definitions.

    Raises:
        ValueError: the name is unknown, parts is below 1, or the convolution does not suit the topology.
        TypeError: parts is not an int, or blocks no LHCConfig.
    """
    _check(name, parts)
    if blocks is not None and not isinstance(blocks, LHCConfig):
        raise TypeError(f"blocks={blocks!r} is not an LHCConfig: give LHCConfig(in_block=..., out_block=...)")
    kh, kw = conv.kernel_size
    with torch.device("cpu"):  # a mask's values are read, which a default device such as "meta" does not have
        return _BUILDERS[name](_Site(conv.out_channels, conv.in_channels, kh, kw, blocks), parts)


def impose(
    model: ModelT,
    name: str,
    blocks: LHCConfig | ConfigFn | None = None,
    *,
    parts: int = 4,
    filter_fn: FilterFn | None = None,
) -> ModelT:
    """Give a model's convolutions a handcrafted topology in place of a learned one, and return the model.

    The convolutions that `convert` would convert and that suit the topology become frozen LHCConv2d layers,
    in place: their weights train, their topology stays. The others stay dense, the first convolution among
    them.

    Args:
        model: any module that holds nn.Conv2d modules.
        name: one of HANDCRAFTED.
        blocks: see `handcrafted`; or a function as `convert` takes it, such as `blocks_by_width`.
        parts: see `handcrafted`.
        filter_fn: called as filter_fn(name, module) for every convolution that could be converted; return
            False to leave it dense.

    Raises:
        ValueError: no convolution suits the topology, an argument is refused by `handcrafted`, or the model
            by `convert`; nothing is changed then.
        TypeError: an argument has the wrong type.
    """
    _check(name, parts)
    topologies: dict[str, Handcrafted] = {}
    unsuited: list[str] = []

    def suits(layer: str, conv: nn.Conv2d) -> bool:
        if filter_fn is not None and not filter_fn(layer, conv):
            return False
        own = blocks(layer, conv) if callable(blocks) else blocks
        try:
            topologies[layer] = handcrafted(name, conv, own, parts=parts)
        except ValueError as error:
            unsuited.append(f"{layer or 'the model itself'}: {error}")
            return False
        return True

    try:
        convert(model, lambda layer, conv: topologies[layer].config, suits)
    except ValueError as error:
        if unsuited and not topologies:
            raise ValueError(
                f"no convolution of {type(model).__name__} suits the topology {name!r}: {unsuited[0]}"
            ) from error
        raise
    layers = lhc_layers(model)
    for layer, topology in topologies.items():
        layers[layer].set_topology(topology.block_mask)
    return model


def _check(name: str, parts: int) -> None:
    if name not in HANDCRAFTED:
        raise ValueError(f"topology {name!r} is not supported: choose one of {', '.join(HANDCRAFTED)}")
    if isinstance(parts, bool) or not isinstance(parts, int):
        raise TypeError(f"parts={parts!r} is not an int: give 1 or more")
    if parts < 1:
        raise ValueError(f"parts={parts} is not supported: give 1 or more")


@dataclass(frozen=True)
class _Site:
    """A convolution's sizes and the blocks wished for; what the builders below share."""

    out_channels: int
    in_channels: int
    kh: int
    kw: int
    blocks: LHCConfig | None

    def sized(self, published: tuple[int, int], fill: tuple[int, int] = (0, 0)) -> LHCConfig:
        """Return (in_block, out_block) as wished or as published, made to divide what they must fill.

        0 stands for nothing to fill.
        """
        if self.blocks is not None:
            published = (self.blocks.in_block, self.blocks.out_block)
        in_block, out_block = map(math.gcd, published, fill)
        return LHCConfig(density=None, in_block=in_block, out_block=out_block)

    def cycled(self, published: tuple[int, int], parts: int) -> LHCConfig:
        """Return (in_block, out_block) in which what is kept can move on through all of 1 in ``parts``.

        Blocks that are wished for leave each place as many filters, where ``parts`` divides those.
        """
        even = self.blocks is not None and self.out_channels % parts == 0
        return self.sized(published, fill=(self.channels_of(parts), self.out_channels // parts * even))

    def widest(self) -> LHCConfig:
        """Return the blocks of a topology that treats all channels alike."""
        return self.sized((self.in_channels, self.out_channels))

    def positions(self, config: LHCConfig) -> tuple[Tensor, Tensor]:
        """Return g, int64 [Go, 1, 1, 1], and b, int64 [Gi, 1, 1]."""
        groups, blocks = block_grid(self.out_channels, self.in_channels, config.in_block, config.out_block)
        return torch.arange(groups).view(-1, 1, 1, 1), torch.arange(blocks).view(-1, 1, 1)

    def topology(self, config: LHCConfig, live: Tensor) -> Handcrafted:
        """Return the topology from a mask that spreads to [Go, Gi, kh, kw]."""
        groups, blocks = self.positions(config)
        return Handcrafted(config, live.expand(len(groups), len(blocks), self.kh, self.kw).contiguous())

    def taps(self, *regions: tuple[Any, Any]) -> Tensor:
        """Return the taps of some (rows, columns), bool [kh, kw]."""
        taps = torch.zeros(self.kh, self.kw, dtype=torch.bool)
        for region in regions:
            taps[region] = True
        return taps

    @property
    def centre(self) -> tuple[int, int]:
        """Row and column of the centre tap; ValueError if there is none, or nothing around it."""
        if self.kh % 2 == 0 or self.kw % 2 == 0 or self.kh * self.kw == 1:
            raise ValueError(
                f"kernel_size=({self.kh}, {self.kw}) has no centre with taps around it: odd sizes have, 1x1"
                " apart"
            )
        return self.kh // 2, self.kw // 2

    def shared(self, parts: int) -> tuple[int, int]:
        """Return (I / parts, O / parts); ValueError if parts does not divide both."""
        if self.in_channels % parts or self.out_channels % parts:
            raise ValueError(
                f"{self.in_channels} input channels and {self.out_channels} filters do not fall into {parts}"
                " equal groups"
            )
        return self.in_channels // parts, self.out_channels // parts

    def channels_of(self, parts: int) -> int:
        """Return I / parts; ValueError if parts does not divide I."""
        if self.in_channels % parts:
            raise ValueError(f"1 in {parts} of {self.in_channels} input channels is no whole number")
        return self.in_channels // parts


_EVERY = slice(None)


def _standard(site: _Site, parts: int) -> Handcrafted:
    return site.topology(site.widest(), site.taps((_EVERY, _EVERY)))


def _pointwise(site: _Site, parts: int) -> Handcrafted:
    return site.topology(site.widest(), site.taps(site.centre))


def _groupwise(site: _Site, parts: int) -> Handcrafted:
    channels, filters = site.shared(parts)
    config = site.sized((channels, filters), fill=(channels, filters))
    g, b = site.positions(config)
    return site.topology(config, g * config.out_block // filters == b * config.in_block // channels)


def _depthwise(site: _Site, parts: int) -> Handcrafted:
    return _groupwise(site, site.in_channels)


def _one_in(parts: int, g: Tensor, b: Tensor) -> Tensor:
    """Which blocks are chosen: 1 in ``parts``, moving on by one from group to group."""
    return (b - g) % parts == 0


def _hetconv(site: _Site, parts: int) -> Handcrafted:
    config = site.cycled((1, 1), parts)
    return site.topology(config, _one_in(parts, *site.positions(config)) | site.taps(site.centre))


def _stripe(site: _Site, parts: int) -> Handcrafted:
    if site.kh * site.kw == 1:
        raise ValueError("a 1x1 kernel has no taps to choose from")
    config = site.sized((site.in_channels, 1))
    taps = site.kh * site.kw
    kept = math.ceil(taps / parts)
    g, _ = site.positions(config)
    return site.topology(config, (torch.arange(taps).view(site.kh, site.kw) - g * kept) % taps < kept)


def _one_by_n(site: _Site, parts: int) -> Handcrafted:
    config = site.cycled((1, 4), parts)
    return site.topology(config, _one_in(parts, *site.positions(config)))


def _asymmetric(site: _Site, parts: int) -> Handcrafted:
    row, column = _lines(site)
    if site.out_channels % 2:
        raise ValueError(f"{site.out_channels} filters do not fall into two halves")
    half = site.out_channels // 2
    config = site.sized((site.in_channels, half), fill=(0, half))
    g, _ = site.positions(config)
    return site.topology(config, torch.where(g * config.out_block < half, row, column))


def _cross(site: _Site, parts: int) -> Handcrafted:
    row, column = _lines(site)
    return site.topology(site.widest(), row | column)


def _dilated_cross(site: _Site, parts: int) -> Handcrafted:
    _lines(site)
    corners = torch.tensor([[0], [-1]]), torch.tensor([0, -1])
    return site.topology(site.widest(), site.taps(site.centre, corners))


def _lines(site: _Site) -> tuple[Tensor, Tensor]:
    """The centre row and the centre column; ValueError if the kernel is one of them."""
    row, column = site.centre
    if 1 in (site.kh, site.kw):
        raise ValueError(f"kernel_size=({site.kh}, {site.kw}) is a line: a cross needs both directions")
    return site.taps((row, _EVERY)), site.taps((_EVERY, column))


_BUILDERS: dict[str, Callable[[_Site, int], Handcrafted]] = {
    "standard": _standard,
    "pointwise": _pointwise,
    "groupwise": _groupwise,
    "depthwise": _depthwise,
    "hetconv": _hetconv,
    "stripe": _stripe,
    "1xn": _one_by_n,
    "asymmetric": _asymmetric,
    "cross": _cross,
    "dilated_cross": _dilated_cross,
}

HANDCRAFTED = tuple(_BUILDERS)
"""The names of the handcrafted topologies."""
