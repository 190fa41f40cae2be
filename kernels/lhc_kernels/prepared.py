"""A launch as far as it does not depend on values: checked, its config chosen, its constants at hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .box_conv import grouped_conv2d_box_fwd_kernel
from .checks import check_epilogue, check_tensors, dtype_name, output_dtype, output_size, pair
from .choice import heuristic_config
from .configs import KernelConfig, LaunchShape, best_box, config_problem
from .constants import INTERPRETED, Specialisation
from .epilogue import ACTIVATIONS
from .grouped_conv import grouped_conv2d_fwd_kernel, reduce_splits_kernel
from .resources import occupancy, work_items

INT32_ELEMENTS = 2**31 - 512
"""Tensors of fewer elements are indexed with int32; the margin is the padding of a block of pixels."""

Like = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


class Signature(NamedTuple):
    """Everything about a call but its values and where they lie; arguments as in ``grouped_conv2d``.

    ``limits`` is (processors, shared_bytes, capability) of the device; empty takes those of a LaunchShape.
    """

    x: Like
    weight: Like
    tables: tuple[Like, ...]
    bias: Like | None
    residual: Like | None
    scale: Like | None
    out: Like | None
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    activation: str
    config: tuple[int, ...]
    limits: tuple[int, ...] = ()
    int32_elements: int = INT32_ELEMENTS


@dataclass(frozen=True)
class Step:
    """One kernel of a launch.

    Attributes:
        kernel: the Triton function.
        grid: programs along each axis.
        numbers: its integer arguments, which follow the tensors.
        constants: compile-time constants and the compiler's options.
        boxes: (size, block) of the tensor descriptors that stand for its first arguments.
    """

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    boxes: tuple[tuple[list[int], list[int]], ...] = ()

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch the kernel on these tensors, the described ones first."""
        described = [
            _descriptor(tensor, *box)
            for tensor, box in zip(tensors, self.boxes, strict=False)
            if tensor is not None
        ]
        rest = tensors[len(self.boxes) :]
        self.kernel[self.grid](*described, *rest, *self.numbers, **self.constants)

    def compile(self, types: Sequence[torch.dtype | None]) -> Any:
        """Compile the kernel for 16-byte aligned tensors of these types, as the active driver's target."""
        described = [
            TensorDescriptor(MockTensor(dtype, list(size)), size, _strides(size), block)
            for dtype, (size, block) in zip(types, self.boxes, strict=False)
        ]
        rest = [None if dtype is None else MockTensor(dtype, [1]) for dtype in types[len(self.boxes) :]]
        return self.kernel.warmup(*described, *rest, *self.numbers, grid=self.grid, **self.constants)


@dataclass(frozen=True)
class Prepared:
    """A launch that only waits for its tensors.

    Attributes:
        config: how it is cut up.
        shape: what that was chosen for.
        size: of the output, (N, O, OH, OW).
        dtype: of the output.
        types: of x, weight, the tables, bias, scale and residual; None for what is absent.
        sums: size and dtype of the workspace of a "split".
        steps: the kernels.
    """

    config: KernelConfig
    shape: LaunchShape
    size: tuple[int, int, int, int]
    dtype: torch.dtype
    types: tuple[torch.dtype | None, ...]
    sums: tuple[tuple[int, ...], torch.dtype] | None
    steps: tuple[Step, ...]

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        tables: Sequence[Tensor],
        epilogue: Sequence[Tensor | None],
        out: Tensor,
    ) -> None:
        """Launch on contiguous tensors: x, out and the residual channels_last, int8 weights transposed."""
        if self.sums is None:
            self.steps[0].run((x, weight, *tables, *epilogue, out))
            return
        size, dtype = self.sums
        sums = torch.empty(size, dtype=dtype, device=x.device)
        self.steps[0].run((x, weight, *tables, *epilogue, sums))
        self.steps[1].run((sums, tables[2], *epilogue, out))

    def compile(self) -> list[Any]:
        """Compile the kernels for the active driver's target, without launching; see `Step.compile`."""
        if self.sums is None:
            return [step.compile((*self.types, self.dtype)) for step in self.steps]
        first, second = self.steps
        _, sums = self.sums
        return [
            first.compile((*self.types, sums)),
            second.compile((sums, torch.int32, *self.types[5:], self.dtype)),
        ]


