"""One memory format inside an accelerated network, and the model's own wherever somebody could tell.

Fused convolutions write channels_last, whatever the model's own would write. Most operations do not care:
they compute the same numbers and pass the format on. What reads strides (``view``, ``reshape`` as an alias,
the caller of the network) gets the value in the format that it has in the model.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lhc_triton.runtime.network.aliasing import Aliases
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.op.epilogue import like_format

# These compute the same numbers from any strides, and pass them on or write strides of their own.
_MODULES = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    nn.Hardsigmoid, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
    nn.ZeroPad2d, nn.LocalResponseNorm,
)  # fmt: skip
_FUNCTIONS: frozenset[Any] = frozenset(
    {
        operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul,
        operator.truediv, operator.itruediv, operator.neg, torch.add, torch.sub, torch.mul, torch.div,
        torch.cat,
        torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.exp, torch.clamp, torch.mean, torch.sum,
        F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.sigmoid, F.tanh, F.hardswish,
        F.hardsigmoid, F.softplus, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
        F.interpolate, F.pad, F.dropout,
    }
)  # fmt: skip
_METHODS = frozenset(
    {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "relu", "relu_", "sigmoid", "tanh", "clamp",
     "mean", "sum", "size", "dim", "float", "half", "double", "to", "type", "type_as"}
)  # fmt: skip
_SIZES = frozenset({"shape", "dtype", "device", "ndim"})


def restore_formats(network: fx.GraphModule, own: Mapping[str, str]) -> None:
    """Give every reader that could tell the difference its values in the model's own formats, in place.

    Args:
        network: a rewritten network.
        own: the model's formats by node, see ``tracing.record_formats``.
    """
    readers = _Readers(network, own)
    image = next((node for node in readers.aliases.order if own.get(node.name) == "image"), None)
    for node in readers.aliases.order:
        users = readers.telling(node)
        if not users:
            continue
        with network.graph.inserting_after(node):
            if own[node.name] == "input" and image is not None:
                restored = network.graph.call_function(like_format, (node, image))
            else:
                restored = network.graph.call_method("contiguous", (node,))
        for user in users:
            user.replace_input_with(node, restored)
    network.recompile()


class _Readers:
    """Which values have another format than in the model, and who could tell."""

    def __init__(self, network: fx.GraphModule, own: Mapping[str, str]) -> None:
        self.network = network
        self.own = own
        self.aliases = Aliases(network)
        self.odd: set[fx.Node] = set()
        written = self.aliases.written_roots()
        self.whole: set[fx.Node] = set()
        for node in self.aliases.order:
            if not self._may_be_odd(node):
                continue
            self.odd.add(node)
            # Restoring copies. Where memory is written to, a copy would part what the model shares: then the
            # value itself is restored, for all its readers.
            if self.aliases.roots[node] & written and any(not self.passes(user) for user in node.users):
                self.whole.add(node)
                self.odd.discard(node)

    def _may_be_odd(self, node: fx.Node) -> bool:
        if self.own.get(node.name) not in ("contiguous", "input"):
            return False
        if isinstance(self.aliases.module(node), FusedConv2d):
            return True
        return self.passes(node) and any(source in self.odd for source in node.all_input_nodes)

    def passes(self, node: fx.Node) -> bool:
        """Return whether a node computes the same numbers whatever the format of its inputs."""
        if node.op == "call_module":
            module = self.aliases.module(node)
            return isinstance(module, FusedConv2d) or type(module) in _MODULES
        if node.op == "call_function":
            sizes = node.target is getattr and node.args[1] in _SIZES
            return sizes or node.target in _FUNCTIONS
        return node.op == "call_method" and node.target in _METHODS

    def telling(self, node: fx.Node) -> list[fx.Node]:
        """Return the readers for which a value has to be restored."""
        if node in self.whole:
            return list(node.users)
        return [user for user in node.users if not self.passes(user)] if node in self.odd else []
