"""Which filters should change places so that those under one pattern are alike: swaps, while they gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .channels.exchanging import Exchanges
from .clustering import cluster

ROUNDS = 50  # of swaps; most layers need fewer than twenty


@dataclass(frozen=True)
class Clustered:
    """A layer whose filters are to share patterns.

    Attributes:
        atoms: int64 [O], the channels that its filters write, in order.
        worth: float [O, entries], what each entry is worth to a filter.
        live: bool [O, entries], what each filter has now.
        home: int64 [O], the cluster that the filter at each place belongs to.
        counts: how many entries the pattern of each cluster has.
    """

    atoms: np.ndarray
    worth: np.ndarray
    live: np.ndarray
    home: np.ndarray
    counts: Sequence[int]

    def patterns(self, order: np.ndarray) -> np.ndarray:
        """Return the entries worth most to each cluster's filters, bool [clusters, entries].

        Args:
            order: int64 [O], which filter lies at each place.
        """
        members = self.home == np.arange(len(self.counts))[:, None]
        sums = members.astype(self.worth.dtype) @ self.worth[order]
        found = np.zeros(sums.shape, dtype=bool)
        for row, values, count in zip(found, sums, self.counts, strict=True):
            row[np.argsort(-values, kind="stable")[:count]] = True
        return found

    def places(self, order: np.ndarray) -> np.ndarray:
        """Return which filter lies at each place, int64 [O], where atoms changed places, [atoms]."""
        filters = np.full(len(order), -1)
        filters[self.atoms] = np.arange(len(self.atoms))
        return filters[order[self.atoms]]


def reorder(layers: Sequence[Clustered], exchanges: Exchanges, count: int) -> np.ndarray:
    """Return the atom that should go to the place of each, int64 [count].

    Starts from where they are and swaps the pairs that gain most, those of all layers that write the same
    channels together, so that nothing gets worse: clusters keep their places and the sizes of their patterns.

    Args:
        layers: those whose filters may move.
        exchanges: which atoms may change places.
        count: number of atoms.
    """
    order = np.arange(count)
    for part, movable in _independent(layers, exchanges, count):
        found = [_swapped(part, movable, start) for start in (order, *_fresh_starts(part, movable, order))]
        order = max(found, key=lambda one: _kept(part, [_gains(layer, one) for layer in part], one))
    return order


def _fresh_starts(
    layers: Sequence[Clustered], movable: Sequence[np.ndarray], order: np.ndarray
) -> list[np.ndarray]:
    """Return where filters lie that were clustered one by one, if they are free to: no start, or one."""
    free = any(moves.shape == (len(layers[0].atoms), 1) for moves in movable)
    if len(layers) > 1 or not free:
        return []
    (layer,) = layers
    sizes = np.bincount(layer.home).tolist()
    _, home = cluster(layer.worth, layer.live, sizes)
    start = order.copy()
    start[layer.atoms[np.argsort(layer.home, kind="stable")]] = layer.atoms[np.argsort(home, kind="stable")]
    return [start]


def _independent(
    layers: Sequence[Clustered], exchanges: Exchanges, count: int
) -> list[tuple[list[Clustered], list[np.ndarray]]]:
    """Return layers that share channels, with the swaps that concern them, each as an array [units, size]."""
    home = np.full(count, -1)
    for index, layer in enumerate(layers):
        met = np.unique(home[layer.atoms])
        home[layer.atoms] = index
        home[np.isin(home, met[met >= 0])] = index
    movable = [unit[:, None] for unit in exchanges.units] + list(exchanges.wholes)
    parts = []
    for one in np.unique(home[home >= 0]):
        mine = [layer for layer in layers if home[layer.atoms[0]] == one]
        parts.append((mine, [moves for moves in movable if home[moves[0, 0]] == one]))
    return parts


def _swapped(layers: list[Clustered], movable: list[np.ndarray], order: np.ndarray) -> np.ndarray:
    gains = [_gains(layer, order) for layer in layers]
    best = _kept(layers, gains, order)
    for _ in range(ROUNDS):
        before = best
        for moves in movable:
            pairs = _pairs(layers, gains, moves, order, best)
            # Each gains under the patterns as they are. All together may not: then the better half does.
            while len(pairs):
                trial = order.copy()
                trial[moves[pairs]] = order[moves[pairs[:, ::-1]]]
                fresh = [_gains(layer, trial) for layer in layers]
                kept = _kept(layers, fresh, trial)
                if kept > best * (1 + 1e-9):
                    order, gains, best = trial, fresh, kept
                    break
                pairs = pairs[: len(pairs) // 2]
        if not best > before * (1 + 1e-6):
            break
    return order


def _gains(layer: Clustered, order: np.ndarray) -> np.ndarray:
    """What each filter would keep in each cluster, float [O, clusters]."""
    found: np.ndarray = layer.worth @ layer.patterns(layer.places(order)).T.astype(layer.worth.dtype)
    return found


def _kept(layers: Sequence[Clustered], gains: Sequence[np.ndarray], order: np.ndarray) -> float:
    return math.fsum(
        float(gain[layer.places(order), layer.home].sum()) for layer, gain in zip(layers, gains, strict=True)
    )


def _pairs(
    layers: Sequence[Clustered],
    gains: Sequence[np.ndarray],
    moves: np.ndarray,
    order: np.ndarray,
    kept: float,
) -> np.ndarray:
    """Return disjoint pairs of rows of ``moves`` whose swap gains, int64 [pairs, 2], the best first."""
    moving = np.zeros((len(moves), len(moves)))  # [unit, to the place of]
    for layer, gain in zip(layers, gains, strict=True):
        slots = np.full(len(order), -1)
        slots[layer.atoms] = np.arange(len(layer.atoms))
        if slots[moves[0, 0]] < 0:
            continue
        places = layer.places(order)
        for column in slots[moves.T]:
            filters, homes = places[column], layer.home[column]
            moving += gain[filters][:, homes] - gain[filters, homes][:, None]
    saved = np.triu(moving + moving.T, 1)
    ones, others = np.nonzero(saved > 1e-12 * kept)
    taken = np.zeros(len(moves), dtype=bool)
    pairs = []
    for index in np.argsort(-saved[ones, others], kind="stable"):
        pair = [ones[index], others[index]]
        if not taken[pair].any():
            taken[pair] = True
            pairs.append(pair)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
