"""What follows the sum: scale, bias, residual, activation, pooling, and memory formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """An activation that an epilogue can apply.

    Attributes:
        into: writes the activation of its first argument to its second, which may be the same, and returns
            that.
        in_place: overwrites its argument and returns it.
        modules, functions, methods: what it is called in a traced network, where it can be absorbed.
    """

    into: Callable[[Tensor, Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()


ACTIVATIONS: Mapping[str, Activation] = {
    "none": Activation(lambda y, out: y, lambda y: y),
    "relu": Activation(
        lambda y, out: torch.clamp_min(y, 0, out=out),
        torch.relu_,
        (nn.ReLU,),
        (F.relu, F.relu_, torch.relu, torch.relu_),
        ("relu", "relu_"),
    ),
    "silu": Activation(
        lambda y, out: torch.ops.aten.silu.out(y, out=out),
        lambda y: F.silu(y, inplace=True),
        (nn.SiLU,),
        (F.silu,),
    ),
}
"""By name, "none" first. A backend applies those that its record offers; the op applies the others."""

POOLS = ("none", "max2x2")


@dataclass(frozen=True)
class Epilogue:
    """What follows the sums: ``pool(act(scale * sums + bias + residual))``, in int8 where there is a step.

    Attributes:
        bias: [O] or None.
        residual: [N, O, OH, OW] or None, added before the activation.
        scale: [O] or None, a factor for each filter's sum; int8 needs it.
        activation: a name of `epilogue.ACTIVATIONS`.
        pool: "none" or "max2x2" (2x2 windows, stride 2, an odd last row or column dropped).
        out_step: one float32, or None; with it an int8 convolution gives int8, see `quantise`.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    scale: Tensor | None = None
    activation: str = "none"
    pool: str = "none"
    out_step: Tensor | None = None


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a convolution's result: that of its activations, float32 for int8."""
    return torch.float32 if dtype == torch.int8 else dtype


def finish(total: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """Turn accumulated sums into the layer's output.

    Args:
        total: sums [N, O, OH, OW] in the accumulation type; it belongs to the caller's backend and may be
            overwritten.
        epilogue: what to do with them.
        dtype: type of the result.

    Returns:
        [N, O, OH, OW], or [N, O, OH // 2, OW // 2] with pooling, channels_last.
    """
    # The first step also copies ``total`` to channels_last, where it has another format.
    out = total if _has_format(total, torch.channels_last) else _empty_like(total, torch.channels_last)
    if epilogue.scale is not None:
        total = torch.mul(total, epilogue.scale.to(total.dtype).view(1, -1, 1, 1), out=out)
    if epilogue.bias is not None:
        total = torch.add(total, epilogue.bias.to(total.dtype).view(1, -1, 1, 1), out=out)
    if epilogue.residual is not None:
        total = torch.add(total, epilogue.residual, out=out)
    total = ACTIVATIONS[epilogue.activation].into(total, out)
    if total is not out:
        out.copy_(total)
    return in_format(pooled(out, epilogue.pool).to(dtype), torch.channels_last)


def pooled(y: Tensor, pool: str) -> Tensor:
    """Return ``y`` [N, O, OH, OW] pooled as an epilogue names it."""
    return F.max_pool2d(y, 2) if pool == "max2x2" else y


def in_format(y: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return ``y`` [N, C, H, W] with exactly the strides that a new tensor of the memory format has."""
    # Not is_contiguous(): sizes of 1 satisfy it in both formats, with strides that differ.
    return y if _has_format(y, memory_format) else _empty_like(y, memory_format).copy_(y)


def format_of(tensor: Tensor) -> str:
    """Return "contiguous", "channels_last" or "other"; strides decide where the sizes leave it open."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            break
        expected *= size
    else:
        return "contiguous"
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "contiguous" if tensor.is_contiguous() else "other"


def is_channels_last(tensor: Tensor) -> bool:
    """Return whether torch's convolutions take a tensor for channels_last, and answer in that format.

    That is a question of strides alone (``c10::is_channels_last_strides_2d``): a slice of a channels_last
    tensor is taken for one, and an image of one channel is not.
    """
    if torch.jit.is_tracing():  # sizes are tensors then
        return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    if tensor.dim() != 4 or tensor.layout != torch.strided or tensor.stride(1) == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        size, stride = tensor.shape[axis], tensor.stride(axis)
        if size == 0 or stride < least or (axis == 0 and least == tensor.stride(1)):
            return False
        least = stride * size
    return True


def like_format(value: Tensor, other: Tensor) -> Tensor:
    """Return ``value`` [N, C, H, W], or [C, H, W], in the memory format of ``other``."""
    if value.dim() == 4 and is_channels_last(other):
        return value.contiguous(memory_format=torch.channels_last)
    return value.contiguous()


def _has_format(y: Tensor, memory_format: torch.memory_format) -> bool:
    _, c, h, w = y.shape
    last = memory_format == torch.channels_last
    return y.stride() == ((c * h * w, 1, w * c, c) if last else (c * h * w, h * w, w, 1))


def _empty_like(y: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=memory_format)
