"""Finds convolutions in a traced network together with what their epilogue can absorb, and rewrites it.

The passes work on ``torch.fx`` graphs and are pure: ``find_sites`` only reads, ``rewrite`` returns a new
module. A value is absorbed only where nobody else can see it, so a rewritten network computes the same
numbers even where modules are shared, values have several users, or operations work in place.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lhc_triton.layers import LHCConv2d
from lhc_triton.runtime.tracing import Shapes

_ADDS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add})
_RELUS: frozenset[Any] = frozenset({F.relu, torch.relu, torch.relu_, F.relu_})
_IN_PLACE: frozenset[Any] = frozenset(
    {
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.imod,
        operator.ipow,
        operator.iand,
        operator.ior,
        operator.ixor,
        operator.setitem,
    }
)
_FRESH_MODULES = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.SiLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
_FRESH_FUNCTIONS: frozenset[Any] = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        torch.add,
        torch.mul,
        torch.cat,
        F.relu,
        F.max_pool2d,
        F.avg_pool2d,
    }
)
_FOLDABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Site:
    """One call of a convolution, and what follows it closely enough to become its epilogue.

    Attributes:
        layer: the convolution's name in the network.
        module: name of the fused module that will serve this call; calls of one convolution with equal
            epilogues share it.
        norm: name of the folded batch norm, or None.
        activation: "none" or "relu".
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
    """Return whether we can rebuild a convolution: exactly nn.Conv2d or LHCConv2d, with zero borders."""
    return type(module) in (nn.Conv2d, LHCConv2d) and module.padding_mode == "zeros"


