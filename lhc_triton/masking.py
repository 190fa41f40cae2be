"""The product of weights and block masks, in pieces that stay in a CPU's caches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .topology import expand_mask

# Weights of a piece on a CPU: what is computed on the way stays in the cores' second-level caches.
_PIECE = 1 << 18


def apply_mask(
    weight: Tensor,
    block_mask: Tensor,
    in_block: int,
    out_block: int,
    masked_filters: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return weight [O, I, kh, kw] times its expanded block mask, in the weight's memory format.

    Differentiable in both. Where the blocks divide the channels, no expanded mask is built.

    Args:
        weight: [O, I, kh, kw].
        block_mask: [Go, Gi, kh, kw], zeros and ones of the weight's dtype.
        in_block: input channels of a full block.
        out_block: filters of a full group.
        masked_filters: bool [O], the filters that use their mask, the others stay whole; None for all.
        dtype: of the result; the weight's by default.
    """
    out_channels, in_channels = weight.shape[:2]
    in_block, out_block = min(in_block, in_channels), min(out_block, out_channels)
    dtype = weight.dtype if dtype is None else dtype
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if masked_filters is not None and not traced and _whole(masked_filters):
        masked_filters = None  # past the warm-up there is less to compute
    if out_channels % out_block or in_channels % in_block:
        mask = expand_mask(block_mask, out_channels, in_channels, in_block, out_block)
        if masked_filters is not None:
            mask = torch.where(masked_filters.view(-1, 1, 1, 1), mask, 1)
        return (weight * mask).to(dtype)
    tiles = _Tiles.of(weight, in_block, out_block)
    mask = tiles.of_mask(block_mask)
    if masked_filters is not None:
        # Mixed while a block has one number for all of its channels: a choice among weights takes longer.
        mask = torch.where(masked_filters.view(-1, out_block, 1, 1, 1), mask, 1)
    if traced or tiles.step >= tiles.grid[0] or _transformed(weight):
        # In one piece there is less to do around plain operators, and tracers and transforms know them.
        return tiles.to_weight(tiles.of_weight(weight) * mask).to(dtype)
    return _Product.apply(weight, mask, tiles, dtype)


def _whole(filters: Tensor) -> bool:
    """Whether all are known to be set; a GPU would have to be waited for, and a fake tensor has no values."""
    return filters.device.type == "cpu" and type(filters) is Tensor and bool(filters.all())


def _transformed(weight: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation looks at what is computed."""
    return torch._C._are_functorch_transforms_active() or unpack_dual(weight).tangent is not None


class _Tiles(NamedTuple):
    """How weights are seen as the tiles of their blocks, in the order in which memory has them.

    That is [Go, out_block, kh * kw, Gi, in_block] of a channels_last weight, else [Go, out_block, Gi,
    in_block, kh * kw].
    """

    weight: tuple[int, ...]
    grid: tuple[int, int]
    last: bool  # whether the weight is channels_last
    step: int  # filter groups in a piece

    @classmethod
    def of(cls, weight: Tensor, in_block: int, out_block: int) -> _Tiles:
        last = weight.is_contiguous(memory_format=torch.channels_last)
        # A 1x1 weight is contiguous in both formats: its strides say which one it was given.
        last = last and weight.stride(3) == weight.shape[1] > 1
        grid = weight.shape[0] // out_block, weight.shape[1] // in_block
        step = max(1, _PIECE * grid[0] // weight.numel()) if weight.device.type == "cpu" else grid[0]
        return cls(tuple(weight.shape), grid, last, step)

    @property
    def channels(self) -> int:
        """The dimension of a block's channels."""
        return 4 if self.last else 3

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.last else torch.contiguous_format

    def of_weight(self, weight: Tensor) -> Tensor:
        """See the tiles of a weight, or of its gradient: a view where it has this memory format."""
        (groups, blocks), (filters, channels, kh, kw) = self.grid, self.weight
        tile = (blocks, channels // blocks)
        weight = weight.contiguous(memory_format=self.format)
        if self.last:
            return weight.permute(0, 2, 3, 1).view(groups, filters // groups, kh * kw, *tile)
        return weight.view(groups, filters // groups, *tile, kh * kw)

    def to_weight(self, tiles: Tensor) -> Tensor:
        """Turn what `of_weight` made back into the shape of a weight."""
        filters, channels, kh, kw = self.weight
        if self.last:
            return tiles.view(filters, kh, kw, channels).permute(0, 3, 1, 2)
        return tiles.view(self.weight)

    def of_mask(self, mask: Tensor) -> Tensor:
        """Bring a mask [Go, Gi, kh, kw] into a shape that spreads over the tiles."""
        (groups, blocks), (_, _, kh, kw) = self.grid, self.weight
        if self.last:
            return mask.permute(0, 2, 3, 1).reshape(groups, 1, kh * kw, blocks, 1)
        return mask.reshape(groups, 1, blocks, 1, kh * kw)


class _Product(torch.autograd.Function):
    """Weights [O, I, kh, kw] times a mask that spreads over their tiles, in a type of choice.

    What a large weight would write to memory on the way, and read again, is the product before it is turned
    into bfloat16, the gradient as it comes, and its product with the weight.
    """

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, tiles: _Tiles, dtype: torch.dtype) -> Tensor:
        product = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=tiles.format)
        into, factors = tiles.of_weight(product), tiles.of_weight(weight)
        if dtype == weight.dtype:
            torch.mul(factors, mask, out=into)
            return product
        for start in range(0, tiles.grid[0], tiles.step):
            piece = slice(start, start + tiles.step)
            into[piece] = factors[piece] * mask[piece]
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, mask, ctx.tiles, _ = inputs
        ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, mask = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        factors, pulls = tiles.of_weight(weight), tiles.of_weight(grad)
        if torch.is_grad_enabled():  # to be differentiated again
            pulls = pulls.to(weight.dtype)
            return tiles.to_weight(pulls * mask), (pulls * factors).sum_to_size(mask.shape), None, None
        weight_grad = mask_grad = None
        if ctx.needs_input_grad[0]:
            weight_grad = torch.empty_like(weight, memory_format=tiles.format)
            into = tiles.of_weight(weight_grad)
        if ctx.needs_input_grad[1]:
            mask_grad = torch.empty_like(mask)
        for start in range(0, tiles.grid[0], tiles.step):
            piece = slice(start, start + tiles.step)
            pull = pulls[piece].to(weight.dtype)
            if weight_grad is not None:
                torch.mul(pull, mask[piece], out=into[piece])
            if mask_grad is not None:
                # Over a block's channels first: they lie side by side in memory.
                sums = (pull * factors[piece]).sum(tiles.channels, keepdim=True)
                mask_grad[piece] = sums.sum_to_size(mask_grad[piece].shape)
        return weight_grad, mask_grad, None, None
