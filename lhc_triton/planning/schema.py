"""What a plan is made of: a convolution's geometry, its topology, tiles, and how the layer will run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

Pair = tuple[int, int]


def out_size(
    image: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Pair:
    """Return OH, OW of a convolution of an image [H, W]; padding is (top, bottom, left, right)."""
    rows = image[0] + padding[0] + padding[1] - dilation[0] * (kernel[0] - 1) - 1
    columns = image[1] + padding[2] + padding[3] - dilation[1] * (kernel[1] - 1) - 1
    return rows // stride[0] + 1, columns // stride[1] + 1


@dataclass(frozen=True)
class ConvGeometry:
    """The shapes of one convolution call.

    Attributes:
        batch, in_channels, out_channels, height, width: N, I, O, H, W of the input.
        kernel, stride, dilation: (vertical, horizontal).
        padding: zero border in pixels as (top, bottom, left, right).
    """

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: Pair = (1, 1)

    @property
    def out_size(self) -> Pair:
        """Rows and columns of the output, OH and OW."""
        image = (self.height, self.width)
        return out_size(image, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return self.out_size[0]

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return self.out_size[1]

    @property
    def out_pixels(self) -> int:
        """Output pixels over the whole batch, N * OH * OW."""
        rows, columns = self.out_size
        return self.batch * rows * columns

    @property
    def in_values(self) -> int:
        """Values of the input, N * I * H * W."""
        return self.batch * self.in_channels * self.height * self.width

    @property
    def out_values(self) -> int:
        """Values of the output, N * O * OH * OW."""
        return self.out_channels * self.out_pixels

    @property
    def taps(self) -> int:
        """Positions in the kernel, kh * kw."""
        return self.kernel[0] * self.kernel[1]

    @property
    def weights(self) -> int:
        """Weights of the dense convolution, without bias."""
        return self.out_channels * self.in_channels * self.taps

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense convolution."""
        return self.weights * self.out_pixels


