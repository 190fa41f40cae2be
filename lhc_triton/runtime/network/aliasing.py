"""Which values of a traced graph may share memory, and which nodes write to it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lhc_triton.runtime.op.dense import FusedConv2d

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
# What never returns memory of its inputs, unless it is told to work in place.
_FRESH_MODULES = (
    FusedConv2d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Softmax, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_FRESH_FUNCTIONS: frozenset[Any] = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.matmul,
        operator.pow, operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne,
        torch.add, torch.sub, torch.mul, torch.div, torch.matmul, torch.bmm, torch.cat, torch.stack,
        torch.where, torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.softmax, torch.mean, torch.sum,
        torch.argmax, torch.pow, torch.sqrt, torch.rsqrt, torch.maximum, torch.minimum, torch.cumsum,
        torch.gather, torch.take, torch.index_select, torch.flip, torch.roll,
        F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh,
        F.softmax, F.log_softmax, F.linear, F.conv2d, F.max_pool2d, F.avg_pool2d, F.grid_sample, F.embedding,
        F.layer_norm, F.group_norm, F.scaled_dot_product_attention,
    }
)  # fmt: skip
# Their ``inplace`` may be given by position.
_MAY_OVERWRITE = frozenset({F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.hardswish, F.hardsigmoid})
_FRESH_METHODS = frozenset(
    {"add", "sub", "mul", "div", "matmul", "bmm", "relu", "sigmoid", "tanh", "exp", "softmax", "mean", "sum",
     "argmax", "clone", "pow", "sqrt", "rsqrt", "cumsum", "gather", "take", "index_select", "flip", "roll"}
)  # fmt: skip


class Aliases:
    """What the nodes of a graph read, share and write.

    Attributes:
        order: the nodes.
        position: of each node in the graph's order.
        roots: of each node, the nodes whose memory its value may share: itself, and its inputs' roots unless
            it is known to be fresh.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.order = list(traced.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.order)}
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.order:
            self.roots[node] = self._roots(node)

    def module(self, node: fx.Node) -> Any:
        """Return the module that a node calls, or None."""
        return self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None

    def written(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the values that a node changes in place."""
        out = _nodes(node.kwargs.get("out"))
        if out:
            return out
        in_place = False
        if node.op == "call_function":
            in_place = (
                node.target in _IN_PLACE
                or _is_in_place(getattr(node.target, "__name__", ""))
                or node.kwargs.get("inplace") is True
                or (
                    (node.target in _MAY_OVERWRITE or node.target not in _FRESH_FUNCTIONS)
                    and any(arg is True for arg in node.args[1:])
                )
            )
        elif node.op == "call_method":
            in_place = _is_in_place(str(node.target))
        elif node.op == "call_module":
            in_place = bool(getattr(self.module(node), "inplace", False))
        if not in_place:
            return ()
        return _nodes(node.args[0] if node.args else next(iter(node.kwargs.values()), None))

    def written_roots(self, nodes: Iterable[fx.Node] | None = None) -> frozenset[fx.Node]:
        """Return the roots of everything that some nodes (by default all) write to."""
        values = (value for node in (self.order if nodes is None else nodes) for value in self.written(node))
        return frozenset().union(*(self.roots[value] for value in values))

    def written_between(
        self, read: frozenset[fx.Node], after: fx.Node, until: fx.Node, ignored: Iterable[fx.Node] = ()
    ) -> bool:
        """Return whether a value in ``read`` may change between two nodes, so that no read can be put off."""
        between = self.order[self.position[after] + 1 : self.position[until]]
        skip = set(ignored)
        return bool(self.written_roots(node for node in between if node not in skip) & read)

    def _roots(self, node: fx.Node) -> frozenset[fx.Node]:
        fresh = False
        if node.op == "call_function":
            fresh = node.target in _FRESH_FUNCTIONS
        elif node.op == "call_method":
            fresh = node.target in _FRESH_METHODS
        elif node.op == "call_module":
            fresh = isinstance(self.module(node), _FRESH_MODULES)
        if fresh and not self.written(node):
            return frozenset({node})
        return frozenset({node}).union(*(self.roots[source] for source in node.all_input_nodes))


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    """Return the nodes in an argument, which may be a list of them."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return tuple(found)


def _is_in_place(name: str) -> bool:
    """Return whether torch names an operation so that it writes to its first argument."""
    if name.startswith("__"):  # __setitem__, __iadd__ and their like, but not __invert__
        return name == "__setitem__" or name in {f"__{one.__name__}__" for one in _IN_PLACE}
    return name.endswith("_")
