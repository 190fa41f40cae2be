"""What sizes the listed operations and modules give, without their values.

A tensor is stood in for by one value that is expanded to its size. Operations that only look at a tensor
otherwise (views, pieces, broadcasting) run on it as they are; for the others there is a rule below. torch's
own way, the meta device, imports its whole compiler for the first addition.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.planning.schema import out_size
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.saved.arguments import GraphError
from lhc_triton.runtime.saved.operations import OPERATIONS

Rule = Callable[[Mapping[str, Any]], Any]

_ONE = torch.zeros(())


def stand_in(shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of a size that takes the memory of one value."""
    return (_ONE if dtype is None else torch.zeros((), dtype=dtype)).expand(tuple(shape))


def _same(of: Mapping[str, Any]) -> Any:
    return next(iter(of.values()))


def _broadcast(of: Mapping[str, Any]) -> Tensor:
    tensors = [value for value in of.values() if isinstance(value, Tensor)]
    return stand_in(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))


def _reduced(of: Mapping[str, Any]) -> Tensor:
    x: Tensor = of["input"]
    given = of.get("dim")
    dims = range(x.dim()) if given is None else [given] if isinstance(given, int) else given
    keeps = of.get("keepdim", False)
    for dim in sorted({dim % max(1, x.dim()) for dim in dims}, reverse=True):
        x = x.narrow(dim, 0, min(1, x.shape[dim])) if keeps else _without(x, dim)
    return x


def _without(x: Tensor, dim: int) -> Tensor:
    return stand_in([*x.shape[:dim], *x.shape[dim + 1 :]])


def _joined(of: Mapping[str, Any]) -> Tensor:
    tensors, dim = list(of["tensors"]), of.get("dim", 0)
    first = tensors[0]
    along = sum(tensor.shape[dim] for tensor in tensors)
    shape = list(first.shape)
    shape[dim] = along
    return stand_in(shape)


