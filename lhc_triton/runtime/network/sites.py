"""Finds convolutions in a traced network together with what their epilogue can absorb, and rewrites it.

The passes work on ``torch.fx`` graphs and are pure: ``find_sites`` only reads, ``rewrite`` returns a new
module. A value is absorbed only where nobody else can see it, so a rewritten network computes the same
numbers even where modules are shared, values have several users, or operations work in place.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lhc_triton.layers import convolves_plainly
from lhc_triton.runtime.network.aliasing import Aliases
from lhc_triton.runtime.network.formats import restore_formats
from lhc_triton.runtime.network.tracing import Seen, Shapes
from lhc_triton.runtime.op.epilogue import ACTIVATIONS

_ADDS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add})
_FOLDABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Site:
    """One call of a convolution, and what follows it closely enough to become its epilogue.

    Attributes:
        layer: the convolution's name in the network.
        module: name of the fused module that will serve this call; calls of one convolution with equal
            epilogues share it.
        norm: name of the folded batch norm, or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        pool: "none" or "max2x2".
        nodes: names of the graph nodes it replaces, convolution first.
        add: name of the node that adds the residual, or None.
        residual: which operand of that addition is the residual (0 or 1).
    """

    layer: str
    module: str
    norm: str | None = None
    activation: str = "none"
    pool: str = "none"
    nodes: tuple[str, ...] = ()
    add: str | None = None
    residual: int = 1

    @property
    def epilogue(self) -> str:
        """The absorbed operations as people write them, for example "bn+add+relu"; "-" if none."""
        parts = [
            "bn" if self.norm else "",
            "add" if self.add else "",
            self.activation if self.activation != "none" else "",
            "maxpool" if self.pool != "none" else "",
        ]
        return "+".join(part for part in parts if part) or "-"


def is_fusible(module: nn.Module) -> bool:
    """Return whether we can rebuild a convolution: a plain one with zero borders."""
    return convolves_plainly(module) and module.padding_mode == "zeros"


def find_sites(traced: fx.GraphModule, shapes: Shapes) -> tuple[Site, ...]:
    """Return every call of a fusible convolution with the operations its epilogue can absorb.

    Batch norm directly after the convolution, then a residual addition of equal shape, then an activation,
    then a 2x2 max pool of stride 2; each only while nothing else reads the value in between.

    Args:
        traced: what ``trace`` returned, in eval mode.
        shapes: what ``record_shapes`` saw.
    """
    finder = _Finder(traced, shapes)
    sites: list[Site] = []
    absorbed: set[str] = set()
    variants: dict[tuple[str, str | None, str, str], str] = {}
    taken: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op != "call_module" or not is_fusible(traced.get_submodule(node.target)):
            continue
        site = finder.grow(node, absorbed)
        absorbed.update(site.nodes)
        key = (site.layer, site.norm, site.activation, site.pool)
        if key not in variants:
            count = taken.get(site.layer, 0)
            taken[site.layer] = count + 1
            variants[key] = site.layer if count == 0 else f"{site.layer}__{count}"
        sites.append(Site(**{**site.__dict__, "module": variants[key]}))
    return tuple(sites)


class _Finder:
    """Grows one site at a time; holds what it must know about the whole graph."""

    def __init__(self, traced: fx.GraphModule, seen: Shapes) -> None:
        self.traced = traced
        self.seen = seen
        self.aliases = Aliases(traced)

    def grow(self, conv: fx.Node, absorbed: set[str]) -> Site:
        """Return the longest site that starts at this convolution."""
        nodes = [conv]
        norm: str | None = None
        add: fx.Node | None = None
        residual = 1
        activation = pool = "none"
        read = self.aliases.roots[conv_input(conv)]

        def follow() -> fx.Node | None:
            users = list(nodes[-1].users)
            if len(users) != 1 or users[0].name in absorbed:
                return None
            return None if self.aliases.written_between(read, nodes[-1], users[0], nodes) else users[0]

        user = follow()
        if user is not None and self._is_foldable_norm(user, conv):
            nodes.append(user)
            norm = str(user.target)
            user = follow()
        if user is not None and (operand := self._residual_operand(user, nodes[-1])) is not None:
            nodes.append(user)
            add, residual = user, operand
            # from the addition on, the residual must hold still as well
            read = read | self.aliases.roots[user.args[residual]]  # type: ignore[index]
            user = follow()
        if user is not None and (found := self._activation(user, nodes[-1])) is not None:
            nodes.append(user)
            activation = found
            user = follow()
        if user is not None and self._is_max2x2(user, nodes[-1]):
            nodes.append(user)
            pool = "max2x2"
        layer = str(conv.target)
        return Site(
            layer,
            layer,
            norm,
            activation,
            pool,
            tuple(node.name for node in nodes),
            add.name if add is not None else None,
            residual,
        )

    def _is_foldable_norm(self, node: fx.Node, conv: fx.Node) -> bool:
        module = self.aliases.module(node)
        return (
            type(module) in _FOLDABLE_NORMS
            and _takes_only(node, conv)
            and not module.training
            and module.running_mean is not None
            and module.running_var is not None
            and module.num_features == self.traced.get_submodule(str(conv.target)).out_channels
        )

    def _residual_operand(self, node: fx.Node, value: fx.Node) -> int | None:
        """Return which operand of an addition is a residual that ``value``'s epilogue may add, or None."""
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not method and not (node.op == "call_function" and node.target in _ADDS):
            return None
        if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
            return None
        first, second = node.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return None
        if _unlike(self.seen.get(first.name), self.seen.get(second.name)):
            return None
        operand = 1 if first is value else 0
        in_place = bool(self.aliases.written(node))
        if operand == 0 and in_place and (len(first.users) > 1 or self.aliases.roots[first] != {first}):
            return None  # somebody else would have seen the residual change
        return operand

    def _activation(self, node: fx.Node, value: fx.Node) -> str | None:
        """Return which activation of ``value`` a node is; None for any other node."""
        kind = type(self.aliases.module(node)) if node.op == "call_module" else None
        for name, known in ACTIVATIONS.items():
            if kind in known.modules or (node.op == "call_method" and node.target in known.methods):
                return name if _takes_only(node, value) else None
            if node.op == "call_function" and node.target in known.functions:
                plain = not set(node.kwargs) - {"inplace", "input"}
                given = node.args[0] if node.args else node.kwargs.get("input")
                return name if plain and given is value else None
        return None

    def _is_max2x2(self, node: fx.Node, value: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.aliases.module(node)
            return (
                type(module) is nn.MaxPool2d
                and _takes_only(node, value)
                and _pair(module.kernel_size) == (2, 2)
                and _pair(module.stride) == (2, 2)
                and _pair(module.padding) == (0, 0)
                and _pair(module.dilation) == (1, 1)
                and not module.ceil_mode
                and not module.return_indices
            )
        if node.op != "call_function" or node.target is not F.max_pool2d or not node.args:
            return False
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        stride = given.get("stride")
        return (
            node.args[0] is value
            and _pair(given.get("kernel_size")) == (2, 2)
            and (stride is None or _pair(stride) == (2, 2))
            and _pair(given.get("padding", 0)) == (0, 0)
            and _pair(given.get("dilation", 1)) == (1, 1)
            and not given.get("ceil_mode", False)
            and not given.get("return_indices", False)
        )


def _unlike(a: Seen | None, b: Seen | None) -> bool:
    return a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype)


