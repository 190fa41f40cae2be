"""Clusters of filter groups that are to share one pattern, so that most of their worth stays."""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 50  # of swaps or reassignments; most layers need fewer than ten
Members = list[np.ndarray]


def cluster(energy: np.ndarray, live: np.ndarray, wanted: list[int] | int) -> tuple[np.ndarray, np.ndarray]:
    """Return the new pattern of every group, bool [groups, entries], and its cluster, int64 [groups].

    Args:
        energy: float [groups, entries], what each entry is worth to a group.
        live: bool [groups, entries], what each group has now.
        wanted: the sizes of the clusters; or how many there may be, of any size.
    """
    distinct, kinds = np.unique(live, axis=0, return_inverse=True)
    if isinstance(wanted, int) and len(distinct) <= wanted:
        return live.copy(), kinds.reshape(-1)
    # All-zero groups are drawn to nothing; what they have counts a little.
    worth = energy + live * (1e-9 * max(float(energy.max()), 1e-30))
    members = _grown(worth, wanted if isinstance(wanted, list) else [1] * wanted)
    if isinstance(wanted, int):
        members = _reassigned(worth, live, members)
    else:
        members = _swapped(worth, live, members)
    rows, home = np.zeros_like(live), np.empty(len(live), dtype=np.int64)
    for index, part in enumerate(members):
        rows[part], home[part] = _pattern(worth, live, part), index
    return rows, home


def _pattern(worth: np.ndarray, live: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The entries worth most to a cluster, as many as its groups have on average: bool [entries]."""
    count = int(live[part].sum()) // len(part)
    count = max(count, int(live[part].any()))
    order = np.argsort(-worth[part].sum(axis=0), kind="stable")
    row = np.zeros(live.shape[1], dtype=bool)
    row[order[:count]] = True
    return row


def _grown(worth: np.ndarray, sizes: list[int]) -> Members:
    """Grow clusters one after the other around the heaviest group that is left."""
    units = worth / np.maximum(np.linalg.norm(worth, axis=1, keepdims=True), 1e-300)
    left = np.ones(len(worth), dtype=bool)
    members = []
    for size in sizes:
        seed = int(np.where(left, worth.sum(axis=1), -np.inf).argmax())
        likeness = np.where(left, units @ units[seed], -np.inf)
        likeness[seed] = np.inf
        part = np.sort(np.argsort(-likeness, kind="stable")[:size])
        left[part] = False
        members.append(part)
    return members


def _gains(worth: np.ndarray, live: np.ndarray, members: Members) -> np.ndarray:
    """What each group would keep under each cluster's pattern, float [groups, clusters]."""
    return worth @ np.stack([_pattern(worth, live, part) for part in members], axis=1).astype(worth.dtype)


def _kept(gains: np.ndarray, members: Members) -> float:
    return math.fsum(float(gains[part, index].sum()) for index, part in enumerate(members))


def _swapped(worth: np.ndarray, live: np.ndarray, members: Members) -> Members:
    """Swap groups between clusters, the pairs that gain most first, while that keeps more."""
    gains = _gains(worth, live, members)
    best = _kept(gains, members)
    for _ in range(ROUNDS):
        home = np.empty(len(worth), dtype=np.int64)
        for index, part in enumerate(members):
            home[part] = index
        moving = gains[:, home] - gains[np.arange(len(worth)), home][:, None]  # [group, to the place of]
        saved = moving + moving.T
        taken = np.zeros(len(worth), dtype=bool)
        for flat in np.argsort(-np.triu(saved, 1), axis=None, kind="stable"):
            one, other = divmod(int(flat), len(worth))
            if one >= other or not saved[one, other] > 1e-12 * best:
                break
            if not (taken[one] or taken[other]):
                taken[[one, other]] = True
                home[[one, other]] = home[[other, one]]
        trial = [np.flatnonzero(home == index) for index in range(len(members))]
        gains = _gains(worth, live, trial)
        kept = _kept(gains, trial)
        if not kept > best * (1 + 1e-9):
            break
        members, best = trial, kept
    return members


def _reassigned(worth: np.ndarray, live: np.ndarray, members: Members) -> Members:
    """Give every group to the cluster whose pattern keeps most of it, while that keeps more (k-means)."""
    best, found = -1.0, members
    for _ in range(ROUNDS):
        home = _gains(worth, live, members).argmax(axis=1)
        members = [part for index in range(len(members)) if len(part := np.flatnonzero(home == index))]
        kept = _kept(_gains(worth, live, members), members)
        if not kept > best * (1 + 1e-9):
            break
        best, found = kept, members
    return found
