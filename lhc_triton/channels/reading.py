"""Reads from a traced network which channels are the same, who writes them, and who reads them.

Every channel of every value gets a number, its atom. Layers that mix channels (convolutions without groups,
linear layers) give their outputs new atoms; what treats each channel by itself (depthwise convolutions,
norms, activations, pooling, flattening) passes atoms on; arithmetic between values makes atoms one. What is
not understood pins the atoms that it reads: those channels stay where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from lhc_triton.conversion import evaluating
from lhc_triton.errors import one_line
from lhc_triton.finite import all_finite
from lhc_triton.layers import LHCConv2d, convolves_plainly

from .operations import (
    NORMS,
    POINTWISE_FUNCTIONS,
    POINTWISE_METHODS,
    POINTWISE_MODULES,
    POOLING_FUNCTIONS,
    POOLING_MODULES,
    asks_for_pixels_only,
    given,
    is_flattening,
    is_global_mean,
    is_running_dropout,
    keeps_constants,
    may_alias,
    overwrites,
)

_WEIGHTS = frozenset({"weight", "bias", "effects"})
_BUFFERS = frozenset(
    {"topology", "masked_filters", "rigid", "running_mean", "running_var", "num_batches_tracked"}
)


class ChannelError(ValueError):
    """The network's channels cannot be followed; the message is one line."""


@dataclass(frozen=True)
class Layer:
    """A layer with weights along channels.

    Attributes:
        name: the module's name.
        outputs: int64 [O], the atoms that it writes; None for a linear layer, whose features all stay.
        inputs: int64 [I] (of a linear layer, its features), the atoms that it reads; None where it treats
            each channel by itself and reads what it writes.
        live: bool [O, I] (of a linear layer [1, I]), whether any weight between the two is not 0.
        constants: float64 [I], the values of the channels that are the same everywhere, NaN for the others.
        folds: whether a constant input may go into the bias: no zeros are put around the image.
    """

    name: str
    outputs: np.ndarray | None
    inputs: np.ndarray | None = None
    live: np.ndarray | None = None
    constants: np.ndarray | None = None
    folds: bool = False


@dataclass(frozen=True)
class ChannelGraph:
    """The channels of a network.

    Attributes:
        layers: in calling order.
        pinned: bool [atoms], the channels that must stay where they are.
        values: the atoms of every value of the network, int64 [C]; of equal ones the first.
    """

    layers: tuple[Layer, ...]
    pinned: np.ndarray
    values: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Value:
    """The channels of a tensor: their atoms [C], and the constants among them as a tensor [C], else NaN."""

    atoms: np.ndarray
    constants: Tensor

    @property
    def known(self) -> Tensor:
        """Which channels are constant, bool [C]."""
        return ~self.constants.isnan()

    def pixel(self, rank: int) -> Tensor:
        """Return one position of it, [1, C, 1, 1] or [1, C]; 0 where a channel is not constant."""
        return self.constants.nan_to_num(0.0).view(1, -1, *([1] * (rank - 2)))


def _computed(atoms: np.ndarray, known: Tensor, pixel: Tensor) -> _Value:
    """Return the value of which this pixel was computed out of constants, where they were known."""
    found = pixel.flatten()
    return _Value(atoms, torch.where(known & found.isfinite(), found, torch.nan))


class _Atoms:
    """Numbers for channels, which may turn out to be the same: the lowest then stands for all of them."""

    def __init__(self) -> None:
        self._root = np.empty(0, dtype=np.int64)
        self._pinned = np.empty(0, dtype=bool)  # of roots

    def fresh(self, count: int, pinned: bool = False) -> np.ndarray:
        atoms = np.arange(len(self), len(self) + count)
        self._root = np.append(self._root, atoms)
        self._pinned = np.append(self._pinned, np.full(count, pinned))
        return atoms

    def roots(self, atoms: np.ndarray) -> np.ndarray:
        return self._root[atoms]

    def pin(self, atoms: np.ndarray) -> None:
        self._pinned[self._root[atoms]] = True

    def pinned(self, atoms: np.ndarray) -> np.ndarray:
        return self._pinned[self._root[atoms]]

    def tie(self, some: np.ndarray, others: np.ndarray) -> None:
        while True:
            one, other = self._root[some], self._root[others]
            if (one == other).all():
                return
            least, most = np.minimum(one, other), np.maximum(one, other)
            target = np.arange(len(self))
            np.minimum.at(target, most, least)  # one atom may be tied to several, which the next round joins
            np.logical_or.at(self._pinned, target[most], self._pinned[most])
            self._root = target[self._root]

    def __len__(self) -> int:
        return len(self._root)


