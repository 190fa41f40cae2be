"""A smaller copy of a model, without the filters and channels that do nothing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lhc_triton.channels.reading import ChannelError, read_channels
from lhc_triton.runtime.network.copying import duplicate, has_hooks
from lhc_triton.runtime.network.fusion import conv_weight
from lhc_triton.runtime.network.sites import is_fusible
from lhc_triton.runtime.network.snapshots import preserved
from lhc_triton.runtime.network.tracing import TraceError, trace
from lhc_triton.runtime.saved.operations import GraphError, check_listed
from lhc_triton.shrinking import ShrinkReport, keep_channels, needed_channels

_FEW = 16


@dataclass(frozen=True)
class Smaller:
    """A copy of a model with fewer filters and channels, and what went."""

    work: nn.Module
    removed: ShrinkReport

    @property
    def remark(self) -> str:
        """What people should know of it, in one line."""
        most = max(self.removed.layers, key=lambda row: row.weights_before - row.weights)
        return f"{self.removed.headline} (most weights in {most.layer!r}: lhc.shrink shows every layer)"


def smaller(work: nn.Module, inputs: Sequence[Tensor], graph: fx.GraphModule | None) -> Smaller | None:
    """Return a smaller copy of a model, where anything can go; see ``lhc.shrink``.

    A network whose graph no file can hold keeps its sizes: what is saved of it has to fit into the model.

    Args:
        work: the working copy; it is left as it was.
        inputs: what it takes, of any size.
        graph: its trace, where there is one already.
    """
    if not _has_dead(work) or any(map(has_hooks, work.modules())):
        return None
    try:
        traced = graph or trace(work, len(inputs))
        _check_storable(traced)
        with preserved(traced):
            channels = read_channels(traced, inputs)
    except (TraceError, GraphError, ChannelError):
        return None
    kept = needed_channels(channels, work)
    if kept.all():
        return None
    small = duplicate(work, {})
    return Smaller(small, keep_channels(small, channels, kept))


def _check_storable(traced: fx.GraphModule) -> None:
    """Raise GraphError unless a file can hold the graph, once convolutions are replaced."""
    parts: dict[str, Any] = {}
    for node in traced.graph.nodes:
        name = str(node.target)
        if node.op == "call_module":
            module = traced.get_submodule(name)
            parts[name] = nn.Identity() if is_fusible(module) else module
        elif node.op == "get_attr":
            parts[name] = operator.attrgetter(name)(traced)
    check_listed(fx.GraphModule(parts, traced.graph))


def _has_dead(work: nn.Module) -> bool:
    """Return whether anything at all may be removed: a look at the weights that costs little."""
    return any(map(_has_dead_channels, work.modules()))


def _has_dead_channels(module: nn.Module) -> bool:
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        return module.weight is not None and bool((module.weight == 0).any())
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        weight = conv_weight(module) if isinstance(module, nn.Conv2d) else module.weight.detach()
        return _has_dead_rows(weight) or _has_dead_rows(weight.transpose(0, 1))
    return False


def _has_dead_rows(weight: Tensor) -> bool:
    # A few weights of each row tell of most dense layers that no row is dead.
    return not any(bool((part != 0).flatten(1).any(1).all()) for part in (weight[:, :_FEW], weight))
