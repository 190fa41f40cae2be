"""One call of the op: its arguments, bound and checked once for everything below."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lhc_triton.planning.backends import BACKENDS
from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.op.epilogue import ACTIVATIONS, POOLS, Epilogue, result_dtype

MOST_PRODUCTS = 2**17 - 1
"""Of int8 in one sum: each is at most 2**14, and int32 ends at 2**31 - 1."""

MOST_VALUES = 2**60
"""Of any tensor that a call may ask for: what computers address, and 64-bit products hold."""


@dataclass(frozen=True)
class Call:
    """Operands, geometry and epilogue of one grouped convolution; made by `bind`.

    Attributes:
        x: [N, C, H, W] in any memory format.
        weight: [E, in_block, tile_width], the entries of all tiles one after another, or what the backend's
            ``prepare`` made of it.
        tables: tile_ptr [T + 1], entries [E + 1], filters [T, tile_width]; see `packing`.
        geometry: sizes, stride, padding and dilation.
        epilogue: what follows the sums.
        in_block, tile_width: of the weight.
        backend: who runs it.
        config: the launch config; empty for the backend's own.
    """

    x: Tensor
    weight: Tensor
    tables: Sequence[Tensor]
    geometry: ConvGeometry
    epilogue: Epilogue
    in_block: int
    tile_width: int
    backend: str
    config: tuple[int, ...]

    @classmethod
    def bind(
        cls,
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
        out_step: Tensor | None = None,
    ) -> Call:
        """Bind the op's arguments, in the schema's order, and check all that host ints can tell.

        Raises:
            TypeError: a tensor has another type.
            ValueError: sizes, lists or names do not fit each other.
        """
        if x.dim() != 4:
            raise ValueError(f"grouped_conv2d: x has {x.dim()} dimensions, expected [N, C, H, W]")
        in_block, tile_width = _checked_weight(x, weight, backend)
        _check_tables(tables, weight, tile_width)
        for name, values, length, least in (
            ("kernel_size", kernel_size, 2, 1),
            ("stride", stride, 2, 1),
            ("padding", padding, 4, 0),
            ("dilation", dilation, 2, 1),
        ):
            if len(values) != length or min(values) < least:
                raise ValueError(f"grouped_conv2d: {name}={values}, expected {length} integers >= {least}")
        for name, choice, choices in (("activation", activation, ACTIVATIONS), ("pool", pool, POOLS)):
            if choice not in choices:
                raise ValueError(f"grouped_conv2d: {name}={choice!r}, expected one of {tuple(choices)}")
        if out_channels < 1:
            raise ValueError(f"grouped_conv2d: out_channels={out_channels}, expected at least 1")
        batch, channels, height, width = x.shape
        (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
        top, bottom, left, right = padding
        geometry = ConvGeometry(
            batch, channels, out_channels, height, width,
            (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw),
        )  # fmt: skip
        epilogue = Epilogue(bias, residual, scale, activation, pool, out_step)
        _check_epilogue(x, geometry, epilogue)
        return cls(x, weight, tables, geometry, epilogue, in_block, tile_width, backend, tuple(config))

    def arguments(self) -> tuple[Any, ...]:
        """Return the op's arguments again, in the schema's order."""
        geometry, epilogue = self.geometry, self.epilogue
        return (
            self.x, self.weight, self.tables, epilogue.bias, epilogue.residual, epilogue.scale,
            geometry.out_channels, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation,
            epilogue.activation, epilogue.pool, self.backend, self.config, epilogue.out_step,
        )  # fmt: skip

    @property
    def in_blocks(self) -> int:
        """Input blocks of the layer, the last one may be cropped."""
        return -(-self.geometry.in_channels // self.in_block)

    @property
    def entries(self) -> int:
        """Possible entries of the layer, taps * in_blocks."""
        return self.geometry.taps * self.in_blocks

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """N, O and the result's rows and columns, pooled where it is."""
        rows, columns = self.geometry.out_size
        step = 2 if self.epilogue.pool == "max2x2" else 1
        return self.geometry.batch, self.geometry.out_channels, rows // step, columns // step

    @property
    def out_dtype(self) -> torch.dtype:
        """The result's type: x's; for int8 float32, or with a step int8."""
        return torch.int8 if self.epilogue.out_step is not None else result_dtype(self.x.dtype)

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-accumulate of the tiles.

        Counted are the packed weights, hence also what a tile computes for blocks its groups lack.
        """
        weights = self.weight.shape[0] * self.in_block * self.tile_width
        return 2 * weights * self.geometry.out_pixels

    def check_padded(self) -> None:
        """Raise ValueError where no memory could hold the input with its border, or the result."""
        geometry = self.geometry
        top, bottom, left, right = geometry.padding
        padded = (geometry.height + top + bottom) * (geometry.width + left + right)
        channels = max(self.in_blocks * self.in_block, geometry.out_channels)
        if geometry.batch * padded * channels > MOST_VALUES or geometry.taps > MOST_VALUES:
            raise ValueError(
                f"grouped_conv2d: padding={list(geometry.padding)} and kernel_size={list(geometry.kernel)} "
                f"ask for more than {MOST_VALUES} values"
            )

    def without(self, **defaults: Any) -> Call:
        """Return the same call with these fields of its epilogue at other values: for what the op does."""
        return dataclasses.replace(self, epilogue=dataclasses.replace(self.epilogue, **defaults))

    def check_memory(self) -> None:
        """Raise ValueError for a tensor that is not dense, or whose storage was freed or cut."""
        names = ("x", "weight", "tile_ptr", "entries", "filters", "bias", "residual", "scale", "out_step")
        epilogue = self.epilogue
        vectors = (epilogue.bias, epilogue.residual, epilogue.scale, epilogue.out_step)
        for name, tensor in zip(names, (self.x, self.weight, *self.tables, *vectors), strict=True):
            if tensor is not None:
                _check_memory(name, tensor)


def _checked_weight(x: Tensor, weight: Tensor, backend: str) -> tuple[int, int]:
    """Return in_block and tile_width of a weight that fits x's type and device."""
    record = BACKENDS.get(backend)
    prepared = None if record is None else record.prepared(weight, x.dtype)
    if prepared is None and weight.dim() != 3:
        raise ValueError(
            f"grouped_conv2d: weight has shape {tuple(weight.shape)}, expected [E, in_block, tile_width]"
        )
    in_block, tile_width = prepared or weight.shape[1:]
    if in_block == 0 or tile_width == 0:
        raise ValueError(
            f"grouped_conv2d: weight has shape {tuple(weight.shape)}, in_block and tile_width must not be 0"
        )
    if weight.dtype != x.dtype and (prepared is None or weight.dtype != torch.float32):
        raise TypeError(f"grouped_conv2d: weight is {weight.dtype}, x is {x.dtype}; pack it in x's type")
    if weight.device != x.device:
        raise ValueError(f"grouped_conv2d: weight is on {weight.device}, x on {x.device}")
    return in_block, tile_width


