"""From weights to what the backends read: the tile packing, and the canonical blocks of a model.

*Canonical blocks* hold the live weights and nothing else: [pairs, out_block, in_block], one block for each
live (filter group, entry) pair in ascending order, rows and columns past the layer's channels zero. They do
not depend on the tiles, so a model keeps them. *Packed* weights follow the tiles, and are rebuilt at will.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lhc_triton.planning.schema import LayerPlan, LayerTopology

# These backends loop over the tiles on the host, so their tables stay in its memory: reading them from a GPU
# would stall it on every call.
HOST_TABLE_BACKENDS = frozenset({"reference", "torch", "native"})


@dataclass(frozen=True)
class Packed:
    """Weights and tables of one layer, as the backends read them.

    Attributes:
        weight: [E, in_block, tile_width]; E counts the entries of all tiles, tile by tile. Rows past the
            layer's input channels, columns past the tile's filters, and blocks that a group lacks are zero.
            In half types for backend "native", as its kernel reads it fastest on this processor: in float32,
            or, where there are products of pairs of bfloat16, as [E, in_block / 2, tile_width, 2].
        tables: three int32 tensors: tile_ptr [T + 1], the first entry of each tile; entries [E + 1], as
            ``tap * in_blocks + block``, closed by one zero that kernels may read ahead; filters
            [T, tile_width], the filter that each column computes, -1 for none.
    """

    weight: Tensor
    tables: list[Tensor]


def check_tables(
    tile_ptr: Sequence[int],
    entries: Sequence[int],
    filters: Sequence[Sequence[int]],
    possible: int,
    out_channels: int,
) -> None:
    """Check the values of the tables against a call's sizes, so that no backend reads foreign memory.

    Args:
        tile_ptr: first entry of each tile, and the end.
        entries: [E + 1].
        filters: [T][tile_width].
        possible: entries of the layer, taps * in_blocks.
        out_channels: O.

    Raises:
        ValueError: naming the table that does not belong to such a layer.
    """
    rising = all(a <= b for a, b in pairwise(tile_ptr))
    if not rising or tile_ptr[0] != 0 or tile_ptr[-1] != len(entries) - 1:
        raise ValueError(f"grouped_conv2d: tile_ptr does not rise from 0 to the {len(entries) - 1} entries")
    if min(entries) < 0 or (len(entries) > 1 and max(entries) >= possible):
        raise ValueError(
            f"grouped_conv2d: the entries reach {max(entries)}, but x and the kernel have entries "
            f"0..{possible - 1}; the weight was packed for another layer"
        )
    used = sorted(f for row in filters for f in row if f >= 0)
    if len(used) != out_channels or used != list(range(out_channels)):
        raise ValueError(
            f"grouped_conv2d: the filters table does not hold each of the {out_channels} filters once"
        )


def live_pairs(topology: LayerTopology) -> tuple[np.ndarray, np.ndarray]:
    """Return groups [pairs] and entries [pairs] of the live blocks, in canonical order (int64)."""
    patterns = [topology.pattern_of(g) for g in range(topology.groups)]
    lengths = [len(p) for p in patterns]
    groups = np.repeat(np.arange(topology.groups), lengths)
    entries = np.fromiter((e for p in patterns for e in p), dtype=np.int64, count=sum(lengths))
    return groups, entries


def blocks_from_weight(topology: LayerTopology, weight: Tensor) -> Tensor:
    """Cut a dense weight [O, I, kh, kw] into canonical blocks [pairs, out_block, in_block].

    Weights outside the topology are dropped. Raises ValueError if the shape is not the layer's.
    """
    geometry = topology.geometry
    expected = (geometry.out_channels, geometry.in_channels, *geometry.kernel)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"layer {topology.name!r}: the weight has shape {tuple(weight.shape)}, expected {expected}"
        )
    weight = weight.detach()
    padded = weight.new_zeros(_padded_shape(topology))
    padded[: expected[0], : expected[1]] = weight
    return _block_view(topology, padded)[_block_index(topology, weight.device)]


def weight_from_blocks(topology: LayerTopology, blocks: Tensor) -> Tensor:
    """Return the dense weight [O, I, kh, kw] that canonical blocks stand for; zero outside the topology."""
    _check_blocks(topology, blocks)
    geometry = topology.geometry
    padded = blocks.new_zeros(_padded_shape(topology))
    _block_view(topology, padded)[_block_index(topology, blocks.device)] = blocks.detach()
    return padded[: geometry.out_channels, : geometry.in_channels].contiguous()


def pack_blocks(
    layer: LayerPlan,
    blocks: Tensor,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "reference",
) -> Packed:
    """Pack canonical blocks along the plan's tiles.

    Args:
        layer: the plan of the layer.
        blocks: [pairs, out_block, in_block] in canonical order.
        dtype: of the packed weight; default that of ``blocks``.
        device: of the packed weight; default that of ``blocks``.
        backend: who will read it: "triton" wants its tables on ``device``, the others in host memory;
            "native" wants weights of half types prepared, once it is loaded.

    Raises:
        ValueError: the blocks do not fit the plan, or the plan's tiles do not fit its topology.
    """
    topology = layer.topology
    _check_blocks(topology, blocks)
    blocks = blocks.detach()
    tile_of, column_of, tile_ptr, entries, filters = _tile_tables(layer)

    groups, pair_entries = live_pairs(topology)
    position = np.full((len(layer.tiles), topology.entries), -1, dtype=np.int64)
    sizes = np.diff(tile_ptr)
    position[np.repeat(np.arange(len(layer.tiles)), sizes), entries] = np.arange(len(entries))
    rows = position[tile_of[groups], pair_entries]
    if rows.size and rows.min() < 0:
        lost = groups[int(rows.argmin())]
        raise ValueError(
            f"layer {layer.name!r}: the tile of filter group {lost} lacks entries of the group's pattern"
        )
    # One row per (pair, filter of the block); the filters that a cropped last group lacks are left out, for
    # their columns belong to the next group of the tile.
    offsets = np.arange(topology.out_block)
    exists = (groups[:, None] * topology.out_block + offsets) < topology.geometry.out_channels
    columns = (column_of[groups][:, None] + offsets)[exists]
    rows = np.broadcast_to(rows[:, None], exists.shape)[exists]

    here = blocks.device
    weight = blocks.new_zeros((len(entries), layer.tile_width, topology.in_block))
    source = blocks[torch.from_numpy(exists).to(here)]
    weight[torch.from_numpy(rows).to(here), torch.from_numpy(columns).to(here)] = source
    weight = weight.to(device=device or here, dtype=dtype or blocks.dtype).transpose(1, 2)
    if weight.dtype != torch.int8:  # whose kernel reads adjacent input channels, as they lie already
        weight = weight.contiguous()
    if backend == "native":
        from lhc_kernels.cpu import loaded  # here, for importing this file shall load no kernels

        if loaded():
            weight = torch.ops.lhc.native_weight(weight, topology.geometry.in_channels)

    host = torch.device("cpu")
    where = host if backend in HOST_TABLE_BACKENDS else weight.device
    tables = [tile_ptr, np.append(entries, 0), filters]
    return Packed(weight, [torch.from_numpy(t.astype(np.int32)).to(where) for t in tables])


def pack(
    layer: LayerPlan,
    weight: Tensor,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "reference",
) -> Packed:
    """Pack a dense weight [O, I, kh, kw] along the plan's tiles; see ``pack_blocks``."""
    return pack_blocks(layer, blocks_from_weight(layer.topology, weight), dtype, device, backend)


