"""Fewer, wider patterns: filter groups are clustered, and each cluster shares one pattern.

A tile runs well from 64 filters of one pattern on. Groups that kept almost the same entries are made to keep
exactly the same, at the price of the weights in which they differ; a fine-tuning makes up for those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .channels.exchanging import exchange_channels, find_exchanges
from .channels.running import check_same
from .channels.tracing import channels_of, checked_inputs, copied
from .clustering import cluster
from .conversion import FilterFn, lhc_layers
from .layers import LHCConv2d
from .planning import plan
from .reordering import Clustered, reorder
from .tables import aligned
from .topology import block_means


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
        moved: filters that changed places.
    """

    layer: str
    groups: int
    patterns_before: int
    patterns: int
    live_before: int
    live_weights: int
    lost: float
    moved: int = 0


@dataclass(frozen=True)
class Consolidation:
    """What `consolidate` did.

    Attributes:
        layers: by layer, in the order of model.named_modules().
        lost: share of the sum of all squared live weights that went.
        planned_us: the planner's time of these layers in us, with ``target_us``; else None.
        lost_in_place: with ``permute``, the share that would have gone without it; else None.
    """

    layers: tuple[ConsolidatedLayer, ...]
    lost: float
    planned_us: float | None = None
    lost_in_place: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "groups", "patterns", "live weights", "lost", "moved")]
        rows += [
            (
                row.layer,
                str(row.groups),
                f"{row.patterns_before} -> {row.patterns}",
                f"{row.live_before:,} -> {row.live_weights:,}",
                f"{row.lost:.3f}",
                str(row.moved),
            )
            for row in self.layers
        ]
        total = f"lost {self.lost:.4f} of the sum of squared weights"
        if self.lost_in_place is None:
            return "\n".join([*aligned([row[:-1] for row in rows]), total])
        return "\n".join(
            [*aligned(rows), f"{total}; {self.lost_in_place:.4f} with every filter in its place"]
        )


def consolidate(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    *,
    patterns: int | None = None,
    share: int | None = None,
    target_us: float | None = None,
    permute: bool = False,
    filter_fn: FilterFn | None = None,
) -> Consolidation:
    """Leave a frozen network fewer and wider patterns, in place, and return what that lost.

    For the time between the stages, or after `prune` and before the fine-tuning. The filter groups of a layer
    are clustered so that as much as possible of their weights' squares stays. A cluster's pattern has as many
    entries as its groups had on average, rounded down; entries that are new to a group start with weights of
    0. So a layer has hardly more live weights than before. Clusters need not be adjacent: the planner finds
    equal patterns anywhere in a layer. The method is ours.

    With ``permute``, filters first change places with others of their layer so that those under one pattern
    are alike: norms and the readers' input channels are rearranged along, which by itself leaves what the
    network computes as it is. Where a reader is an LHCConv2d, channels change places within its input blocks,
    or as whole blocks. Layers that are added to each other move together. As many entries stay as without it,
    and never less of the weights.

    Args:
        model: a network whose LHCConv2d layers are frozen.
        example_input: its input, or the tuple of its inputs; needed for ``target_us`` and ``permute`` only.
        patterns: at most so many patterns in each layer.
        share: at least so many filters under each pattern, as evenly as that goes; a narrower layer gets one
            pattern. 64 by default, where none of the three is given.
        target_us: what the planner may predict for all planned layers together, in us: the smallest share of
            8, 16, 32, ... filters is taken that reaches it.
        permute: let filters change places where the network allows it; see `find_exchanges`. Parameters stay
            the same objects, their values move: make the optimiser anew.
        filter_fn: called as filter_fn(name, layer) for every LHCConv2d; return False to leave its patterns as
            they are.

    Raises:
        ValueError: more than one aim, or one out of range, no layer is frozen, no share reaches the time (the
            least that can be is named), or ``permute`` cannot follow the network's channels (torch.fx cannot
            trace it, for example); nothing is changed then.
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
        return _to_time(model, example_input, target_us, permute, filter_fn)
    parts = {name: _Part.of(layer, patterns, share) for name, layer in layers.items()}
    if not permute:
        return _applied(parts, {name: part.rows for name, part in parts.items()})
    if example_input is None:
        raise ValueError("permute needs an example_input: the network is run to follow its channels")
    return _permuted(model, checked_inputs(example_input), parts)


def _to_time(
    model: nn.Module, example_input: Any, target_us: float, permute: bool, filter_fn: FilterFn | None
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
        trial = copied(model)
        consolidate(trial, example_input, share=share, permute=permute, filter_fn=filter_fn)
        times[share] = plan(trial, example_input, whole=False).totals.planned_us or math.inf
        if times[share] <= target_us:
            found = consolidate(model, example_input, share=share, permute=permute, filter_fn=filter_fn)
            return replace(found, planned_us=times[share])
    raise ValueError(
        f"target_us={target_us:g} cannot be reached: the least is predicted at {min(times.values()):.0f} us;"
        " give that or more, or prune further"
    )


@dataclass(frozen=True)
class _Part:
    """A layer, and what becomes of it where its filters stay in place.

    Attributes:
        layer: the layer.
        live_weights: how many it has before anything is changed.
        live: bool [groups, entries], what it has before.
        energy: float [O, entries], the squares of each filter's live weights, summed over an input block.
        rows: bool [groups, entries], the new patterns.
        home: int64 [groups], the cluster of each group.
    """

    layer: LHCConv2d
    live_weights: int
    live: np.ndarray
    energy: np.ndarray
    rows: np.ndarray
    home: np.ndarray

    @classmethod
    @torch.no_grad()
    def of(cls, layer: LHCConv2d, patterns: int | None, share: int | None) -> _Part:
        config = layer.config
        squares = layer.masked_weight().square()
        energy = block_means(squares, config.in_block, config.out_block)  # crops apart, as good as sums
        live = layer.topology.flatten(1).cpu().numpy()
        wanted = _clusters(len(live), min(config.out_block, layer.out_channels), patterns, share)
        rows, home = cluster(energy.flatten(1).cpu().numpy(), live, wanted)
        sums = _filter_energy(squares, config.in_block).flatten(1).cpu().numpy()
        return cls(layer, int(layer.live_weights()), live, sums, rows, home)

    @property
    def group(self) -> np.ndarray:
        """The filter group at each filter's place, int64 [O]."""
        return np.arange(len(self.energy)) // self.layer.config.out_block

    @property
    def kept(self) -> float:
        """What stays of the squares where every filter stays in place."""
        return float(self.energy[self.rows[self.group]].sum())

    def clustered(self, atoms: np.ndarray) -> Clustered:
        """Return what reordering needs to know of it; a pattern keeps the number of its entries."""
        worth = self.energy + self.live[self.group] * (1e-9 * max(float(self.energy.max()), 1e-30))
        counts = [int(self.rows[np.argmax(self.home == one)].sum()) for one in range(self.home.max() + 1)]
        return Clustered(atoms, worth, self.live[self.group], self.home[self.group], counts)