def _check_tables(tables: Sequence[Tensor], weight: Tensor, tile_width: int) -> None:
    if len(tables) != 3:
        raise ValueError(f"grouped_conv2d: {len(tables)} tables given, expected tile_ptr, entries, filters")
    tile_ptr, entries, filters = tables
    if any(t.dtype != torch.int32 for t in tables):
        raise TypeError(f"grouped_conv2d: the tables are {[t.dtype for t in tables]}, expected int32")
    strangers = {t.device.type for t in tables} - {"cpu", weight.device.type}
    if strangers:
        raise ValueError(f"grouped_conv2d: a table is on {strangers.pop()}, the weight on {weight.device}")
    if (
        tile_ptr.dim() != 1
        or entries.shape != (weight.shape[0] + 1,)
        or filters.shape != (tile_ptr.shape[0] - 1, tile_width)
    ):
        raise ValueError(
            f"grouped_conv2d: tables of shapes {[tuple(t.shape) for t in tables]} do not fit the weight "
            f"{tuple(weight.shape)}; expected [T + 1], [E + 1], [T, tile_width]"
        )


def _check_epilogue(x: Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> None:
    filters = geometry.out_channels
    if x.dtype == torch.int8:
        _check_int8(geometry, epilogue)
    elif epilogue.out_step is not None:
        raise ValueError(f"grouped_conv2d: out_step is given and x is {x.dtype}; only int8 can stay int8")
    for name, vector in (("bias", epilogue.bias), ("scale", epilogue.scale)):
        if vector is not None and vector.shape != (filters,):
            raise ValueError(f"grouped_conv2d: {name} has shape {tuple(vector.shape)}, expected ({filters},)")
    expected_type = result_dtype(x.dtype)
    operands = {"bias": epilogue.bias, "residual": epilogue.residual, "scale": epilogue.scale}
    for name, operand in operands.items():
        if operand is not None and (operand.dtype, operand.device) != (expected_type, x.device):
            raise TypeError(
                f"grouped_conv2d: {name} is {operand.dtype} on {operand.device}, expected {expected_type} on "
                f"x's {x.device}"
            )
    oh, ow = geometry.out_size
    least = 2 if epilogue.pool == "max2x2" else 1
    if oh < least or ow < least:
        raise ValueError(
            f"grouped_conv2d: an input of {geometry.height}x{geometry.width} pixels is too small for this "
            f"kernel, padding, dilation and pool (output {oh}x{ow} before pooling)"
        )
    expected = (geometry.batch, filters, oh, ow)
    if epilogue.residual is not None and epilogue.residual.shape != expected:
        raise ValueError(
            f"grouped_conv2d: residual has shape {tuple(epilogue.residual.shape)}, expected the output's "
            f"{expected}"
        )


def _check_int8(geometry: ConvGeometry, epilogue: Epilogue) -> None:
    if epilogue.scale is None:
        raise ValueError("grouped_conv2d: x is int8 and scale is None, expected a factor for each filter")
    products = geometry.taps * geometry.in_channels
    if products > MOST_PRODUCTS:
        raise ValueError(
            f"grouped_conv2d: a sum of {products} int8 products may exceed int32; up to {MOST_PRODUCTS} are "
            "supported"
        )
    step = epilogue.out_step
    if step is not None and (step.numel() != 1 or step.dtype != torch.float32):
        raise ValueError(
            f"grouped_conv2d: out_step is {step.dtype} of shape {tuple(step.shape)}, expected one float32"
        )


def _check_memory(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(f"grouped_conv2d: {name} is {tensor.layout}; the operator takes dense tensors")
    if tensor.numel() == 0:
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    end = tensor.storage_offset() + sum((n - 1) * step for n, step in steps) + 1
    held = tensor.untyped_storage().nbytes()
    if end * tensor.element_size() > held:
        raise ValueError(
            f"grouped_conv2d: {name} of shape {tuple(tensor.shape)} does not fit into its storage of "
            f"{held} bytes, which was freed or resized"
        )