@functools.lru_cache(maxsize=1024)
def prepare(signature: Signature) -> Prepared:
    """Check a call's sizes and types, and settle all that its values do not decide.

    Raises:
        ValueError: sizes, a config or an option that do not fit; int8 without a scale.
        TypeError: an unsupported dtype, or x and weight of different ones.
    """
    s = signature
    x, weight, bias, residual, scale, out = map(_meta, (s.x, s.weight, s.bias, s.residual, s.scale, s.out))
    assert x is not None
    assert weight is not None
    tables = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in s.tables]
    check_tensors(x, weight, tables, s.out_channels)
    kernel = pair("kernel_size", s.kernel_size, 1)
    strides = pair("stride", s.stride, 1)
    dilations = pair("dilation", s.dilation, 1)
    size = output_size(x, s.out_channels, kernel, strides, s.padding, dilations)
    if s.activation not in ACTIVATIONS:
        raise ValueError(f"activation is {s.activation!r}: supported are {', '.join(map(repr, ACTIVATIONS))}")
    check_epilogue(x, size, {"bias": bias, "scale": scale}, {"residual": residual, "out": out})

    limits = dict(zip(("processors", "shared_bytes", "capability"), s.limits, strict=False))
    shape = LaunchShape(
        pixels=size[0] * size[2] * size[3],
        in_channels=x.shape[1],
        in_block=weight.shape[1],
        tile_width=weight.shape[2],
        tiles=tables[0].numel() - 1,
        kernel=kernel,
        dtype=dtype_name(x),
        entries=weight.shape[0],
        stride=strides,
        out_size=size[2:],
        residual=residual is not None,
        **limits,
    )
    config = KernelConfig.from_list(s.config) if s.config else heuristic_config(shape)
    problem = config_problem(config, shape)
    if problem is not None:
        raise ValueError(problem)
    facts = Specialisation(
        dtype=shape.dtype,
        in_channels=x.shape[1],
        in_block=weight.shape[1],
        tile_width=weight.shape[2],
        out_channels=s.out_channels,
        kernel=kernel,
        stride=strides,
        dilation=dilations,
        border=any(s.padding),
        bias=bias is not None,
        scale=scale is not None,
        residual=residual is not None,
        activation=s.activation,
        index64=max(x.numel(), math.prod(size), weight.numel()) >= s.int32_elements,
    )
    types = tuple(None if t is None else t.dtype for t in (x, weight, *tables, bias, scale, residual))
    sums, steps = _steps(s, config, shape, facts, size)
    return Prepared(config, shape, size, output_dtype(x), types, sums, steps)


def _steps(
    s: Signature, config: KernelConfig, shape: LaunchShape, facts: Specialisation, size: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], torch.dtype] | None, tuple[Step, ...]]:
    (batch, channels, height, width), _ = s.x
    corner = (s.padding[0], s.padding[2])
    numbers: tuple[int, ...] = (
        shape.pixels,
        shape.tiles,
        height,
        width,
        *shape.out_size,
        s.out_channels,
        *corner,
    )
    items, options = work_items(config, shape), config.options()
    if config.variant == "box":
        box = best_box(config.block_m, shape)
        rows = shape.total_entries * shape.in_block
        boxes = (
            ([batch, height, width, channels], [*box, config.block_k]),
            ([rows, shape.tile_width], [config.block_k, config.block_n]),
        )
        numbers = (batch, shape.tiles, *shape.out_size, s.out_channels, *corner)
        constants = facts.box_constants(config, box) | options
        return None, (Step(grouped_conv2d_box_fwd_kernel, (items,), numbers, constants, boxes),)
    if config.variant == "split":
        size = (config.splits, shape.pixels, shape.tiles, shape.tile_width)
        facts = replace(facts, index64=facts.index64 or math.prod(size) >= s.int32_elements)
        reduced = facts.reduce_constants(config) | {"enable_fp_fusion": True}
        blocks = -(-shape.tile_width // config.block_n) * shape.tiles
        programs = -(-shape.pixels // reduced["BLOCK_M"]) * blocks
        return (size, torch.int32 if shape.dtype == "int8" else torch.float32), (
            Step(
                grouped_conv2d_fwd_kernel,
                (items // config.splits, config.splits),
                numbers,
                facts.pointer_constants(config) | options,
            ),
            Step(reduce_splits_kernel, (programs,), (shape.pixels, shape.tiles, s.out_channels), reduced),
        )
    if config.variant == "persistent":
        items = min(items, shape.processors * occupancy(config, shape))
    elif config.variant == "resident":
        items = min(-(-shape.pixels // config.block_m), shape.processors * occupancy(config, shape))
    constants = facts.pointer_constants(config) | options
    return None, (Step(grouped_conv2d_fwd_kernel, (items,), numbers, constants),)


def _meta(like: Like | None) -> Tensor | None:
    return None if like is None else torch.empty(like[0], dtype=like[1], device="meta")


def _strides(size: Sequence[int]) -> list[int]:
    return [math.prod(size[i + 1 :]) for i in range(len(size))]


def _descriptor(tensor: Tensor, size: list[int], block: list[int]) -> TensorDescriptor:
    """Describe memory that is contiguous as ``size``, whatever strides torch gives to sides of 1."""
    if tensor.data_ptr() % 16:
        tensor = tensor.clone()  # a view from the middle of its storage
    return TensorDescriptor(tensor, size, _strides(size), block)


__all__ = ["INT32_ELEMENTS", "INTERPRETED", "Like", "Prepared", "Signature", "Step", "prepare"]
