"""Which channels may change places without changing what a network computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lhc_triton.layers import LHCConv2d

from .reading import ChannelGraph
from .rearranging import settle, take_channels

Blocked = tuple[np.ndarray, int]  # the atoms of an axis, and the block size that its mask has there


@dataclass(frozen=True)
class Exchanges:
    """Which channels may change places.

    Attributes:
        units: each int64 [size], atoms of which any two may change places.
        wholes: each int64 [units, size], units that may change places as wholes, member by member.
    """

    units: tuple[np.ndarray, ...]
    wholes: tuple[np.ndarray, ...]


def find_exchanges(graph: ChannelGraph, blocked: Iterable[Blocked]) -> Exchanges:
    """Return which channels may change places.

    Two may where every value of the network that has one of them has the other as often: then the layers that
    write and read them can be rearranged alike. A mask over blocks adds that both lie in one block, or that
    whole blocks of equal size change places: the mask then keeps its blocks.

    Args:
        graph: the channels of the network.
        blocked: axes whose masks have to keep their blocks.
    """
    count = len(graph.pinned)
    label = np.zeros(count, dtype=np.int64)
    for value in graph.values:
        label = _refined(label, np.bincount(value, minlength=count))
    free = ~graph.pinned & np.isin(np.arange(count), np.concatenate([*graph.values, np.empty(0, np.int64)]))
    for layer in graph.layers:
        if layer.outputs is not None:
            free &= np.bincount(layer.outputs, minlength=count) < 2
    keys = []
    for atoms, block in blocked:
        free &= np.bincount(atoms, minlength=count) < 2
        key = np.full(count, -1)
        key[atoms] = np.arange(len(atoms)) // block
        keys.append(key)
    unit = label
    for key in keys:
        unit = _refined(unit, key)
    units = [np.flatnonzero(free & (unit == one)) for one in np.unique(unit[free])]
    alike: dict[tuple[int, ...], list[np.ndarray]] = {}
    for atoms in units:
        places = [int(key[atoms[0]]) for key in keys]
        whole = [
            place >= 0 and int((key == place).sum()) == len(atoms)
            for key, place in zip(keys, places, strict=True)
        ]
        # -2 stands for any whole block: of the same size, and so of the same block size.
        kind = (-2 if w else place for w, place in zip(whole, places, strict=True))
        alike.setdefault((int(label[atoms[0]]), len(atoms), *kind), []).append(atoms)
    return Exchanges(
        tuple(atoms for atoms in units if len(atoms) > 1),
        tuple(np.stack(group) for group in alike.values() if len(group) > 1),
    )


def _refined(label: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return labels that tell apart what either of two told apart."""
    return np.unique(np.stack([label, key]), axis=1, return_inverse=True)[1].reshape(-1)


def exchange_channels(model: nn.Module, graph: ChannelGraph, order: np.ndarray) -> dict[str, Tensor]:
    """Rearrange the layers of a network, in place, so that its channels change places.

    Args:
        model: the network whose channels they are, or a copy of it.
        graph: its channels.
        order: int64 [atoms], the atom that goes to the place of each; by `find_exchanges`' rules.

    Returns:
        By layer, the input block (of an LHCConv2d's topology) that went to each block's place.
    """
    blocks = {}
    for layer in graph.layers:
        module = model.get_submodule(layer.name)
        outputs = None if layer.outputs is None else _places(layer.outputs, order)
        inputs = None if layer.inputs is None else _places(layer.inputs, order)
        if isinstance(module, LHCConv2d) and inputs is not None:
            blocks[layer.name] = inputs[:: module.config.in_block] // module.config.in_block
        if any(one is not None and not _in_place(one) for one in (outputs, inputs)):
            settle(module)
            take_channels(module, outputs, inputs)
    return blocks


def _places(atoms: np.ndarray, order: np.ndarray) -> Tensor:
    """Return which place of an axis each of its places takes over; one that has an atom twice keeps order."""
    taken = np.empty_like(atoms)
    taken[np.argsort(order[atoms], kind="stable")] = np.argsort(atoms, kind="stable")
    return torch.from_numpy(taken)


def _in_place(taken: Tensor) -> bool:
    return bool((taken == torch.arange(len(taken))).all())
