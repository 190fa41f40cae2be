"""The function that runs a grouped convolution: checks, the choice of a config, and the launch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .box_conv import grouped_conv2d_box_fwd_kernel
from .checks import check_epilogue, check_tensors, dtype_name, output_dtype, output_size, pair
from .choice import heuristic_config
from .configs import KernelConfig, LaunchShape, best_box, config_problem
from .constants import INTERPRETED, Specialisation
from .devices import device_limits
from .epilogue import ACTIVATIONS
from .grouped_conv import grouped_conv2d_fwd_kernel, reduce_splits_kernel
from .resources import occupancy, work_items

INT32_ELEMENTS = 2**31 - 512
"""Tensors of fewer elements are indexed with int32; the margin is the padding of a block of pixels."""


def launch_shape(
    x: Tensor,
    weight: Tensor,
    tiles: int,
    out_size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    residual: bool = False,
) -> LaunchShape:
    """Return what a config is chosen for; asks the device for its properties, never for data.

    Args:
        x: the activations [N, C, H, W], for sizes, dtype and device.
        weight: [E, in_block, tile_width].
        tiles: T.
        out_size: (OH, OW).
        kernel: (kh, kw).
        stride: (vertical, horizontal).
        residual: whether the epilogue adds one.
    """
    return LaunchShape(
        pixels=x.shape[0] * out_size[0] * out_size[1],
        in_channels=x.shape[1],
        in_block=weight.shape[1],
        tile_width=weight.shape[2],
        tiles=tiles,
        kernel=kernel,
        dtype=dtype_name(x),
        entries=weight.shape[0],
        stride=stride,
        out_size=out_size,
        residual=residual,
        **device_limits(x.device),
    )


@dataclass(frozen=True)
class _Call:
    """Checked arguments of one convolution: x and the images channels_last, everything else contiguous."""

    x: Tensor
    weight: Tensor
    tables: tuple[Tensor, Tensor, Tensor]
    epilogue: tuple[Tensor | None, Tensor | None, Tensor | None]
    out: Tensor
    padding: tuple[int, int]
    shape: LaunchShape
    facts: Specialisation


def _launch(call: _Call, config: KernelConfig) -> None:
    """Run the kernel that ``config`` names, into ``call.out``."""
    options: dict[str, Any] = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # for float32; Triton 3.10 switches fused multiply-adds off by default
    }
    items = work_items(config, call.shape)
    if config.variant == "box":
        _launch_box(call, config, items, options)
    elif config.variant == "split":
        _launch_split(call, config, items // config.splits, options)
    elif config.variant == "persistent":
        workers = call.shape.processors * occupancy(config, call.shape)
        _launch_pointer(call, config, (min(items, workers),), call.out, call.facts, options)
    else:
        _launch_pointer(call, config, (items,), call.out, call.facts, options)


def _launch_pointer(
    call: _Call,
    config: KernelConfig,
    grid: tuple[int, ...],
    out: Tensor,
    facts: Specialisation,
    options: dict[str, Any],
) -> None:
    x, shape = call.x, call.shape
    grouped_conv2d_fwd_kernel[grid](
        x,
        call.weight,
        *call.tables,
        *call.epilogue,
        out,
        shape.pixels,
        shape.tiles,
        *x.shape[2:],
        *shape.out_size,
        call.out.shape[1],
        *call.padding,
        **facts.pointer_constants(config),
        **options,
    )


def _launch_split(call: _Call, config: KernelConfig, programs: int, options: dict[str, Any]) -> None:
    x, shape, facts = call.x, call.shape, call.facts
    size = (config.splits, shape.pixels, shape.tiles, shape.tile_width)
    sums = torch.empty(size, dtype=torch.int32 if shape.dtype == "int8" else torch.float32, device=x.device)
    facts = replace(facts, index64=facts.index64 or sums.numel() >= INT32_ELEMENTS)
    _launch_pointer(call, config, (programs, config.splits), sums, facts, options)
    constants = facts.reduce_constants(config)
    blocks = -(-shape.tile_width // config.block_n) * shape.tiles
    reduce_splits_kernel[(-(-shape.pixels // constants["BLOCK_M"]) * blocks,)](
        sums,
        call.tables[2],
        *call.epilogue,
        call.out,
        shape.pixels,
        shape.tiles,
        call.out.shape[1],
        **constants,
    )


def _launch_box(call: _Call, config: KernelConfig, programs: int, options: dict[str, Any]) -> None:
    x, weight, shape = call.x, call.weight, call.shape
    box = best_box(config.block_m, shape)
    batch, channels, height, width = x.shape
    rows = weight.shape[0] * weight.shape[1]
    grouped_conv2d_box_fwd_kernel[(programs,)](
        _descriptor(x, [batch, height, width, channels], [*box, config.block_k]),
        _descriptor(weight, [rows, weight.shape[2]], [config.block_k, config.block_n]),
        *call.tables,
        *call.epilogue,
        call.out,
        batch,
        shape.tiles,
        *shape.out_size,
        call.out.shape[1],
        *call.padding,
        **call.facts.box_constants(config, box),
        **options,
    )


def _descriptor(tensor: Tensor, size: list[int], block: list[int]) -> TensorDescriptor:
    """Describe memory that is contiguous as ``size``, whatever strides torch gives to sides of 1."""
    if tensor.data_ptr() % 16:
        tensor = tensor.clone()  # a view from the middle of its storage
    strides = [math.prod(size[i + 1 :]) for i in range(len(size))]
    return TensorDescriptor(tensor, size, strides, block)


def _in_kernel_order(weight: Tensor) -> Tensor:
    """Return ``weight`` [E, in_block, tile_width] dense; int8 with adjacent input channels, see K_MAJOR."""
    if weight.dtype == torch.int8:
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    return weight.contiguous()


def _check_devices(x: Tensor, others: Sequence[Tensor]) -> None:
    stray = {str(t.device) for t in others} - {str(x.device)}
    if stray:
        raise ValueError(f"x is on {x.device}, other tensors on {', '.join(sorted(stray))}: move them")
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "x is on the CPU: the Triton kernel needs a GPU, or TRITON_INTERPRET=1 set before the start"
        )


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
    check_tensors(x, weight, tables, out_channels)
    kernel = pair("kernel_size", kernel_size, 1)
    strides = pair("stride", stride, 1)
    dilations = pair("dilation", dilation, 1)
    size = output_size(x, out_channels, kernel, strides, padding, dilations)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: supported are {', '.join(map(repr, ACTIVATIONS))}")
    check_epilogue(x, size, {"bias": bias, "scale": scale}, {"residual": residual, "out": out})
    if out is not None and not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("out is not channels_last: allocate it with memory_format=torch.channels_last")

    shape = launch_shape(x, weight, tables[0].numel() - 1, size[2:], kernel, strides, residual is not None)
    chosen = KernelConfig.from_list(config) if len(config) else heuristic_config(shape)
    problem = config_problem(chosen, shape)
    if problem is not None:
        raise ValueError(problem)
    _check_devices(x, [t for t in (weight, *tables, bias, scale, residual, out) if t is not None])

    if out is None:
        out = torch.empty(size, dtype=output_dtype(x), device=x.device, memory_format=torch.channels_last)
    if shape.pixels == 0:
        return out
    facts = Specialisation(
        dtype=shape.dtype,
        in_channels=x.shape[1],
        in_block=weight.shape[1],
        tile_width=weight.shape[2],
        out_channels=out_channels,
        kernel=kernel,
        stride=strides,
        dilation=dilations,
        border=any(padding),
        bias=bias is not None,
        scale=scale is not None,
        residual=residual is not None,
        activation=activation,
        index64=max(x.numel(), out.numel(), weight.numel()) >= INT32_ELEMENTS,
    )
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    call = _Call(
        x=x.contiguous(memory_format=torch.channels_last),
        weight=_in_kernel_order(weight),
        tables=(tables[0].contiguous(), tables[1].contiguous(), tables[2].contiguous()),
        epilogue=(
            None if bias is None else bias.contiguous(),
            None if scale is None else scale.contiguous(),
            residual,
        ),
        out=out,
        padding=(padding[0], padding[2]),
        shape=shape,
        facts=facts,
    )
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        _launch(call, chosen)
    return out
