"""``torch.ops.lhc.grouped_conv2d``: the only way into a kernel.

Importing this module registers the operator with its implementation (which picks the backend by name), its
fake kernel (torch.compile, torch.export), its refusal to differentiate, and its FLOP formula.

The implementation here serves every device that has no more specific one. Loading the native kernel brings
one for the CPU, in C++: it runs backend "native" itself, so that such a call costs microseconds, and hands
any other call, and any it finds fault with, to ``lhc::grouped_conv2d_python``, which is the implementation
here again.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lhc_triton.runtime.op import reference, torch_backend
from lhc_triton.runtime.op.backends import FLOATS, unavailable
from lhc_triton.runtime.op.epilogue import ACTIVATIONS, POOLS, in_format, result_dtype
from lhc_triton.runtime.op.packing import check_tables

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor[] tables, Tensor? bias, Tensor? residual, Tensor? scale, "
    "int out_channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "str activation, str pool, str backend, int[] config) -> Tensor"
)
BACKWARD_MESSAGE = (
    "lhc::grouped_conv2d is for inference only and has no backward; train the LHCConv2d model, "
    "or call the accelerated one under torch.inference_mode()"
)

OPTIONS = (
    "out_channels", "kernel_size", "stride", "padding", "dilation", "activation", "pool"
)  # fmt: skip
"""The arguments after the tensors, in the schema's order; the backend's name and its config follow."""

TENSORS = ("x", "weight", "tile_ptr", "entries", "filters", "bias", "residual", "scale")

torch.library.define("lhc::grouped_conv2d", SCHEMA)
torch.library.define("lhc::grouped_conv2d_python", SCHEMA)


def output_size(
    height: int,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Return OH, OW of a convolution before pooling; padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    oh = (height + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    ow = (width + left + right - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    return oh, ow


def _check_weight(x: Tensor, weight: Tensor, backend: str) -> None:
    if backend == "native" and weight.dtype == torch.bfloat16 and weight.dim() == 4 and weight.shape[3] == 2:
        sizes = [weight.shape[1] * 2, weight.shape[2]]  # in pairs of channels, see lhc::native_weight
    elif weight.dim() == 3:
        sizes = list(weight.shape[1:])
    else:
        raise ValueError(
            f"grouped_conv2d: weight has shape {tuple(weight.shape)}, expected [E, in_block, tile_width]"
        )
    if 0 in sizes:
        raise ValueError(
            f"grouped_conv2d: weight has shape {tuple(weight.shape)}, in_block and tile_width must not be 0"
        )
    prepared = backend == "native" and weight.dtype == torch.float32 and x.dtype in FLOATS
    if weight.dtype != x.dtype and not prepared:
        raise TypeError(f"grouped_conv2d: weight is {weight.dtype}, x is {x.dtype}; pack it in x's type")


def _check_memory(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError for a tensor that is not dense, or whose storage was freed or cut."""
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            raise ValueError(f"grouped_conv2d: {name} is {tensor.layout}; the operator takes dense tensors")
        if tensor.numel() == 0:
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = tensor.storage_offset() + sum((n - 1) * step for n, step in steps) + 1
        held = tensor.untyped_storage().nbytes()
        if end * tensor.element_size() > held:
            raise ValueError(
                f"grouped_conv2d: {name} of shape {tuple(tensor.shape)} does not fit into its storage of "
                f"{held} bytes, which was freed or resized"
            )


def _checked_size(
    x: Tensor,
    weight: Tensor,
    tables: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    pool: str,
    backend: str,
) -> tuple[int, int]:
    """Check everything that host ints can tell, and return OH, OW before pooling."""
    if x.dim() != 4:
        raise ValueError(f"grouped_conv2d: x has {x.dim()} dimensions, expected [N, C, H, W]")
    _check_weight(x, weight, backend)
    if weight.device != x.device:
        raise ValueError(f"grouped_conv2d: weight is on {weight.device}, x on {x.device}")
    if len(tables) != 3:
        raise ValueError(f"grouped_conv2d: {len(tables)} tables given, expected tile_ptr, entries, filters")
    tile_ptr, entries, filters = tables
    if any(t.dtype != torch.int32 for t in tables):
        raise TypeError(f"grouped_conv2d: the tables are {[t.dtype for t in tables]}, expected int32")
    if (
        tile_ptr.dim() != 1
        or entries.shape != (weight.shape[0] + 1,)
        or filters.shape != (tile_ptr.shape[0] - 1, weight.shape[2])
    ):
        raise ValueError(
            f"grouped_conv2d: tables of shapes {[tuple(t.shape) for t in tables]} do not fit the weight "
            f"{tuple(weight.shape)}; expected [T + 1], [E + 1], [T, tile_width]"
        )
    for name, values, length, least in (
        ("kernel_size", kernel_size, 2, 1),
        ("stride", stride, 2, 1),
        ("padding", padding, 4, 0),
        ("dilation", dilation, 2, 1),
    ):
        if len(values) != length or min(values) < least:
            raise ValueError(f"grouped_conv2d: {name}={values}, expected {length} integers >= {least}")
    for name, choice, choices in (
        ("activation", activation, ACTIVATIONS),
        ("pool", pool, POOLS),
    ):
        if choice not in choices:
            raise ValueError(f"grouped_conv2d: {name}={choice!r}, expected one of {choices}")
    if out_channels < 1:
        raise ValueError(f"grouped_conv2d: out_channels={out_channels}, expected at least 1")
    if x.dtype == torch.int8 and scale is None:
        raise ValueError("grouped_conv2d: x is int8 and scale is None, expected a factor for each filter")
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None and vector.shape != (out_channels,):
            raise ValueError(
                f"grouped_conv2d: {name} has shape {tuple(vector.shape)}, expected ({out_channels},)"
            )
    oh, ow = output_size(x.shape[2], x.shape[3], kernel_size, stride, padding, dilation)
    least = 2 if pool == "max2x2" else 1
    if oh < least or ow < least:
        raise ValueError(
            f"grouped_conv2d: an input of {x.shape[2]}x{x.shape[3]} pixels is too small for this kernel, "
            f"padding, dilation and pool (output {oh}x{ow} before pooling)"
        )
    if residual is not None and residual.shape != (x.shape[0], out_channels, oh, ow):
        raise ValueError(
            f"grouped_conv2d: residual has shape {tuple(residual.shape)}, expected the output's "
            f"{(x.shape[0], out_channels, oh, ow)}"
        )
    return oh, ow


