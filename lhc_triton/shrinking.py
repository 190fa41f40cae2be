"""Filters and channels that do nothing are removed for real: what is left is a smaller dense network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .channels.reading import ChannelGraph, Layer
from .channels.rearranging import add_to_bias, settle, summed_taps, take_channels
from .channels.running import check_same
from .channels.tracing import channels_of, checked_inputs, copied
from .conversion import ModelT
from .layers import LHCConv2d
from .tables import aligned


@dataclass(frozen=True)
class ShrunkLayer:
    """What was removed of one convolution or linear layer.

    Attributes:
        layer: the module's name.
        filters_before: filters (or features) that it had.
        filters: those that are left.
        channels_before: input channels (or features) that it had.
        channels: those that are left.
        weights_before: weights that it had, bias not counted.
        weights: those that are left.
    """

    layer: str
    filters_before: int
    filters: int
    channels_before: int
    channels: int
    weights_before: int
    weights: int


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink` did.

    Attributes:
        layers: those that lost something, in the order in which the network calls them.
        filters_before: filters of all its convolutions.
        filters: those that are left.
    """

    layers: tuple[ShrunkLayer, ...]
    filters_before: int
    filters: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)

    @property
    def headline(self) -> str:
        """The total in one phrase."""
        if not self.layers:
            return "nothing to remove: every filter and channel does something, or has to stay"
        removed = self.filters_before - self.filters
        return f"removed {removed} of {self.filters_before} filters: zero, or read by nothing"

    def __str__(self) -> str:
        if not self.layers:
            return self.headline
        rows = [("layer", "filters", "channels", "weights")]
        rows += [
            (
                row.layer,
                f"{row.filters_before} -> {row.filters}",
                f"{row.channels_before} -> {row.channels}",
                f"{row.weights_before:,} -> {row.weights:,}",
            )
            for row in self.layers
        ]
        return "\n".join([*aligned(rows), self.headline])