def find_sites(traced: fx.GraphModule, shapes: Shapes) -> tuple[Site, ...]:
    """Return every call of a fusible convolution with the operations its epilogue can absorb.

    Batch norm directly after the convolution, then a residual addition of equal shape, then ReLU, then a
    2x2 max pool of stride 2; each only while nothing else reads the value in between.

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


def direct_readers(traced: fx.GraphModule, sites: Sequence[Site]) -> dict[str, frozenset[str]]:
    """Return, by fused module, the layers that read its output; none where anything else reads it, too."""
    owner = {node: site.layer for site in sites for node in site.nodes}
    nodes = {node.name: node for node in traced.graph.nodes}
    readers: dict[str, list[str | None]] = {}
    for site in sites:
        users = [owner.get(user.name) for user in nodes[site.nodes[-1]].users]
        readers.setdefault(site.module, []).extend(users)
    return {
        module: frozenset(name for name in found if name is not None) if None not in found else frozenset()
        for module, found in readers.items()
    }


class _Finder:
    """Grows one site at a time; holds what it must know about the whole graph."""

    def __init__(self, traced: fx.GraphModule, seen: Shapes) -> None:
        self.traced = traced
        self.seen = seen
        self.order = list(traced.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.order)}
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.order:
            self.roots[node] = self._roots(node)

    def grow(self, conv: fx.Node, absorbed: set[str]) -> Site:
        """Return the longest site that starts at this convolution."""
        nodes = [conv]
        norm: str | None = None
        add: fx.Node | None = None
        residual = 1
        activation = pool = "none"
        read = self.roots[conv_input(conv)]

        def follow() -> fx.Node | None:
            users = list(nodes[-1].users)
            if len(users) != 1 or users[0].name in absorbed:
                return None
            return None if self._mutated_between(read, nodes[-1], users[0], nodes) else users[0]

        user = follow()
        if user is not None and self._is_foldable_norm(user, conv):
            nodes.append(user)
            norm = str(user.target)
            user = follow()
        if user is not None and (operand := self._residual_operand(user, nodes[-1])) is not None:
            nodes.append(user)
            add, residual = user, operand
            # from the addition on, the residual must hold still as well
            read = read | self.roots[user.args[residual]]  # type: ignore[index]
            user = follow()
        if user is not None and self._is_relu(user, nodes[-1]):
            nodes.append(user)
            activation = "relu"
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
        module = self._module(node)
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
        if self.seen.get(first.name) is None or self.seen.get(first.name) != self.seen.get(second.name):
            return None
        operand = 1 if first is value else 0
        in_place = self._mutated(node) is not None
        if operand == 0 and in_place and (len(first.users) > 1 or self.roots[first] != {first}):
            return None  # somebody else would have seen the residual change
        return operand

    def _is_relu(self, node: fx.Node, value: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self._module(node)) is nn.ReLU and _takes_only(node, value)
        if node.op == "call_method":
            return node.target in ("relu", "relu_") and _takes_only(node, value)
        if node.op != "call_function" or node.target not in _RELUS or set(node.kwargs) - {"inplace", "input"}:
            return False
        return (node.args[0] if node.args else node.kwargs.get("input")) is value

    def _is_max2x2(self, node: fx.Node, value: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._module(node)
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

    def _module(self, node: fx.Node) -> Any:
        return self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _mutated_between(
        self, read: frozenset[fx.Node], after: fx.Node, until: fx.Node, chain: list[fx.Node]
    ) -> bool:
        """Return whether a value in ``read`` may change between two nodes, so that no read can be put off."""
        between = self.order[self.position[after] + 1 : self.position[until]]
        changed = [self._mutated(node) for node in between if node not in chain]
        return any(node is not None and self.roots[node] & read for node in changed)

    def _mutated(self, node: fx.Node) -> fx.Node | None:
        """Return the value a node changes in place, or None."""
        out = node.kwargs.get("out")
        if isinstance(out, fx.Node):
            return out
        in_place = False
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            in_place = (
                node.target in _IN_PLACE
                or (name.endswith("_") and not name.endswith("__"))
                or node.kwargs.get("inplace") is True
                or (
                    node.target not in _FRESH_FUNCTIONS - {F.relu}
                    and any(arg is True for arg in node.args[1:])
                )
            )
        elif node.op == "call_method":
            in_place = str(node.target).endswith("_") and not str(node.target).endswith("__")
        elif node.op == "call_module":
            in_place = bool(getattr(self._module(node), "inplace", False))
        if not in_place:
            return None
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        return first if isinstance(first, fx.Node) else None

    def _roots(self, node: fx.Node) -> frozenset[fx.Node]:
        """Return the nodes whose memory a value may share: itself, and its inputs' unless it is fresh."""
        fresh = False
        if node.op == "call_function":
            fresh = node.target in _FRESH_FUNCTIONS
        elif node.op == "call_module":
            fresh = isinstance(self._module(node), _FRESH_MODULES)
        if fresh and self._mutated(node) is None:
            return frozenset({node})
        return frozenset({node}).union(*(self.roots[source] for source in node.all_input_nodes))


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
    traced: fx.GraphModule, sites: Sequence[Site], modules: Mapping[str, nn.Module]
) -> fx.GraphModule:
    """Return a network in which each site is one call of its fused module.

    Args:
        traced: the graph the sites were found in; it is not changed, but shares its other modules.
        sites: in the graph's order.
        modules: the fused modules by ``Site.module``; called with the input and, where the site adds a
            residual, the residual.
    """
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
            _copy_attribute(traced, shell, str(node.target))
    shell.graph = graph
    _share_planes(shell)
    shell.eval()
    return shell


def _share_planes(network: fx.GraphModule) -> None:
    """Bring a value that several native layers read into planes once, rather than in each of them."""
    native = {n for n, m in network.named_modules() if getattr(m, "backend", None) == "native"}
    finder = _Finder(network, {})
    for node in finder.order:
        readers = [user for user in node.users if user.op == "call_module" and user.target in native]
        if len(readers) < 2 or node.target in native:
            continue
        last = max(readers, key=finder.position.__getitem__)
        if finder._mutated_between(finder.roots[node], node, last, []):
            continue  # later readers see another value
        with network.graph.inserting_after(node):
            planes = network.graph.call_method("contiguous", (node,))
        for reader in readers:
            reader.replace_input_with(node, planes)
    network.recompile()


def _copy_attribute(source: nn.Module, target: nn.Module, name: str) -> None:
    """Give ``target`` the tensor that ``source`` holds under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        source = getattr(source, part)
        if not hasattr(target, part):
            target.add_module(part, nn.Module())
        target = getattr(target, part)
    value = getattr(source, last)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        target.register_buffer(last, value)
    else:
        setattr(target, last, value)