def _permuted(model: nn.Module, inputs: tuple[Tensor, ...], parts: Mapping[str, _Part]) -> Consolidation:
    """Consolidate with filters in other places, where that loses less."""
    graph = channels_of(model, inputs)
    blocked = []
    for layer in graph.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, LHCConv2d) and layer.inputs is not None and layer.outputs is not None:
            blocked.append((layer.inputs, module.config.in_block))
            if layer.name not in parts:  # its filters may move as far as its patterns stay what they are
                blocked.append((layer.outputs, module.config.out_block))
    found = {
        layer.name: parts[layer.name].clustered(layer.outputs)
        for layer in graph.layers
        if layer.name in parts
        and layer.outputs is not None
        and len(np.unique(layer.outputs)) == len(layer.outputs)
    }
    order = reorder(list(found.values()), find_exchanges(graph, blocked), len(graph.pinned))
    rows = {name: part.rows for name, part in parts.items()}
    moved = {}
    for name, one in found.items():
        places = one.places(order)
        moved[name] = int((places != np.arange(len(places))).sum())
        if moved[name]:
            rows[name] = one.patterns(places)[parts[name].home]
    whole = sum(float(part.energy.sum()) for part in parts.values())
    in_place = max(0.0, 1 - sum(part.kept for part in parts.values()) / whole) if whole else 0.0
    if any(moved.values()):
        trial = copied(model)
        exchange_channels(trial, graph, order)
        check_same(model, trial, inputs)
        for name, blocks in exchange_channels(model, graph, order).items():
            if name in parts:
                shape = parts[name].layer.topology.shape
                rows[name] = rows[name].reshape(shape)[:, blocks.numpy()].reshape(rows[name].shape)
    return replace(_applied(parts, rows, moved), lost_in_place=in_place)


def _applied(
    parts: Mapping[str, _Part], rows_of: Mapping[str, np.ndarray], moved: Mapping[str, int] | None = None
) -> Consolidation:
    """Give every layer its new patterns, and tell what that lost."""
    rows, whole, gone = [], 0.0, 0.0
    for name, part in parts.items():
        layer, new = part.layer, torch.from_numpy(rows_of[name])
        with torch.no_grad():
            layer.weight.copy_(layer.masked_weight())
            before = float(layer.weight.square().sum(dtype=torch.float64))
            layer.set_topology(new.view(layer.topology.shape), allow_dead=True)
            after = float(layer.masked_weight().square().sum(dtype=torch.float64))
        rows.append(
            ConsolidatedLayer(
                name,
                len(part.live),
                len(np.unique(part.live, axis=0)),
                len(np.unique(rows_of[name], axis=0)),
                part.live_weights,
                int(layer.live_weights()),
                max(0.0, 1 - after / before) if before else 0.0,
                (moved or {}).get(name, 0),
            )
        )
        whole, gone = whole + before, gone + max(0.0, before - after)
    return Consolidation(tuple(rows), gone / whole if whole else 0.0)


def _filter_energy(squares: Tensor, in_block: int) -> Tensor:
    """Return each filter's sums over input blocks, float64 [O, Gi, kh, kw], of squares [O, I, kh, kw]."""
    filters, channels, kh, kw = squares.shape
    block = min(in_block, channels)
    padded = nn.functional.pad(squares, (0, 0, 0, 0, 0, -channels % block))
    return padded.reshape(filters, -1, block, kh, kw).sum(2, dtype=torch.float64)


def _clusters(groups: int, out_block: int, patterns: int | None, share: int | None) -> list[int] | int:
    """How many clusters there may be, or the sizes of them."""
    if patterns is not None:
        return patterns
    count = max(1, groups // math.ceil((share or 64) / out_block))
    return [len(part) for part in np.array_split(np.arange(groups), count)]
