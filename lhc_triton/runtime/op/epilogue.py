"""What follows the sum: scale, bias, residual, activation, pooling, and memory formats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

ACTIVATIONS = ("none", "relu", "silu")
POOLS = ("none", "max2x2")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a convolution's result: that of its activations, float32 for int8."""
    return torch.float32 if dtype == torch.int8 else dtype


def finish(
    total: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    *,
    activation: str,
    pool: str,
    dtype: torch.dtype,
) -> Tensor:
    """Turn accumulated sums into the layer's output: ``pool(act(scale * total + bias + residual))``.

    Args:
        total: sums [N, O, OH, OW] in the accumulation type; it belongs to the caller's backend and may be
            overwritten.
        bias: [O] or None.
        residual: [N, O, OH, OW] or None, added before the activation.
        scale: [O] or None, a factor for each filter's sum.
        activation: "none", "relu" or "silu".
        pool: "none" or "max2x2" (2x2 windows, stride 2, an odd last row or column dropped).
        dtype: type of the result.

    Returns:
        [N, O, OH, OW], or [N, O, OH // 2, OW // 2] with pooling, channels_last.
    """
    # The first step also copies ``total`` to channels_last, where it has another format.
    out = total if _has_format(total, torch.channels_last) else _empty_like(total, torch.channels_last)
    if scale is not None:
        total = torch.mul(total, scale.to(total.dtype).view(1, -1, 1, 1), out=out)
    if bias is not None:
        total = torch.add(total, bias.to(total.dtype).view(1, -1, 1, 1), out=out)
    if residual is not None:
        total = torch.add(total, residual, out=out)
    if activation == "relu":
        total = torch.clamp_min(total, 0, out=out)
    elif activation == "silu":
        total = F.silu(total, inplace=True)
    if total is not out:
        out.copy_(total)
    if pool == "max2x2":
        out = F.max_pool2d(out, 2)
    return in_format(out.to(dtype), torch.channels_last)


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

    That is a question of strides alone: a slice of a channels_last tensor is taken for one, and an image of
    one channel is not.
    """
    if torch.jit.is_tracing():  # sizes are tensors then
        return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return suggest_memory_format(tensor) == torch.channels_last


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