def shrink(
    model: ModelT,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    report: Callable[[ShrinkReport], object] | None = None,
) -> ModelT:
    """Remove filters and channels that do nothing from a network, in place, and return the model.

    A filter goes where nobody needs it: its output is 0 everywhere (its weights are 0 and so is its bias, or
    its batch norm has gamma and beta of 0), or the weights of all that read it are 0. A filter whose output
    is another constant goes as well, into the bias of what reads it, unless a border of zeros lies between,
    for there the constant is missing. Its channel goes from convolution, norm and readers: the outputs stay
    the same up to rounding, in eval mode. What is not understood (other operations on a feature map, outputs
    of the network, groups, a module that is called twice, has hooks or computes its weights) keeps its
    channels. A layer of which everything would go keeps one filter.

    A frozen LHCConv2d stays one, and its topology comes along: it loses whole filter groups and whole input
    blocks only; dead filters of a living group stay, here and in every layer whose channels are added to
    theirs. ``to_dense`` first frees those as well. Parameters stay the same objects with fewer values; make
    the optimiser anew. NaN or infinity in a channel that was removed reaches nobody any more.

    Args:
        model: any network that torch.fx can trace.
        example_input: its input, or the tuple of its inputs; run a few times, in eval mode.
        report: called with a ShrinkReport once the model is smaller; ``print`` shows it.

    Raises:
        ValueError: torch.fx cannot trace the model, it does not run on the example, it has modules that it
            does not call in eval mode, or it would compute something else: nothing is changed then.
        TypeError: an argument has the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    inputs = checked_inputs(example_input)
    graph = channels_of(model, inputs)
    kept = needed_channels(graph, model)
    if not kept.all():
        trial = copied(model)
        keep_channels(trial, graph, kept)
        check_same(model, trial, inputs)
        found = keep_channels(model, graph, kept)
    else:
        found = _report(model, graph, {})
    if report is not None:
        report(found)
    return model


def needed_channels(graph: ChannelGraph, model: nn.Module) -> np.ndarray:
    """Return which channels must stay, bool [atoms]: those that reach something that stays.

    Args:
        graph: the network's channels.
        model: the network; its LHCConv2d layers say which channels come and go together.
    """
    needed = graph.pinned.copy()
    while True:
        before = int(needed.sum())
        for layer in reversed(graph.layers):
            if layer.inputs is not None and layer.live is not None:
                rows = layer.live if layer.outputs is None else layer.live[needed[layer.outputs]]
                needed[layer.inputs[rows.any(0) & ~_foldable(layer)]] = True
        if int(needed.sum()) == before:
            for layer in graph.layers:
                if layer.outputs is not None and not needed[layer.outputs].any():
                    needed[layer.outputs[0]] = True  # a layer of no filters is none
            for part in _parts(graph, model):
                if needed[part].any():
                    needed[part] = True
            if int(needed.sum()) == before:
                return needed


def _foldable(layer: Layer) -> np.ndarray:
    """Which inputs of a layer are constants that it can do without, bool [I]."""
    assert layer.constants is not None
    return ~np.isnan(layer.constants) if layer.folds else layer.constants == 0


def _parts(graph: ChannelGraph, model: nn.Module) -> list[np.ndarray]:
    """Return the atoms that come and go together: filter groups and input blocks of LHCConv2d layers."""
    parts = []
    for layer in graph.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, LHCConv2d):
            for atoms, block in (
                (layer.outputs, module.config.out_block),
                (layer.inputs, module.config.in_block),
            ):
                assert atoms is not None
                parts += [atoms[start : start + block] for start in range(0, len(atoms), block)]
    return parts


def keep_channels(model: nn.Module, graph: ChannelGraph, kept: np.ndarray) -> ShrinkReport:
    """Remove all other channels from a network's layers, in place, and tell what that removed.

    Args:
        model: the network whose channels they are, or a copy of it.
        graph: its channels.
        kept: bool [atoms], from `needed_channels`.
    """
    sizes = {}
    for layer in graph.layers:
        module = model.get_submodule(layer.name)
        outputs, inputs = _indices(layer.outputs, kept), _indices(layer.inputs, kept)
        if outputs is None and inputs is None:
            continue
        settle(module)
        sizes[layer.name] = _size(module)
        if layer.inputs is not None and layer.constants is not None:
            folded = ~kept[layer.inputs] & (np.nan_to_num(layer.constants) != 0)
            if folded.any():
                constants = torch.from_numpy(layer.constants[folded])
                taps = summed_taps(module, torch.from_numpy(np.flatnonzero(folded)))
                add_to_bias(module, taps @ constants.to(taps.device))
        take_channels(module, outputs, inputs)
    return _report(model, graph, sizes)


def _indices(atoms: np.ndarray | None, kept: np.ndarray) -> Tensor | None:
    """Which places of a layer's channels stay; None for all."""
    if atoms is None or kept[atoms].all():
        return None
    return torch.from_numpy(np.flatnonzero(kept[atoms]))


def _size(module: nn.Module) -> tuple[int, int, int]:
    """Filters, input channels and weights of a layer; zeros for a norm."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, module.weight.numel()
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return module.out_channels, module.in_channels, module.weight.numel()
    return 0, 0, 0


def _report(
    model: nn.Module, graph: ChannelGraph, before: Mapping[str, tuple[int, int, int]]
) -> ShrinkReport:
    rows = []
    for name, (filters, channels, weights) in before.items():
        left = _size(model.get_submodule(name))
        if filters:
            rows.append(ShrunkLayer(name, filters, left[0], channels, left[1], weights, left[2]))
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    filters = sum(m.out_channels for m in model.modules() if isinstance(m, convolutions))
    gone = sum(row.filters_before - row.filters for row in rows)
    return ShrinkReport(tuple(rows), filters + gone, filters)
