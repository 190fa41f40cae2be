"""Fewer, wider patterns: filter groups are clustered, and each cluster shares one pattern.

A tile runs well from 64 filters of one pattern on. Groups that kept almost the same entries are made to keep
exactly the same, at the price of the weights in which they differ; a fine-tuning makes up for those.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .conversion import FilterFn, lhc_layers
from .layers import LHCConv2d
from .planning import plan
from .tables import aligned
from .topology import block_means

ROUNDS = 50  # of swaps or reassignments; most layers need fewer than ten
Members = list[np.ndarray]


@dataclass(frozen=True)
class ConsolidatedLayer:
    """What consolidation made of one layer.

    Attributes:
        layer: the module's name.
        groups: filter groups.
        patterns_before: distinct patterns before.
        patterns: distinct patterns now.
        live_before: live weights before.
        live_weights: live weights now, those included that start at 0.
        lost: share of the sum of squared live weights that went.
    """

    layer: str
    groups: int
    patterns_before: int
    patterns: int
    live_before: int
    live_weights: int
    lost: float


@dataclass(frozen=True)
class Consolidation:
    """What `consolidate` did.

    Attributes:
        layers: by layer, in the order of model.named_modules().
        lost: share of the sum of all squared live weights that went.
        planned_us: the planner's time of these layers in us, with ``target_us``; else None.
    """

    layers: tuple[ConsolidatedLayer, ...]
    lost: float
    planned_us: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "groups", "patterns", "live weights", "lost")]
        rows += [
            (
                row.layer,
                str(row.groups),
                f"{row.patterns_before} -> {row.patterns}",
                f"{row.live_before:,} -> {row.live_weights:,}",
                f"{row.lost:.3f}",
            )
            for row in self.layers
        ]
        lines = aligned(rows)
        return "\n".join([*lines, f"lost {self.lost:.4f} of the sum of squared weights"])


def consolidate(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    *,
    patterns: int | None = None,
    share: int | None = None,
    target_us: float | None = None,
    filter_fn: FilterFn | None = None,
) -> Consolidation:
    """Leave a frozen network fewer and wider patterns, in place, and return what that lost.

    For the time between the stages, or after `prune` and before the fine-tuning. The filter groups of a layer
    are clustered so that as much as possible of their weights' squares stays. A cluster's pattern has as many
    entries as its groups had on average, rounded down; entries that are new to a group start with weights of
    0. So a layer has hardly more live weights than before. Clusters need not be adjacent: the planner finds
    equal patterns anywhere in a layer. The method is ours.

    Args:
        model: a network whose LHCConv2d layers are frozen.
        example_input: its input, or the tuple of its inputs; needed for ``target_us`` only.
        patterns: at most so many patterns in each layer.
        share: at least so many filters under each pattern, as evenly as that goes; a narrower layer gets one
            pattern. 64 by default, where none of the three is given.
        target_us: what the planner may predict for all planned layers together, in us: the smallest share of
            8, 16, 32, ... filters is taken that reaches it.
        filter_fn: called as filter_fn(name, layer) for every LHCConv2d; return False to leave it as it is.

    Raises:
        ValueError: more than one aim, or one out of range, no layer is frozen, or no share reaches
            the time (the least that can be is named); nothing is changed then.
        TypeError: an argument has the wrong type.
    """
    aims = {"patterns": patterns, "share": share, "target_us": target_us}
    given = [name for name, value in aims.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: give one of patterns, share, target_us")
    for name in ("patterns", "share"):
        value = aims[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}={value!r} is not an int: give 1 or more")
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not supported: give 1 or more")
    layers = {n: la for n, la in lhc_layers(model).items() if filter_fn is None or filter_fn(n, la)}
    learning = [name for name, layer in layers.items() if not layer.frozen]
    if not layers or learning:
        what = f"layer {learning[0]!r} still learns its topology" if learning else "there is no LHCConv2d"
        raise ValueError(f"{what}: call freeze() or prune() before consolidate()")
    if target_us is not None:
        return _to_time(model, example_input, target_us, filter_fn)
    return _applied(layers, lambda groups, out_block: _clusters(groups, out_block, patterns, share))


def _to_time(
    model: nn.Module, example_input: Any, target_us: float, filter_fn: FilterFn | None
) -> Consolidation:
    if isinstance(target_us, bool) or not isinstance(target_us, int | float):
        raise TypeError(f"target_us={target_us!r} is not a number: give a time in us")
    if not (math.isfinite(target_us) and target_us > 0):
        raise ValueError(f"target_us={target_us} is not supported: give a time in us, above 0")
    if example_input is None:
        raise ValueError("target_us needs an example_input: times depend on its size")
    widest = max(layer.out_channels for layer in lhc_layers(model).values())
    times: dict[int, float] = {}
    for share in (8 * 2**k for k in range(max(1, math.ceil(math.log2(widest / 8)) + 1))):
        trial = copy.deepcopy(model)
        consolidate(trial, share=share, filter_fn=filter_fn)
        times[share] = plan(trial, example_input).totals.planned_us or math.inf
        if times[share] <= target_us:
            found = consolidate(model, share=share, filter_fn=filter_fn)
            return Consolidation(found.layers, found.lost, times[share])
    raise ValueError(
        f"target_us={target_us:g} cannot be reached: the least is predicted at {min(times.values()):.0f} us;"
        " give that or more, or prune further"
    )


def _applied(
    layers: Mapping[str, LHCConv2d], clusters: Callable[[int, int], list[int] | int]
) -> Consolidation:
    rows, whole, gone = [], 0.0, 0.0
    for name, layer in layers.items():
        config = layer.config
        with torch.no_grad():
            squares = layer.masked_weight().square()
            energy = block_means(squares, config.in_block, config.out_block)  # crops apart, as good as sums
            old = layer.topology.clone()
            live = old.flatten(1).cpu().numpy()
            wanted = clusters(len(live), min(config.out_block, layer.out_channels))
            rows_of = _cluster(energy.flatten(1).cpu().numpy(), live, wanted)
            new = torch.from_numpy(rows_of).view(old.shape).to(old.device)
            before, kept = float(squares.sum(dtype=torch.float64)), int(layer.live_weights())
            layer.weight.copy_(layer.masked_weight())
            layer.set_topology(new, allow_dead=True)
            after = float(layer.masked_weight().square().sum(dtype=torch.float64))
        rows.append(
            ConsolidatedLayer(
                name,
                len(live),
                len(np.unique(live, axis=0)),
                len(np.unique(rows_of, axis=0)),
                kept,
                int(layer.live_weights()),
                max(0.0, 1 - after / before) if before else 0.0,
            )
        )
        whole, gone = whole + before, gone + max(0.0, before - after)
    return Consolidation(tuple(rows), gone / whole if whole else 0.0)


def _clusters(groups: int, out_block: int, patterns: int | None, share: int | None) -> list[int] | int:
    """How many clusters there may be, or the sizes of them."""
    if patterns is not None:
        return patterns
    count = max(1, groups // math.ceil((share or 64) / out_block))
    return [len(part) for part in np.array_split(np.arange(groups), count)]


def _cluster(energy: np.ndarray, live: np.ndarray, wanted: list[int] | int) -> np.ndarray:
    """Return the new pattern of every group, bool [groups, entries].

    Args:
        energy: float [groups, entries], what each entry is worth to a group.
        live: bool [groups, entries], what each group has now.
        wanted: the sizes of the clusters; or how many there may be, of any size.
    """
    distinct = np.unique(live, axis=0)
    if isinstance(wanted, int) and len(distinct) <= wanted:
        return live.copy()
    # All-zero groups are drawn to nothing; what they have counts a little.
    worth = energy + live * (1e-9 * max(float(energy.max()), 1e-30))
    members = _grown(worth, wanted if isinstance(wanted, list) else [1] * wanted)
    if isinstance(wanted, int):
        members = _reassigned(worth, live, members)
    else:
        members = _swapped(worth, live, members)
    rows = np.zeros_like(live)
    for part in members:
        rows[part] = _pattern(worth, live, part)
    return rows


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
