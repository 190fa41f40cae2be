"""What a network computes beside its convolutions, seen operator by operator."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from lhc_triton.watching import Watch

from .schema import OtherWork

ADDITIONS = ("add", "add_")
NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
POOLINGS = ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mean")
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "convolution": 0}  # and where their left operand is
CONVOLVED, ACTIVATED = 2, 1  # how much more an epilogue may take in: all, or a 2x2 pooling


class Remainder(Watch):
    """Counts the work of every operator that runs outside a convolution while the mode is on.

    An accelerated network folds batch norm into a convolution, and adds, activates and pools 2x2 in its
    epilogue. So what follows a convolution like that costs nothing here, or, of an addition, the reading of
    its other operand; everything else reads its inputs and writes its output. A feature map that is
    flattened is brought to the other memory format first, since inside it is channels_last; so is the input.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self._found: dict[str, OtherWork] = {}
        self._convolutions: dict[str, OtherWork] = {}
        self._open: dict[int, int] = {}  # results of convolutions and of what follows, by address
        for tensor in inputs:
            if isinstance(tensor, Tensor) and _is_map(tensor):
                self._count("format changes", 0, 2 * _bytes(tensor))

    def works(self, without: Collection[str]) -> tuple[OtherWork, ...]:
        """Return what was counted, by kind; convolutions, too, but for those of these names."""
        left = [work for name, work in self._convolutions.items() if name not in without]
        convolutions = OtherWork(
            "convolutions left dense",
            sum(work.calls for work in left),
            sum(work.macs for work in left),
            sum(work.moved_bytes for work in left),
        )
        return tuple(work for work in (convolutions, *self._found.values()) if work.calls)

    def convolved(self, name: str, conv: _ConvNd, given: Any, output: Any) -> None:
        """Tell what a convolution has made of its input."""
        if not (isinstance(given, Tensor) and isinstance(output, Tensor)):
            return
        self._open[_home(output)] = CONVOLVED
        # Each value of the input of a transposed convolution, else of the output, takes a filter's weights.
        values = given if conv.transposed else output
        channels = conv.out_channels if conv.transposed else conv.in_channels
        filters = channels // conv.groups * math.prod(conv.kernel_size)
        weights = conv.out_channels * conv.in_channels // conv.groups * math.prod(conv.kernel_size)
        moved = _bytes(given) + _bytes(output) + weights * output.element_size()
        _add(self._convolutions, name, values.numel() * filters, moved)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = _floats((args, kwargs))
        # The call may free an input and reuse its memory, so addresses are looked up before.
        homes = [_home(tensor) for tensor in inputs]
        stages = [self._open.get(home, 0) for home in homes]
        result = func(*args, **(kwargs or {}))
        outputs = _floats(result)
        if inputs and outputs and not self.inside:
            name = func._schema.name.removeprefix("aten::")
            if _home(outputs[0]) in homes and not name.endswith("_"):
                self._view(inputs[homes.index(_home(outputs[0]))], outputs[0])
            else:
                self._open[_home(outputs[0])] = self._compute(name, args, inputs, stages, outputs[0])
        return result

    def _view(self, given: Tensor, seen: Tensor) -> None:
        if _is_map(given) and seen.dim() != given.dim():
            self._count("format changes", 0, 2 * _bytes(given))

    def _compute(
        self, name: str, args: tuple[Any, ...], inputs: list[Tensor], stages: list[int], output: Tensor
    ) -> int:
        """Count an operator, and return what an epilogue may still take in behind it."""
        sizes = [_bytes(tensor) for tensor in inputs]
        moved = sum(sizes) + _bytes(output)
        if name in NORMS and stages[0] == CONVOLVED:
            return CONVOLVED
        if name in ADDITIONS and len(inputs) == 2 and CONVOLVED in stages:
            self._count("additions", 0, min(sizes))
            return CONVOLVED
        if name in POOLINGS:
            if not (name.startswith("max_pool2d") and stages[0] and _halves(inputs[0], output, args)):
                self._count("pooling", 0, sizes[0] + _bytes(output))
        elif name in PRODUCTS:
            left = inputs[PRODUCTS[name]]
            inner = inputs[1][0].numel() if name == "convolution" else left.shape[-1]
            self._count("matrix products", output.numel() * inner, moved)
        elif name in ADDITIONS:
            self._count("additions", 0, moved)
        elif len(inputs) == 1 and output.shape == inputs[0].shape:
            if stages[0] == CONVOLVED:
                return ACTIVATED
            self._count("activations", 0, moved)
        else:
            self._count("other operators", 0, moved)
        return 0

    def _count(self, kind: str, macs: int, moved: int) -> None:
        _add(self._found, kind, macs, moved)


def _add(works: dict[str, OtherWork], name: str, macs: int, moved: int) -> None:
    """Count one more call."""
    seen = works.get(name, OtherWork(name, 0, 0, 0))
    works[name] = OtherWork(name, seen.calls + 1, seen.macs + macs, seen.moved_bytes + moved)


def _halves(given: Tensor, output: Tensor, args: tuple[Any, ...]) -> bool:
    """Return whether a pooling takes 2x2 pixels to one."""
    rows, columns = given.shape[-2:]
    return list(args[1]) == [2, 2] and output.shape[-2:] == (rows // 2, columns // 2)


def _is_map(tensor: Tensor) -> bool:
    """Return whether the memory format of a tensor matters."""
    return tensor.dim() == 4 and tensor.shape[1] > 1 and math.prod(tensor.shape[2:]) > 1


def _floats(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]


def _home(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