def read_channels(traced: fx.GraphModule, inputs: Sequence[Tensor]) -> ChannelGraph:
    """Run a traced network once, in eval mode, and return its channels.

    Args:
        traced: the network; convolutions are leaves of the graph. It is left as it was but for what its own
            forward changes.
        inputs: the example.

    Raises:
        ChannelError: it does not run.
    """
    reader = _Reader(traced)
    with evaluating(traced):
        reader.run(*[value.clone() for value in inputs])
    return reader.found()


class _Reader(fx.Interpreter):
    """Runs a graph, and follows the channels of each value."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self.atoms = _Atoms()
        self.seen: dict[fx.Node, _Value] = {}
        self.layers: list[Layer] = []
        self.modules = dict(traced.named_modules())
        nodes = list(traced.graph.nodes)
        self.order = {node: index for index, node in enumerate(nodes)}
        self.calls = Counter(str(n.target) for n in nodes if n.op == "call_module")
        self.read = {str(n.target).rpartition(".")[0] for n in nodes if n.op == "get_attr"}
        owners = Counter(id(p) for _, p in traced.named_parameters(remove_duplicate=False))
        self.shared = {key for key, count in owners.items() if count > 1}

    def found(self) -> ChannelGraph:
        """Return what was found, every atom by the number that stands for all it is the same as."""
        every = np.arange(len(self.atoms))
        root = self.atoms.roots(every)
        values = {root[value.atoms].tobytes(): root[value.atoms] for value in self.seen.values()}
        layers = tuple(
            replace(
                layer,
                outputs=None if layer.outputs is None else root[layer.outputs],
                inputs=None if layer.inputs is None else root[layer.inputs],
            )
            for layer in self.layers
        )
        return ChannelGraph(layers, self.atoms.pinned(every), tuple(values.values()))

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:  # the network's own code: anything may come out of it
            raise ChannelError(f"the traced network does not run: {one_line(error)}") from error
        value = self._value(n, result)
        if value is not None:
            self.seen[n] = value
        return result

    def _value(self, node: fx.Node, result: Any) -> _Value | None:
        if node.op not in ("call_module", "call_function", "call_method"):
            return self._opaque(node, result)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        value = None if source is None else self.seen.get(source)
        before: Tensor | None = None if source is None or value is None else self.env[source]
        if before is not None and asks_for_pixels_only(node, before.dim()):
            return None
        found = None
        if isinstance(result, Tensor) and not self._is_overwritten_for_others(node):
            if value is not None and before is not None:
                found = self._passed(node, value, before, result)
            found = found or self._combined(node, result)
        return found or self._opaque(node, result)

    def _opaque(self, node: fx.Node, result: Any) -> _Value | None:
        """Pin what a node reads; what it gives has new channels, which stay where they are."""
        for source in node.all_input_nodes:
            if source in self.seen:
                self.atoms.pin(self.seen[source].atoms)
        if node.op in ("output", "get_attr") or not isinstance(result, Tensor) or result.dim() not in (2, 4):
            return None
        return self._unknown(self.atoms.fresh(result.shape[1], pinned=True), result)

    def _unknown(self, atoms: np.ndarray, result: Tensor) -> _Value:
        kind = result.dtype if result.is_floating_point() else torch.float32
        return _Value(atoms, torch.full((len(atoms),), torch.nan, dtype=kind, device=result.device))

    def _is_overwritten_for_others(self, node: fx.Node) -> bool:
        """Return whether a node writes to a value that somebody reads later."""
        if not overwrites(node, self._module(node)):
            return False
        value = node.all_input_nodes[0] if node.all_input_nodes else None
        while value is not None:
            if any(self.order[user] > self.order[node] for user in value.users):
                return True
            aliasing = value.all_input_nodes and may_alias(value, self._module(value))
            value = value.all_input_nodes[0] if aliasing else None
        return False

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _passed(self, node: fx.Node, value: _Value, before: Tensor, result: Tensor) -> _Value | None:
        """Return the value of a node that reads one value; None if the node is not understood."""
        module: Any = self._module(node)
        kind = type(module)
        rank = before.dim()
        if module is not None and (module._forward_hooks or self._has_foreign_pre_hooks(module)):
            return None
        if is_flattening(node, module, before, result):
            pixels = before[0, 0].numel()
            return _Value(value.atoms.repeat(pixels), value.constants.repeat_interleave(pixels))
        if is_running_dropout(node):
            return value
        if kind in POOLING_MODULES or node.target in POOLING_FUNCTIONS or is_global_mean(node, rank):
            if rank != 4 or result.shape[1] != before.shape[1]:
                return None
            kept = value.constants
            if not keeps_constants(node, module):
                kept = torch.where(kept == 0, kept, torch.nan)
            return _Value(value.atoms, kept)
        if kind in POINTWISE_MODULES or (kind is nn.PReLU and module.num_parameters == 1):
            return _computed(value.atoms, value.known, module(value.pixel(rank)))
        if module is None or not self._is_ours(str(node.target), module) or len(node.args) != 1:
            return None
        if kind in NORMS:
            return self._norm(str(node.target), module, value)
        if kind is nn.PReLU:
            self.layers.append(Layer(str(node.target), value.atoms))
            return _computed(value.atoms, value.known, module(value.pixel(rank)))
        if isinstance(module, nn.Conv2d) and convolves_plainly(module) and rank == 4:
            return self._convolution(str(node.target), module, value, result)
        if kind is nn.ConvTranspose2d and rank == 4 and module.groups == 1:
            live = (module.weight != 0).flatten(2).any(2).T.cpu().numpy()
            return self._mixed(str(node.target), value, live, result)
        if kind is nn.Linear and rank == 2:
            constants = self._constants(value)
            weight = module.weight.detach()
            live = (weight != 0).any(0, keepdim=True).cpu().numpy()
            self.layers.append(Layer(str(node.target), None, value.atoms, live, constants, True))
            return self._unknown(self.atoms.fresh(result.shape[1], pinned=True), result)
        return None

    def _combined(self, node: fx.Node, result: Tensor) -> _Value | None:
        """Return the value of arithmetic or concatenation; None for anything else."""
        sources = node.all_input_nodes
        ranks = {self.env[source].dim() for source in sources if source in self.seen}
        whole = all(source in self.seen for source in sources) and "out" not in node.kwargs
        if not whole or len(ranks) != 1 or node.op == "call_module":
            return None
        (rank,) = ranks
        if node.target in (torch.cat, torch.concat):
            parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
            dim: Any = given(node, ("dim",)).get("dim", 0)
            if not isinstance(parts, list | tuple) or dim % rank != 1:
                return None
            values = [self.seen[part] for part in parts]
            atoms = np.concatenate([value.atoms for value in values])
            return _Value(atoms, torch.cat([value.constants for value in values]))
        methods = POINTWISE_METHODS if node.op == "call_method" else POINTWISE_FUNCTIONS
        values = [self.seen[source] for source in sources]
        if node.target not in methods or {len(value.atoms) for value in values} != {result.shape[1]}:
            return None  # of different lengths, one channel is spread over many
        for other in values[1:]:
            self.atoms.tie(values[0].atoms, other.atoms)
        pixels = {source: self.seen[source].pixel(rank).clone() for source in sources}
        args: Any = fx.node.map_arg(node.args, pixels.__getitem__)
        named: Any = fx.node.map_arg(node.kwargs, pixels.__getitem__)
        function: Any = node.target
        if node.op == "call_method":
            function, args = getattr(args[0], str(node.target)), args[1:]
        known = torch.stack([value.known for value in values]).all(0)
        return _computed(values[0].atoms, known, function(*args, **named))

    def _has_foreign_pre_hooks(self, module: nn.Module) -> bool:
        return any(not isinstance(h, prune.BasePruningMethod) for h in module._forward_pre_hooks.values())

    def _is_ours(self, name: str, module: nn.Module) -> bool:
        """Return whether a layer's tensors are all known, and used by this one call alone."""
        parameters = {n.removesuffix("_orig") for n in module._parameters}
        buffers = {n for n in module._buffers if not n.endswith("_mask")}
        tensors = [p for p in module._parameters.values() if p is not None]
        return (
            self.calls[name] == 1
            and name not in self.read
            and parameters <= _WEIGHTS
            and buffers <= _BUFFERS
            and not self.shared & {id(tensor) for tensor in tensors}
            and all(map(all_finite, tensors))
            and (module.frozen if isinstance(module, LHCConv2d) else True)
        )

    def _constants(self, value: _Value) -> np.ndarray:
        """Return the constants that a layer may count on: nobody unknown had a hand on them."""
        constants = value.constants.detach().double().cpu().numpy()
        return np.where(self.atoms.pinned(value.atoms), np.nan, constants)

    def _norm(self, name: str, module: Any, value: _Value) -> _Value | None:
        if module.running_mean is None or not bool(
            (module.running_mean.isfinite() & module.running_var.isfinite()).all()
        ):
            return None
        self.layers.append(Layer(name, value.atoms))
        known = value.known if module.weight is None else value.known | (module.weight == 0)
        return _computed(value.atoms, known, module(value.pixel(4)))

    def _convolution(self, name: str, module: nn.Conv2d, value: _Value, result: Tensor) -> _Value | None:
        weight = (module.masked_weight() if isinstance(module, LHCConv2d) else module.weight).detach()
        folds = not (module.padding_mode == "zeros" and _pads(module))
        constants = self._constants(value)
        if module.groups == 1:
            live = (weight != 0).flatten(2).any(2).cpu().numpy()
            found = self._mixed(name, value, live, result, constants, folds)
        elif module.groups == module.in_channels == module.out_channels:
            live = np.diag((weight != 0).flatten(1).any(1).cpu().numpy())
            self.layers.append(Layer(name, value.atoms))
            found = self._unknown(value.atoms, result)
        else:
            return None
        # A filter is constant where all that it reads is, and no border of zeros tells positions apart.
        varying = np.isnan(constants) | ((constants != 0) & (not folds))
        known = np.asarray(~live[:, varying].any(1))
        if not known.any():
            return found
        sums = weight.sum((2, 3), dtype=torch.float64).cpu().numpy()
        if module.groups > 1:
            sums = np.diag(sums[:, 0])
        shift = 0.0 if module.bias is None else module.bias.detach().double().cpu().numpy()
        sums = np.where(known[:, None] & live, sums, 0.0) @ np.nan_to_num(constants) + shift
        filled = torch.from_numpy(np.where(known, sums, np.nan)).to(found.constants)
        return _Value(found.atoms, filled)

    def _mixed(
        self,
        name: str,
        value: _Value,
        live: np.ndarray,
        result: Tensor,
        constants: np.ndarray | None = None,
        folds: bool = False,
    ) -> _Value:
        constants = self._constants(value) if constants is None else constants
        atoms = self.atoms.fresh(result.shape[1])
        self.layers.append(Layer(name, atoms, value.atoms, live, constants, folds))
        return self._unknown(atoms, result)


def _pads(conv: nn.Conv2d) -> bool:
    if conv.padding == "valid":
        return False
    if conv.padding == "same":
        return any(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return any(size for size in conv.padding if isinstance(size, int))
