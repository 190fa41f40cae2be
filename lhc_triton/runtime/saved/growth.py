"""How large the tensors of a stored graph become, found out without computing any of them.

A file of some kilobytes can describe a graph that doubles a tensor sixty times. What the inputs justify, on
which the network was accelerated, is generous for real networks and no more than that for others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lhc_triton.errors import first_line
from lhc_triton.files import printable
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.saved.arguments import GraphError
from lhc_triton.runtime.saved.sizes import of_module, of_operation, stand_in

MAX_INPUT = 2**28
"""Values of the inputs that a file may claim: 1 GiB in float32."""
MAX_PIECES = 2**16
"""Tensors that all chunks and splits of a graph may give."""

# Values that may be held at a time, and computed in all: some in any case, and so many for each input value.
# A first layer of 64 filters alone is 21 times an image of three channels, and a network of hundreds of
# layers some thousand times in all.
HELD = (2**26, 2**12)
COMPUTED = (2**28, 2**16)

Inputs = Sequence[tuple[Sequence[int], torch.dtype]]


def check_growth(network: fx.GraphModule, inputs: Inputs) -> None:
    """Raise GraphError if a graph's tensors grow beyond what its inputs justify, or it does not take them.

    Args:
        network: a checked graph.
        inputs: shape and type of each input that it was accelerated on, as the file says.
    """
    values = sum(math.prod(shape) for shape, _ in inputs)
    if values > MAX_INPUT:
        raise GraphError(f"its example inputs have {values} values; up to {MAX_INPUT} are read")
    try:
        _Sizes(network, values).run(*(stand_in(shape, dtype) for shape, dtype in inputs))
    except GraphError:
        raise
    except Exception as error:  # whatever Python and torch raise where sizes do not fit
        cause = printable(first_line(error), 200)
        raise GraphError(f"its graph does not take inputs as its example's: {cause}") from error


class _Sizes(fx.Interpreter):
    """Goes through a graph for the sizes alone, and counts."""

    def __init__(self, network: fx.GraphModule, values: int) -> None:
        super().__init__(network)
        self.extra_traceback = False
        self._held_most, self._computed_most = (base + each * values for base, each in (HELD, COMPUTED))
        self._held = self._computed = self._pieces = 0

    def run_node(self, n: fx.Node) -> Any:
        """Count what a step adds; views and pieces as if they held their values themselves."""
        result = super().run_node(n)
        if n.op != "output":
            size = _values_of(result)
            self._count(size, n.name)
            self._held += size - sum(_values_of(self.env[dead]) for dead in self.user_to_last_uses.get(n, []))
        return result

    def _count(self, size: int, name: str) -> None:
        self._computed += size
        for what, total, most in (
            ("held at a time", self._held + size, self._held_most),
            ("computed", self._computed, self._computed_most),
        ):
            if total > most:
                raise GraphError(
                    f"up to {name!r}, {total} values are {what}; for the inputs of its example, up to {most}"
                    " are supported"
                )

    def _count_pieces(self, x: Tensor, cut: Any, by_number: bool) -> None:
        """Refuse to make a great many tensors, however small."""
        if (
            isinstance(cut, int) and cut > 0
        ):  # a list has a size for each; the operator refuses what is neither
            longest = max(x.shape, default=1)
            self._pieces += min(cut, longest) if by_number else -(-longest // cut)
        if self._pieces > MAX_PIECES:
            raise GraphError(f"more than {MAX_PIECES} pieces of tensors are made")

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return stand-ins for what a listed function gives."""
        if target in (torch.chunk, torch.split):
            self._count_pieces(*_cut(args, kwargs), target is torch.chunk)
        return of_operation("call_function", target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return stand-ins for what a listed method gives."""
        if target in ("chunk", "split"):
            self._count_pieces(*_cut(args, kwargs), target == "chunk")
        return of_operation("call_method", target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return a stand-in for what a listed module gives; a convolution may copy its input, bordered."""
        module = self.fetch_attr(target)
        if isinstance(module, FusedConv2d | nn.Conv2d):
            *first, height, width = args[0].shape
            border: tuple[Any, ...] = tuple(module.padding)
            top, bottom, left, right = border if len(border) == 4 else (border[0], *border, border[1])
            self._count(math.prod(first) * (height + top + bottom) * (width + left + right), target)
        return of_module(module, *args)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return a stand-in for a constant."""
        constant: Tensor = self.fetch_attr(target)
        return stand_in(constant.shape, constant.dtype)


def _cut(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    values = [*args, *kwargs.values()]
    return values[0], values[1] if len(values) > 1 else None


def _values_of(result: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
