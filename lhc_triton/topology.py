"""Topologies as pure functions: masks from effects, rigid shapes, expansion to weights, counts and probes.

The method is Learnable Heterogeneous Convolution (R. Zhao et al., Neural Networks 2021, arXiv 2301.05440).
Shapes: O, I are a convolution's filters and input channels; Go = ceil(O / out_block) filter groups;
Gi = ceil(I / in_block) input blocks; kh, kw the kernel; S the number of rigid shapes. The last block of
either axis is smaller where the block size does not divide the channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ShapeFamily = Literal["free", "rigid"]
Effects = Literal["random", "magnitude"]

# Beyond this distance the straight-through gradient of an effect is damped, so that it can still come back.
_LINEAR_RANGE = 1.0
_DAMPING = 0.1


@dataclass(frozen=True)
class LHCConfig:
    """How a convolution learns its topology.

    Attributes:
        density: share of the weights that the penalty steers to, in (0, 1]; None means no penalty.
        in_block: adjacent input channels that share one mask bit.
        out_block: adjacent filters that share one pattern.
        shapes: "free" learns every (tap, input block) entry by itself; "rigid" picks one of a few fixed
            kernel shapes (see `rigid_shapes`) per input block.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value has the wrong type.
    """

    density: float | None = 0.1
    in_block: int = 32
    out_block: int = 16
    shapes: ShapeFamily = "free"

    def __post_init__(self) -> None:
        if self.density is not None:
            if isinstance(self.density, bool) or not isinstance(self.density, int | float):
                raise TypeError(
                    f"density={self.density!r} is not a number: give one in (0, 1], or None for no penalty"
                )
            if not 0 < self.density <= 1:
                raise ValueError(
                    f"density={self.density!r} is out of range: give one in (0, 1], or None for no penalty"
                )
        for name in ("in_block", "out_block"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is not an int: give a number of channels, 1 or more")
            if value < 1:
                raise ValueError(f"{name}={value} is not supported: give a number of channels, 1 or more")
        if self.shapes not in get_args(ShapeFamily):
            raise ValueError(f"shapes={self.shapes!r} is not supported: choose 'free' or 'rigid'")


def block_grid(out_channels: int, in_channels: int, in_block: int, out_block: int) -> tuple[int, int]:
    """Return (Go, Gi): the numbers of filter groups and of input blocks, cropped last blocks included."""
    return math.ceil(out_channels / out_block), math.ceil(in_channels / in_block)


def rigid_shapes(kernel_size: int | tuple[int, int]) -> Tensor:
    """Return the rigid shapes of a kernel, bool [S, kh, kw].

    In this order: empty; centre; the lines through the centre (horizontal, vertical, and the two diagonals
    of a square kernel); the 4 corners (top left, top right, bottom left, bottom right), each reaching to the
    centre; the 4 halves (top, bottom, left, right), centre line included; full. For 3x3 these are the 15
    shapes of the method. Duplicates are dropped, the first one stays: 1x1 has two shapes, empty and full.

    Raises:
        ValueError: the kernel has an even size, which has no centre.
    """
    kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    if kh < 1 or kw < 1 or kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(
            f"kernel_size=({kh}, {kw}) has no rigid shapes: use odd sizes, or shapes='free' for any size"
        )
    middle_row, middle_column = kh // 2, kw // 2
    to_row, to_column = slice(0, middle_row + 1), slice(0, middle_column + 1)
    from_row, from_column = slice(middle_row, None), slice(middle_column, None)
    everything = slice(None)
    regions: list[tuple[Any, Any] | None] = [
        None,
        (middle_row, middle_column),
        (middle_row, everything),
        (everything, middle_column),
    ]
    if kh == kw:
        diagonal = torch.arange(kh, device="cpu")
        regions += [(diagonal, diagonal), (diagonal, diagonal.flip(0))]
    regions += [(rows, columns) for rows in (to_row, from_row) for columns in (to_column, from_column)]
    regions += [
        (to_row, everything),
        (from_row, everything),
        (everything, to_column),
        (everything, from_column),
    ]
    regions.append((everything, everything))

    shapes: list[Tensor] = []
    for region in regions:
        # The values are read right here: also where the default device is "meta".
        shape = torch.zeros(kh, kw, dtype=torch.bool, device="cpu")
        if region is not None:
            shape[region] = True
        if not any(torch.equal(shape, known) for known in shapes):
            shapes.append(shape)
    return torch.stack(shapes)


class _LearnedMask(torch.autograd.Function):
    """Effects, and None or the rigid shapes -> mask [Go, Gi, kh, kw]; straight-through backward."""

    @staticmethod
    def forward(ctx: Any, effects: Tensor, shapes: Tensor | None) -> Tensor:
        ctx.save_for_backward(effects, shapes)
        if shapes is not None:
            return shapes.to(effects.dtype)[_rigid_choice(effects, shapes)]
        # The best entry of a group lives if any does: it can be switched on without a look at the others.
        rows = effects.flatten(1)
        live = (rows > 0).scatter_(1, rows.argmax(dim=1, keepdim=True), True)
        return live.view(effects.shape).to(effects.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        effects, shapes = ctx.saved_tensors
        if shapes is not None:
            grad = (grad.unsqueeze(2) * shapes.to(grad.dtype)).sum(dim=(-2, -1))
            effects = effects - effects.mean(dim=-1, keepdim=True)
        return torch.where(effects.abs() < _LINEAR_RANGE, grad, _DAMPING * grad), None


def _rigid_choice(effects: Tensor, shapes: Tensor) -> Tensor:
    """Index of the shape of every block, int64 [Go, Gi]; a group of empty shapes gets its best other one."""
    choice = effects.argmax(dim=-1)
    empty = ~shapes.flatten(1).any(dim=1)
    dead = empty[choice].all(dim=1, keepdim=True)
    best, best_shape = effects.masked_fill(empty, -math.inf).max(dim=-1)
    rescued_block = torch.zeros_like(choice, dtype=torch.bool).scatter_(
        1, best.argmax(dim=1, keepdim=True), True
    )
    return torch.where(dead & rescued_block, best_shape, choice)


def learned_mask(effects: Tensor, shapes: Tensor | None = None) -> Tensor:
    """Return the mask that effects stand for, ones and zeros.

    Of free shapes an entry lives where its effect is above 0, and a filter group without any keeps the one
    with its largest effect. Of rigid shapes each block has the one with the largest effect (the first of
    equals), and a group whose blocks all chose the empty shape gets its best non-empty one.

    Args:
        effects: [Go, Gi, kh, kw] for free shapes, [Go, Gi, S] for rigid ones.
        shapes: None for free shapes, else the rigid shapes, bool [S, kh, kw], see `rigid_shapes`.

    Returns:
        The mask, [Go, Gi, kh, kw] of the effects' dtype. Its gradient g reaches the effects straight through:
        unchanged where ``|E| < 1``, times 0.1 elsewhere; that of rigid shape s is ``sum(g * shape_s)``, times
        0.1 unless it lies within 1 of the mean of its block's effects.
    """
    return _LearnedMask.apply(effects, shapes)


def rescued_groups(effects: Tensor, shapes: Tensor | None = None) -> int:
    """Count the filter groups that would have lost every entry and were given their best one.

    Args:
        effects: [Go, Gi, kh, kw] for free shapes, [Go, Gi, S] for rigid ones.
        shapes: None for free shapes, else the rigid shapes, bool [S, kh, kw].
    """
    if shapes is None:
        return int((~(effects > 0).flatten(1).any(dim=1)).sum())
    empty = ~shapes.flatten(1).any(dim=1)
    return int(empty[effects.argmax(dim=-1)].all(dim=1).sum())


def expand_mask(
    block_mask: Tensor, out_channels: int, in_channels: int, in_block: int, out_block: int
) -> Tensor:
    """Return the mask of every weight, [O, I, kh, kw], from a block mask [Go, Gi, kh, kw].

    Differentiable: a block's gradient is the sum over its weights.
    """
    groups, blocks, kh, kw = block_mask.shape
    # Of a block that is larger than the layer only what is not cropped is built.
    in_block, out_block = min(in_block, in_channels), min(out_block, out_channels)
    tiled = block_mask[:, None, :, None].expand(groups, out_block, blocks, in_block, kh, kw)
    return tiled.reshape(groups * out_block, blocks * in_block, kh, kw)[:out_channels, :in_channels]


def count_weights(
    block_mask: Tensor, out_channels: int, in_channels: int, in_block: int, out_block: int
) -> Tensor:
    """Return the number of live weights as a float64 scalar, cropped last blocks counted exactly.

    Differentiable: a block's gradient is its number of weights per tap.

    Args:
        block_mask: [Go, Gi, kh, kw], bool or 0 and 1 of a float type.
        out_channels: O.
        in_channels: I.
        in_block: input channels of a full block.
        out_block: filters of a full group.
    """
    groups, blocks = block_grid(out_channels, in_channels, in_block, out_block)
    in_block, out_block = min(in_block, in_channels), min(out_block, out_channels)
    if groups * out_block == out_channels and blocks * in_block == in_channels:
        return in_block * out_block * block_mask.sum(dtype=torch.float64)
    lost_filters = groups * out_block - out_channels
    lost_channels = blocks * in_block - in_channels
    taps = block_mask.to(torch.float64).sum(dim=(2, 3))
    filters = out_block * taps.sum(dim=0) - lost_filters * taps[-1]
    return in_block * filters.sum() - lost_channels * filters[-1]


def pattern_distance(block_mask: Tensor, sharers: int) -> Tensor:
    """Return how far filter groups are from sharing their patterns, a float64 scalar in [0, 1].

    Each group is compared with the ``sharers - 1`` other groups whose patterns are nearest (those with the
    lowest index of equally near ones); the result is the mean share of entries in which they differ. It is 0
    where every pattern is shared by ``sharers`` groups, or by all of them. The measure is ours.

    Differentiable: an entry is drawn to the side on which more of the near groups have it. Entries in which
    a group agrees with them get no gradient, and a difference pulls an entry as often on as off, so the
    density stays where the rest of the penalty has it.

    Args:
        block_mask: [Go, Gi, kh, kw], bool or 0 and 1 of a float type.
        sharers: groups that should have a pattern in common, itself counted; 1 or less gives 0.
    """
    rows = block_mask.flatten(1).to(torch.float64)
    others = min(sharers, len(rows)) - 1
    if others < 1:
        return 0 * rows.sum()
    fixed = rows.detach()
    shared, live = fixed @ fixed.T, fixed.sum(dim=1)
    differing = (live[:, None] + live - 2 * shared).fill_diagonal_(math.inf)
    nearest = differing.sort(dim=1, stable=True).indices[:, :others]
    return (rows[:, None] - fixed[nearest]).abs().mean()


def block_means(values: Tensor, in_block: int, out_block: int) -> Tensor:
    """Return the mean of every block of values [O, I, kh, kw], float64 [Go, Gi, kh, kw]; crops are exact.

    Of squared weights it is the blocks' magnitude per weight.
    """
    out_channels, in_channels, kh, kw = values.shape
    groups, blocks = block_grid(out_channels, in_channels, in_block, out_block)
    # Of a block that is larger than the layer only what is not cropped is built.
    in_block, out_block = min(in_block, in_channels), min(out_block, out_channels)
    rest = (0, 0, 0, 0, 0, blocks * in_block - in_channels, 0, groups * out_block - out_channels)
    tiles = nn.functional.pad(values, rest).view(groups, out_block, blocks, in_block, kh, kw)
    filters, channels = (
        (size - block * torch.arange(count, device=values.device)).clamp(max=block)
        for size, block, count in ((out_channels, out_block, groups), (in_channels, in_block, blocks))
    )
    return tiles.sum(dim=(1, 3), dtype=torch.float64) / (filters[:, None] * channels)[:, :, None, None]


def effect_spread(effects: Tensor) -> float:
    """Return the standard deviation of He-normal effects: sqrt(2 / fan_in).

    Args:
        effects: [Go, Gi, kh, kw] for free shapes, [Go, Gi, S] for rigid ones; fan_in is what a filter group
            has of them.
    """
    return math.sqrt(2.0 / effects[0].numel())


def ordered_effects(scores: Tensor, shapes: Tensor | None = None) -> Tensor:
    """Return effects that follow the blocks' scores: the He-normal distribution's quantiles, in their order.

    About half of the entries of free shapes live, as with random effects: those with the higher scores. A
    rigid shape's score is the sum of its taps' scores, each less the layer's median. The rule is ours.

    Args:
        scores: float64 [Go, Gi, kh, kw], see `block_means`.
        shapes: None for free shapes, else the rigid shapes, bool [S, kh, kw].

    Returns:
        The effects, float64 [Go, Gi, kh, kw] or [Go, Gi, S].
    """
    if shapes is not None:
        scores = torch.einsum("gbrc,src->gbs", scores - scores.median(), shapes.to(scores.dtype))
    count = scores.numel()
    places = (torch.arange(count, dtype=torch.float64, device=scores.device) + 0.5) / count
    effects = torch.empty_like(places)
    effects[scores.flatten().argsort(stable=True)] = effect_spread(scores) * torch.special.ndtri(places)
    return effects.view(scores.shape)


def mask_correlation(before: Tensor, after: Tensor) -> float:
    """Return the Pearson correlation of two masks of one shape, each of their bits counted once, -1 to 1.

    Where a mask is constant, the correlation is not defined: it is set to 1.0 for equal masks, else to 0.0.

    Args:
        before: a mask (of blocks or of weights), bool or zeros and ones.
        after: the same later on.

    Raises:
        ValueError: the masks differ in shape.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"the masks have the shapes {tuple(before.shape)} and {tuple(after.shape)}: give two of one layer"
        )
    first, second = before.detach() != 0, after.detach() != 0
    bits = first.numel()
    in_first, in_second, in_both = (int(mask.sum()) for mask in (first, second, first & second))
    spread = in_first * (bits - in_first) * in_second * (bits - in_second)
    if spread == 0:
        return float(torch.equal(first, second))
    return (bits * in_both - in_first * in_second) / math.sqrt(spread)


def shape_counts(block_mask: Tensor) -> dict[str, int]:
    """Count the kernel shapes of a mask's blocks, the most frequent first, ties by name.

    A shape's name is its rows of zeros and ones: "010/111/010" is a 3x3 cross, "000/000/000" a block that is
    off. The counts add up to Go * Gi.

    Args:
        block_mask: [Go, Gi, kh, kw], bool or zeros and ones.
    """
    kernels = (block_mask.detach() != 0).flatten(0, 1).to(torch.uint8)
    shapes, counts = torch.unique(kernels, dim=0, return_counts=True)
    named = {
        "/".join("".join(map(str, row)) for row in shape): count
        for shape, count in zip(shapes.tolist(), counts.tolist(), strict=True)
    }
    return dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))
