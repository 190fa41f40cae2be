"""The function that runs a grouped convolution."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .constants import INTERPRETED
from .devices import device_limits
from .prepared import INT32_ELEMENTS, Signature, prepare


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    tables: Sequence[Tensor],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
    config: Sequence[int] = (),
    out: Tensor | None = None,
) -> Tensor:
    """Convolve with the live blocks only: ``y[n, f] = act(scale[f] * sum(w * x) + bias[f] + residual)``.

    Sums run over the entries of the filter's tile and are accumulated in float32, int8 in int32; infinities
    and NaN in ``x`` reach a filter only through them. A tile without entries gives ``act(bias + residual)``.
    Only sizes are checked, so nothing waits for the device: the tables' contents are the packer's to get
    right. Not differentiable.

    Args:
        x: [N, C, H, W], float16, bfloat16, float32 or int8; copied to channels_last where it is not.
        weight: [E, in_block, tile_width] of x's dtype: the tiles' entries, tile by tile; rows past C and
            columns past a tile's filters are zero.
        tables: int32 tensors: tile_ptr [T + 1]; entries [E + 1], each ``tap * in_blocks + block`` with
            ``tap = r * kw + s``, the last one padding; filters [T, tile_width], each output channel once,
            -1 where a tile is not full.
        bias: [out_channels], floating, added before the residual and the activation.
        residual: [N, out_channels, OH, OW] of the result's dtype, added before the activation.
        scale: [out_channels], floating, multiplies the sums before the bias is added; int8 needs one.
        out_channels: O.
        kernel_size: (kh, kw), kh + kw at most 31.
        stride: (vertical, horizontal).
        padding: zero border in pixels: (top, bottom, left, right).
        dilation: (vertical, horizontal).
        activation: "none", "relu" (which keeps NaN, as torch does) or "silu".
        config: ``KernelConfig.to_list()``; empty takes the heuristic.
        out: channels_last tensor [N, O, OH, OW] that takes the result.

    Returns:
        [N, out_channels, OH, OW], channels_last, in x's dtype; float32 for int8.

    Raises:
        ValueError: sizes, devices, a config or an option that do not fit; int8 without a scale.
        TypeError: an unsupported dtype, or x and weight of different ones.
    """
    device = x.device
    prepared = prepare(
        Signature(
            (x.shape, x.dtype),
            (weight.shape, weight.dtype),
            tuple([(t.shape, t.dtype) for t in tables]),
            None if bias is None else (bias.shape, bias.dtype),
            None if residual is None else (residual.shape, residual.dtype),
            None if scale is None else (scale.shape, scale.dtype),
            None if out is None else (out.shape, out.dtype),
            out_channels,
            tuple(kernel_size),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            activation,
            tuple(config),
            limits(device),
            INT32_ELEMENTS,
        )
    )
    if out is not None and not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("out is not channels_last: allocate it with memory_format=torch.channels_last")
    for tensor in (weight, *tables, bias, residual, scale, out):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"x is on {device}, other tensors on {tensor.device}: move them")
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "x is on the CPU: the Triton kernel needs a GPU, or TRITON_INTERPRET=1 set before the start"
        )
    if out is None:
        out = torch.empty(
            prepared.size, dtype=prepared.dtype, device=device, memory_format=torch.channels_last
        )
    if prepared.shape.pixels == 0:
        return out
    channels_last = torch.channels_last
    operands = (
        x.contiguous(memory_format=channels_last),
        _in_kernel_order(weight),
        [table.contiguous() for table in tables],
        (
            None if bias is None else bias.contiguous(),
            None if scale is None else scale.contiguous(),
            None if residual is None else residual.contiguous(memory_format=channels_last),
        ),
        out,
    )
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            prepared.run(*operands)
    else:
        prepared.run(*operands)
    return out


@functools.cache
def limits(device: torch.device) -> tuple[int, ...]:
    """Return what a ``Signature`` says of the device."""
    return tuple(device_limits(device).values())


def _in_kernel_order(weight: Tensor) -> Tensor:
    """Return ``weight`` [E, in_block, tile_width] dense; int8 with adjacent input channels, see K_MAJOR."""
    if weight.dtype == torch.int8:
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    return weight.contiguous()
