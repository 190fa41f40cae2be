"""What passes channels on as they are: the closed list of operations that are understood.

None of them depends on how many channels there are, so that each goes on working where some are removed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Every value goes its own way; a channel that is constant stays so.
POINTWISE_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
        nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid,
        nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout,
    }
)  # fmt: skip
IN_PLACE: frozenset[Any] = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv})
POINTWISE_FUNCTIONS: frozenset[Any] = IN_PLACE | {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.maximum, torch.minimum,
    torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.abs,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.softplus, F.softsign, F.logsigmoid, F.sigmoid, F.tanh,
}  # fmt: skip
POINTWISE_METHODS = frozenset(
    {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "abs", "clamp", "clamp_", "relu",
     "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone", "detach"}
)  # fmt: skip
# Positions of one channel are mixed, so that a constant stays what it is.
POOLING_MODULES: frozenset[type[nn.Module]] = frozenset(
    {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample}
)
POOLING_FUNCTIONS: frozenset[Any] = frozenset(
    {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate}
)
NORMS: frozenset[type[nn.Module]] = frozenset({nn.BatchNorm2d, nn.SyncBatchNorm})

_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
# Dimensions other than the channels, by rank.
_OTHERS: Mapping[int, frozenset[int]] = {2: frozenset({0}), 4: frozenset({0, 2, 3, -1, -2})}


def given(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Return a call's arguments after the first by name, those that are given."""
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


def overwrites(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a call of the list may write to its first argument."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    by_flag = node.kwargs.get("inplace") is True or any(argument is True for argument in node.args)
    return bool(by_flag or node.target in IN_PLACE)


def may_alias(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether what a call of the list gives may be its first argument's own memory."""
    same = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.Flatten)
    names = ("flatten", "view", "reshape", "contiguous", "detach")
    functions = (torch.flatten, torch.reshape, F.dropout, F.dropout2d)
    passing = isinstance(module, same) or node.target in names or node.target in functions
    return bool(passing) or overwrites(node, module)


def is_global_mean(node: fx.Node, rank: int) -> bool:
    """Return whether a call is the mean over an image's positions, ``x.mean((2, 3))``."""
    if node.target not in ("mean", torch.mean) or rank != 4:
        return False
    dims = given(node, ("dim", "keepdim")).get("dim")
    return isinstance(dims, tuple | list) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]


def is_flattening(node: fx.Node, module: nn.Module | None, before: Tensor, after: Tensor) -> bool:
    """Return whether a call puts the pixels of each channel behind one another: [N, C * H * W]."""
    if before.dim() not in (2, 4) or after.shape != (before.shape[0], before[0].numel()):
        return False
    if isinstance(module, nn.Flatten):
        return True
    if node.target in ("flatten", torch.flatten):
        return True
    if node.target in ("view", "reshape", torch.reshape):
        sizes = node.args[1:] if len(node.args) != 2 else node.args[1]
        # A number of features would no longer be right with fewer channels.
        return isinstance(sizes, tuple | list) and len(sizes) == 2 and bool(sizes[1] == -1)
    return False


def is_running_dropout(node: fx.Node) -> bool:
    """Return whether a call is a dropout that is switched off."""
    return node.target in (F.dropout, F.dropout2d) and (
        given(node, ("p", "training", "inplace")).get("training", True) is False
    )


def asks_for_pixels_only(node: fx.Node, rank: int) -> bool:
    """Return whether a call asks a tensor for what does not depend on its channels, such as its batch."""
    others = _OTHERS.get(rank, frozenset())
    if node.op == "call_method" and node.target in ("dim", "ndimension"):
        return True
    if node.op == "call_method" and node.target == "size":
        which = given(node, ("dim",)).get("dim")
        return which in others if which is not None else all(_picks(user, rank) for user in node.users)
    if node.op == "call_function" and node.target is getattr:
        if node.args[1] == "shape":
            return all(_picks(user, rank) for user in node.users)
        return node.args[1] in ("dtype", "device", "ndim")
    return False


def _picks(node: fx.Node, rank: int) -> bool:
    if node.target is not operator.getitem:
        return False
    index = node.args[1]
    if isinstance(index, slice):
        return rank == 4 and index in (slice(2, None), slice(-2, None))
    return isinstance(index, int) and index in _OTHERS.get(rank, frozenset())


def keeps_constants(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether pooling leaves constants as they are: averages may take in zeros around the image."""
    if isinstance(module, nn.AvgPool2d):
        padding, divisor = module.padding, module.divisor_override
    elif node.target is F.avg_pool2d:
        arguments = given(node, _AVG_POOL)
        padding, divisor = arguments.get("padding", 0), arguments.get("divisor_override")
    else:
        return True
    return padding in (0, (0, 0), [0, 0]) and divisor is None