def _stacked(of: Mapping[str, Any]) -> Tensor:
    tensors, dim = list(of["tensors"]), of.get("dim", 0)
    shape = list(tensors[0].shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return stand_in(shape)


def _linear(of: Mapping[str, Any]) -> Tensor:
    return stand_in([*of["input"].shape[:-1], of["weight"].shape[0]])


def _pair(value: Any) -> tuple[Any, ...]:
    values = (value,) if value is None or isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _pooled(of: Mapping[str, Any]) -> Any:
    x: Tensor = of["input"]
    kernel = _pair(of["kernel_size"])
    stride = _pair(of["stride"]) if of.get("stride") is not None else kernel
    border, dilation = _pair(of.get("padding", 0)), _pair(of.get("dilation", 1))
    sides = []
    for size, k, s, p, d in zip(x.shape[-2:], kernel, stride, border, dilation, strict=True):
        room = size + 2 * p - d * (k - 1) - 1
        side = room // s + 1
        if of.get("ceil_mode", False):
            side = -(-room // s) + 1
            side -= (side - 1) * s >= size + p  # a window that would begin beyond the border
        sides.append(side)
    y = stand_in([*x.shape[:-2], *sides])
    return (y, y) if of.get("return_indices", False) else y


def _adaptive(of: Mapping[str, Any]) -> Tensor:
    x: Tensor = of["input"]
    sides = [
        size if wanted is None else wanted
        for size, wanted in zip(x.shape[-2:], _pair(of["output_size"]), strict=True)
    ]
    return stand_in([*x.shape[:-2], *sides])


def _resized(of: Mapping[str, Any]) -> Tensor:
    x: Tensor = of["input"]
    sides = x.shape[2:]
    size, scale = of.get("size"), of.get("scale_factor")
    if size is not None:
        wanted = [size] * len(sides) if isinstance(size, int) else list(size)
    else:
        scales = [scale] * len(sides) if isinstance(scale, int | float) else list(scale)  # type: ignore[arg-type]
        wanted = [math.floor(side * each) for side, each in zip(sides, scales, strict=True)]
    return stand_in([*x.shape[:2], *wanted])


def _padded(of: Mapping[str, Any]) -> Tensor:
    shape = list(of["input"].shape)
    for place, added in enumerate(of["pad"]):
        shape[-1 - place // 2] += added
    return stand_in(shape)


def _shuffled(of: Mapping[str, Any]) -> Tensor:
    *first, channels, height, width = of["input"].shape
    r = of["upscale_factor"]
    return stand_in([*first, channels // r**2, height * r, width * r])


def _unshuffled(of: Mapping[str, Any]) -> Tensor:
    *first, channels, height, width = of["input"].shape
    r = of["downscale_factor"]
    return stand_in([*first, channels * r**2, height // r, width // r])


def _item(of: Mapping[str, Any]) -> Any:
    """Index by one tensor, in a whole axis; what else an index holds looks only."""
    value, index = of["a"], of["b"]
    parts = index if isinstance(index, tuple) else (index,)
    places = [place for place, part in enumerate(parts) if isinstance(part, Tensor)]
    if not places:
        return operator.getitem(value, index)
    (at,) = places if len(places) == 1 else (-1,)
    whole = all(part == slice(None) for place, part in enumerate(parts) if place != at)
    if at < 0 or not whole or parts[at].dtype in (torch.bool, torch.uint8):
        raise GraphError("an index holds more than whole axes and one tensor of numbers")
    return stand_in([*value.shape[:at], *parts[at].shape, *value.shape[at + 1 :]])


_RULES: dict[str, Rule] = {
    "like_format": _same,
    "stochastic_depth": _same,
    "_assert": lambda of: None,
    "cat": _joined,
    "stack": _stacked,
    "mean": _reduced,
    "sum": _reduced,
    "linear": _linear,
    "max_pool2d": _pooled,
    "avg_pool2d": _pooled,
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    "interpolate": _resized,
    "pad": _padded,
    "pixel_shuffle": _shuffled,
    "pixel_unshuffle": _unshuffled,
    "getitem": _item,
}
_RULES |= dict.fromkeys(
    (
        *("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "floordiv", "div"),
        *("add_", "sub_", "mul_", "div_", "eq"),
    ),
    _broadcast,
)
_RULES |= dict.fromkeys(
    (
        *(
            "relu",
            "relu_",
            "relu6",
            "silu",
            "hardswish",
            "hardsigmoid",
            "softmax",
            "log_softmax",
            "leaky_relu",
        ),
        *("prelu", "elu", "gelu", "mish", "softplus", "hardtanh", "tanh", "sigmoid", "dropout", "dropout2d"),
        *(
            "batch_norm",
            "group_norm",
            "layer_norm",
            "channel_shuffle",
            "pow",
            "neg",
            "sqrt",
            "exp",
            "abs",
            "clamp",
        ),
        "contiguous",
    ),
    _same,
)
# What has no rule only looks at a tensor: views, pieces, sizes.
_LOOKS = frozenset(
    {
        *("shape", "size", "dim", "chunk", "split", "transpose", "permute", "reshape", "view"),
        *("unsqueeze", "squeeze", "flatten", "expand"),
    }
)


def of_operation(kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what an operation gives, tensors by stand-ins; numbers and shapes are real ones.

    Args:
        kind: "call_function" or "call_method".
        target: the function, or the method's name.
        args: checked arguments, evaluated.
        kwargs: likewise.
    """
    operation = _BY_TARGET[kind][target]
    names = [parameter.name for parameter in operation.parameters]
    name = operation.name.removeprefix("torch.")
    tensors = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
    rule = _RULES.get(name)
    if rule is None or (rule is _broadcast and not tensors):
        assert rule is not None or name in _LOOKS
        call = operation.target if kind == "call_function" else getattr(args[0], target)
        return call(*(args if kind == "call_function" else args[1:]), **kwargs)
    return rule({**dict(zip(names, args, strict=False)), **kwargs})


_BY_TARGET = {
    kind: {operation.target: operation for operation in operations.values()}
    for kind, operations in OPERATIONS.items()
}


def of_module(module: nn.Module, x: Tensor, *more: Tensor) -> Any:
    """Return what a listed module gives for a stand-in."""
    if isinstance(module, FusedConv2d):
        return _fused(module, x, *more)
    rule = next((rule for kinds, rule in _MODULE_RULES if isinstance(module, kinds)), None)
    return x if rule is None else rule(module, x)


def _fused(module: FusedConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    size = out_size(x.shape[-2:], module.kernel_size, module.stride, module.padding, module.dilation)
    y = stand_in([*x.shape[:-3], module.out_channels, *size])
    if residual is not None:
        y = _broadcast({"y": y, "residual": residual})
    return y if module.pool == "none" else _pooled({"input": y, "kernel_size": 2})


def _convolved(module: nn.Conv2d, x: Tensor) -> Tensor:
    high, wide = _pair(module.padding)
    size = out_size(
        x.shape[-2:], module.kernel_size, module.stride, (high, high, wide, wide), module.dilation
    )
    return stand_in([*x.shape[:-3], module.out_channels, *size])


def _transposed(module: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    sides = [
        (size - 1) * s - 2 * p + d * (k - 1) + more + 1
        for size, s, p, d, k, more in zip(
            x.shape[-2:],
            module.stride,
            module.padding,
            module.dilation,
            module.kernel_size,
            module.output_padding,
            strict=True,
        )
    ]
    return stand_in([*x.shape[:-3], module.out_channels, *sides])


def _by(rule: Rule, *names: str) -> Callable[[Any, Tensor], Any]:
    """Apply an operation's rule with a module's attributes of these names for arguments."""
    return lambda module, x: rule({"input": x, **{name: getattr(module, name) for name in names}})


# Other modules keep their input's size.
_MODULE_RULES: Sequence[
    tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any, Tensor], Any]]
] = (
    (nn.Conv2d, _convolved),
    (nn.ConvTranspose2d, _transposed),
    (nn.Linear, _by(_linear, "weight")),
    (nn.MaxPool2d, _by(_pooled, "kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    (nn.AvgPool2d, _by(_pooled, "kernel_size", "stride", "padding", "ceil_mode")),
    ((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), _by(_adaptive, "output_size")),
    (nn.Upsample, _by(_resized, "size", "scale_factor")),
    (nn.PixelShuffle, _by(_shuffled, "upscale_factor")),
    (nn.PixelUnshuffle, _by(_unshuffled, "downscale_factor")),
    (nn.Flatten, lambda module, x: x.flatten(module.start_dim, module.end_dim)),
    (
        (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d),
        lambda module, x: _padded({"input": x, "pad": module.padding}),
    ),
)