def _run(*arguments: Any) -> Tensor:
    """Run a call, its arguments in the schema's order, on the backend that it names."""
    register_flops()
    x, backend, config = arguments[0], arguments[-2], arguments[-1]
    reason = unavailable(backend, x.dtype, x.device)
    if reason is not None:
        raise ValueError(f"grouped_conv2d: {reason}")
    if backend == "native":
        # Loaded by now; for later calls the dispatcher finds it without passing here.
        native: Tensor = torch.ops.lhc.grouped_conv2d.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments
        )
        return native
    _checked_size(*arguments[:-1])
    if backend == "triton":
        return _run_triton(config, *arguments[:-2])
    _check_memory(TENSORS, (*arguments[:2], *arguments[2], *arguments[3:6]))
    run = reference.grouped_conv2d if backend == "reference" else torch_backend.grouped_conv2d
    return run(*arguments[:6], **dict(zip(OPTIONS, arguments[6:-2], strict=True)))


def _run_triton(
    config: list[int],
    x: Tensor,
    weight: Tensor,
    tables: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    pool: str,
) -> Tensor:
    # Imported here because it imports Triton, which a CPU-only user never needs.
    import lhc_kernels

    y: Tensor = lhc_kernels.grouped_conv2d(
        x,
        weight,
        tables,
        bias,
        residual,
        scale,
        out_channels=out_channels,
        kernel_size=tuple(kernel_size),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        activation=activation,
        config=tuple(config),
    )
    if pool == "max2x2":
        y = F.max_pool2d(y, 2)
    return in_format(y, torch.channels_last)


torch.library.impl("lhc::grouped_conv2d", "default", _run)


def _run_for_native(*arguments: Any) -> Tensor:
    """Run what the native kernel hands over: calls for other backends, and its own that do not fit."""
    x, weight, tables, *vectors = arguments[:6]
    if arguments[-2] != "native":
        return _run(*arguments)
    reason = unavailable("native", x.dtype, x.device)
    if reason is not None:
        raise ValueError(f"grouped_conv2d: {reason}")
    _checked_size(*arguments[:-1])
    _check_memory(TENSORS, (x, weight, *tables, *vectors))
    for name, tensor in zip(TENSORS[-3:], vectors, strict=True):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise TypeError(
                f"grouped_conv2d: {name} is {tensor.dtype} on {tensor.device}, x {x.dtype} on {x.device}"
            )
    in_blocks = -(-x.shape[1] // (weight.shape[1] * (2 if weight.dim() == 4 else 1)))
    tile_ptr, entries, filters = (table.tolist() for table in tables)
    check_tables(tile_ptr, entries, filters, math.prod(arguments[7]) * in_blocks, arguments[6])
    raise ValueError(
        'grouped_conv2d: backend "native" takes dense tensors in host memory, of sizes below 2**30'
    )


torch.library.impl("lhc::grouped_conv2d_python", "default", _run_for_native)


@torch.library.register_fake("lhc::grouped_conv2d")
def _fake(
    x: Tensor,
    weight: Tensor,
    tables: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    pool: str,
    backend: str,
    config: list[int],
) -> Tensor:
    oh, ow = _checked_size(
        x,
        weight,
        tables,
        bias,
        residual,
        scale,
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation,
        activation,
        pool,
        backend,
    )
    if pool == "max2x2":
        oh, ow = oh // 2, ow // 2
    shape = (x.shape[0], out_channels, oh, ow)
    dtype = result_dtype(x.dtype)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _refuse_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(BACKWARD_MESSAGE)


torch.library.register_autograd("lhc::grouped_conv2d", _refuse_backward)


def grouped_conv2d_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    tables: Any,
    bias: Any,
    residual: Any,
    scale: Any,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Return the floating-point operations of one call: two for each multiply-accumulate of the tiles.

    Counted are the packed weights, hence also what a tile computes for blocks its groups lack.
    """
    oh, ow = output_size(x_shape[2], x_shape[3], kernel_size, stride, padding, dilation)
    return 2 * math.prod(weight_shape) * x_shape[0] * oh * ow


@functools.cache
def register_flops() -> None:
    """Tell torch.utils.flop_counter the operator's formula; further calls do nothing.

    Importing this module does so only where that one is loaded already: it imports Triton, which costs a
    CPU-only user time for nothing. The first call of the operator does, and whatever builds a module around
    the operator should, because a FlopCounterMode knows the formulas of the time when it was made.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    if torch.ops.lhc.grouped_conv2d not in flop_registry:
        register_flop_formula(torch.ops.lhc.grouped_conv2d)(grouped_conv2d_flops)


if "torch.utils.flop_counter" in sys.modules:
    register_flops()