def _tile_tables(layer: LayerPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lay the groups out over the tiles.

    Returns the tile of each group, its first column there, tile_ptr [T + 1], entries [E] and filters
    [T, tile_width].
    """
    topology, width = layer.topology, layer.tile_width
    tile_of = np.full(topology.groups, -1, dtype=np.int64)
    column_of = np.zeros(topology.groups, dtype=np.int64)
    filters = np.full((len(layer.tiles), width), -1, dtype=np.int64)
    for t, tile in enumerate(layer.tiles):
        if len(set(tile.entries)) != len(tile.entries):
            raise ValueError(f"layer {layer.name!r}: tile {t} holds an entry twice")
        column = 0
        for group in tile.groups:
            if not 0 <= group < topology.groups:
                raise ValueError(
                    f"layer {layer.name!r}: tile {t} holds filter group {group}, "
                    f"outside 0..{topology.groups - 1}"
                )
            members = topology.group_filters(group)
            if column + len(members) > width:
                raise ValueError(
                    f"layer {layer.name!r}: tile {t} holds more filters than its {width} columns"
                )
            if tile_of[group] >= 0:
                raise ValueError(f"layer {layer.name!r}: filter group {group} is in two tiles")
            tile_of[group], column_of[group] = t, column
            filters[t, column : column + len(members)] = members
            column += len(members)
    if tile_of.size and tile_of.min() < 0:
        raise ValueError(f"layer {layer.name!r}: filter group {int(tile_of.argmin())} is in no tile")
    tile_ptr = np.cumsum([0] + [len(tile.entries) for tile in layer.tiles])
    entries = np.fromiter((e for tile in layer.tiles for e in tile.entries), np.int64, int(tile_ptr[-1]))
    if entries.size and not (entries.min() >= 0 and entries.max() < topology.entries):
        raise ValueError(
            f"layer {layer.name!r}: a tile holds an entry outside 0..{topology.entries - 1}, "
            "the entries of the layer"
        )
    return tile_of, column_of, tile_ptr, entries, filters


def _check_blocks(topology: LayerTopology, blocks: Tensor) -> None:
    pairs = sum(len(topology.pattern_of(g)) for g in range(topology.groups))
    expected = (pairs, topology.out_block, topology.in_block)
    if tuple(blocks.shape) != expected:
        raise ValueError(
            f"layer {topology.name!r}: the blocks have shape {tuple(blocks.shape)}, expected {expected}"
        )


def _padded_shape(topology: LayerTopology) -> tuple[int, int, int, int]:
    channels = topology.in_blocks * topology.in_block
    return (topology.groups * topology.out_block, channels, *topology.geometry.kernel)


def _block_view(topology: LayerTopology, padded: Tensor) -> Tensor:
    """View a padded dense weight as [groups, in_blocks, kh, kw, out_block, in_block]."""
    kh, kw = topology.geometry.kernel
    shape = (topology.groups, topology.out_block, topology.in_blocks, topology.in_block, kh, kw)
    return padded.view(shape).permute(0, 2, 4, 5, 1, 3)


def _block_index(topology: LayerTopology, device: torch.device) -> tuple[Tensor, ...]:
    groups, entries = live_pairs(topology)
    taps, blocks = np.divmod(entries, topology.in_blocks)
    rows, columns = np.divmod(taps, topology.geometry.kernel[1])
    return tuple(torch.from_numpy(index).to(device) for index in (groups, blocks, rows, columns))