def conv_input(node: fx.Node) -> fx.Node:
    """Return the value a convolution's node reads."""
    return node.args[0] if node.args else node.kwargs["input"]  # type: ignore[return-value]


def _takes_only(node: fx.Node, value: fx.Node) -> bool:
    arguments = [*node.args, *node.kwargs.values()]
    return len(arguments) == 1 and arguments[0] is value


def _pair(value: Any) -> tuple[Any, Any] | None:
    if isinstance(value, int):
        return (value, value)
    return (value[0], value[-1]) if isinstance(value, tuple | list) and 1 <= len(value) <= 2 else None


def rewrite(
    traced: fx.GraphModule,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    formats: Mapping[str, str] | None = None,
) -> fx.GraphModule:
    """Return a network in which each site is one call of its fused module.

    Args:
        traced: the graph the sites were found in; it is not changed, but shares its other modules.
        sites: in the graph's order.
        modules: the fused modules by ``Site.module``; called with the input and, where the site adds a
            residual, the residual.
        formats: the memory formats of the model's own values, see ``tracing.record_formats``; by default none
            is restored. They are kept as ``meta["formats"]`` of the network.
    """
    own = dict(formats or {})
    formats = dict(own)
    graph = copy.deepcopy(traced.graph)
    named = {node.name: node for node in graph.nodes}
    for site in sites:
        chain = [named[name] for name in site.nodes]
        arguments = [conv_input(chain[0])]
        if site.add is not None:
            arguments.append(named[site.add].args[site.residual])
        with graph.inserting_before(chain[-1]):
            # inserted as a plain node: the module arrives once the graph stands on its own
            fused = graph.create_node("call_module", site.module, tuple(arguments))
        chain[-1].replace_all_uses_with(fused)
        if chain[-1].name in formats:
            formats[fused.name] = formats[chain[-1].name]
        for node in reversed(chain):
            graph.erase_node(node)
    root = nn.Module()
    shell = fx.GraphModule(root, fx.Graph(), traced._get_name())
    for node in graph.nodes:
        if node.op == "call_module":
            target = str(node.target)
            shell.add_submodule(
                target, modules[target] if target in modules else traced.get_submodule(target)
            )
        elif node.op == "get_attr":
            node.target = _copy_attribute(traced, shell, str(node.target), modules)
    shell.graph = graph
    shell.eval()
    restore_formats(shell, formats)
    shell.meta["formats"] = own  # for a file, from which the same network is to be made again
    setattr(type(shell), "__call__", _call)  # noqa: B010  (its class is its own)
    return shell


def _call(network: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Call a network as any module; torch.fx would print a traceback where one raises an error."""
    return nn.Module.__call__(network, *inputs, **named)


def _copy_attribute(source: nn.Module, target: nn.Module, name: str, replaced: Collection[str]) -> str:
    """Give ``target`` the tensor that ``source`` holds under a dotted name; return its name there.

    A weight that the graph reads from a convolution is kept beside what replaces the convolution.
    """
    value = operator.attrgetter(name)(source)
    home, _, last = name.rpartition(".")
    if home in replaced:
        home, last = "", f"read_{name.replace('.', '_')}"
    for part in home.split(".") if home else ():
        if not hasattr(target, part):
            target.add_module(part, nn.Module())
        target = getattr(target, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        target.register_buffer(last, value)
    else:
        setattr(target, last, value)
    return f"{home}.{last}" if home else last