@dataclass(frozen=True)
class LayerTopology:
    """Which weights of one convolution live, in blocks: the problem the planner solves.

    An *entry* is one (tap, input block) pair, numbered ``tap * in_blocks + block`` with
    ``tap = r * kw + s``. A *pattern* is the ascending tuple of the entries of one filter group.

    Attributes:
        name: the module's name in its network.
        geometry: the call's shapes.
        in_block, out_block: input channels and filters that share one mask bit; the last block may be
            smaller.
        patterns: the distinct patterns, in order of first use.
        group_pattern: for each filter group, the index of its pattern.
    """

    name: str
    geometry: ConvGeometry
    in_block: int
    out_block: int
    patterns: tuple[tuple[int, ...], ...]
    group_pattern: tuple[int, ...]

    @classmethod
    def from_mask(
        cls, name: str, geometry: ConvGeometry, in_block: int, out_block: int, mask: np.ndarray
    ) -> LayerTopology:
        """Read the topology off a boolean block mask [filter groups, input blocks, kh, kw]."""
        expected = (
            math.ceil(geometry.out_channels / out_block),
            math.ceil(geometry.in_channels / in_block),
            *geometry.kernel,
        )
        if mask.shape != expected:
            raise ValueError(f"layer {name!r}: the block mask has shape {mask.shape}, expected {expected}")
        rows = np.ascontiguousarray(mask.astype(bool).transpose(0, 2, 3, 1).reshape(expected[0], -1))
        index: dict[bytes, int] = {}
        patterns: list[tuple[int, ...]] = []
        group_pattern: list[int] = []
        for row in rows:
            key = row.tobytes()
            if key not in index:
                index[key] = len(patterns)
                patterns.append(tuple(np.flatnonzero(row).tolist()))
            group_pattern.append(index[key])
        return cls(name, geometry, in_block, out_block, tuple(patterns), tuple(group_pattern))

    def split(self, largest: int) -> LayerTopology:
        """Return the same live weights in blocks of at most ``largest`` channels and filters.

        A wider block is cut into equal parts: the largest power of two, if it is 16 or more, else the largest
        divisor.
        """
        in_block, out_block = (_part(block, largest) for block in (self.in_block, self.out_block))
        if (in_block, out_block) == (self.in_block, self.out_block):
            return self
        mask = self.block_mask().repeat(self.out_block // out_block, axis=0)
        mask = mask.repeat(self.in_block // in_block, axis=1)
        groups = math.ceil(self.geometry.out_channels / out_block)
        in_blocks = math.ceil(self.geometry.in_channels / in_block)
        return LayerTopology.from_mask(
            self.name, self.geometry, in_block, out_block, mask[:groups, :in_blocks]
        )

    @property
    def in_blocks(self) -> int:
        """Number of input blocks, ceil(I / in_block)."""
        return math.ceil(self.geometry.in_channels / self.in_block)

    @property
    def groups(self) -> int:
        """Number of filter groups, ceil(O / out_block)."""
        return len(self.group_pattern)

    @property
    def entries(self) -> int:
        """Possible entries of a filter group, taps * in_blocks."""
        return self.geometry.taps * self.in_blocks

    def pattern_of(self, group: int) -> tuple[int, ...]:
        """Return the entries of one filter group."""
        return self.patterns[self.group_pattern[group]]

    def group_filters(self, group: int) -> range:
        """Return the filters of one group."""
        first = group * self.out_block
        return range(first, min(first + self.out_block, self.geometry.out_channels))

    def entry_channels(self, entry: int) -> range:
        """Return the input channels of one entry."""
        first = (entry % self.in_blocks) * self.in_block
        return range(first, min(first + self.in_block, self.geometry.in_channels))

    @cached_property
    def live_weights(self) -> int:
        """Weights that the topology keeps (crops counted exactly)."""
        per_pattern = [sum(len(self.entry_channels(e)) for e in pattern) for pattern in self.patterns]
        return sum(len(self.group_filters(g)) * per_pattern[p] for g, p in enumerate(self.group_pattern))

    @property
    def density(self) -> float:
        """Live share of the weights."""
        return self.live_weights / self.geometry.weights

    @property
    def live_macs(self) -> int:
        """Multiply-accumulates that the topology keeps."""
        return self.live_weights * self.geometry.out_pixels

    def block_mask(self) -> np.ndarray:
        """Return the boolean block mask [filter groups, input blocks, kh, kw]."""
        rows = np.zeros((self.groups, self.entries), dtype=bool)
        for group in range(self.groups):
            rows[group, list(self.pattern_of(group))] = True
        kh, kw = self.geometry.kernel
        return rows.reshape(self.groups, kh, kw, self.in_blocks).transpose(0, 3, 1, 2)


def _part(block: int, largest: int) -> int:
    if block <= largest:
        return block
    power = min(block & -block, 1 << (largest.bit_length() - 1))
    if power >= 16:
        return power
    return next(part for part in range(largest, 0, -1) if block % part == 0)


@dataclass(frozen=True)
class Tile:
    """Filter groups that run together: every group reads every entry of the tile.

    With equal patterns the tile is exact; otherwise ``entries`` is their union, and a group that lacks
    an entry gets zero weights there.
    """

    groups: tuple[int, ...]
    entries: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """How one convolution will run.

    Attributes:
        topology: what has to be computed.
        tiles: the batches of filter groups, longest first; together they hold each group once.
        tile_width: filters a tile has room for (a tile may fill fewer).
        backend: name of the backend that the cost model, or a measurement, chose.
        reason: why, in one phrase.
        predicted_us: the cost model's time of each backend it priced, in microseconds.
    """

    topology: LayerTopology
    tiles: tuple[Tile, ...]
    tile_width: int
    backend: str
    reason: str
    predicted_us: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The module's name in its network."""
        return self.topology.name

    @property
    def filter_order(self) -> tuple[int, ...]:
        """The filters in the order in which the tiles compute them: the permutation of the outputs."""
        return tuple(f for tile in self.tiles for g in tile.groups for f in self.topology.group_filters(g))

    @property
    def planned_macs(self) -> int:
        """Multiply-accumulates of the tiles: the live ones plus what unions waste."""
        topology = self.topology
        total = 0
        for tile in self.tiles:
            filters = sum(len(topology.group_filters(g)) for g in tile.groups)
            total += filters * sum(len(topology.entry_channels(e)) for e in tile.entries)
        return total * topology.geometry.out_pixels

    @property
    def padding(self) -> float:
        """Share of the tiles' room, entries weighed, that no filter fills: 0 where every tile is full."""
        room = self.tile_width * sum(len(tile.entries) for tile in self.tiles)
        filled = sum(
            len(tile.entries) * sum(len(self.topology.group_filters(g)) for g in tile.groups)
            for tile in self.tiles
        )
        return 1 - filled / room if room else 0.0


@dataclass(frozen=True)
class OtherWork:
    """Work of one kind that a network does beside its planned convolutions, in one run.

    Attributes:
        kind: for people, for example "pooling".
        calls: operators, those included that run in a convolution's epilogue and add to what that reads.
        macs: multiply-accumulates, of matrix products and of convolutions that stay dense.
        moved_bytes: read and written.
        predicted_us: the cost model's time of all of it.
    """

    kind: str
    calls: int
    macs: int
    moved_bytes: int
    predicted_us: float = 0.0
