"""How far a result is from another, and how far it may be: norm errors and tolerances."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

_SLICE_FACTOR = 10.0
_SLICE_FLOOR = 1e-3
_MAX_SLICES = 1 << 16
_LEAST_VALUES = 64  # in a channel: a few numbers near zero have no scale of their own

_LAYER_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 5e-3
NETWORK_FACTOR = 3.0

INT8_LIMIT = 0.05
"""Norm error up to which a layer may run in int8. Normal numbers lose 1 % in their best steps, and a sum of
products of two such a little more; at 5 % a few outliers need steps that leave the rest too few of them."""


def layer_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the norm error up to which two runs of one layer count as equal.

    Both sides round, so it is a few times the error that one run may have against exact arithmetic. On CUDA,
    torch's float32 convolutions may use TF32.
    """
    if dtype == torch.float32 and device.type == "cuda":
        return _TF32_TOLERANCE
    return _LAYER_TOLERANCE.get(dtype, 1e-2)


def network_tolerance(dtypes: Collection[torch.dtype], device: torch.device) -> float:
    """Return the norm error up to which two runs of a network count as equal: errors of layers add up.

    Args:
        dtypes: of its convolutions' results; the coarsest counts.
        device: where it runs.
    """
    return NETWORK_FACTOR * max(layer_tolerance(dtype, device) for dtype in dtypes)


def norm_error(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected|| in float64 (the plain norm where ``expected`` is zero)."""
    expected = expected.double()
    error = float((found.double() - expected).norm())
    size = float(expected.norm())
    return error / size if size else error


def strict_error(mine: Tensor, reference: Tensor) -> float:
    """Return a tensor's error against another, see ``error_of``; infinite for another shape."""
    return error_of(mine, reference) if mine.shape == reference.shape else math.inf


def error_of(left: Tensor, right: Tensor) -> float:
    """Return the error of a tensor against the model's of the same shape: 0 for equal, infinite for unlike.

    It is ||left - right|| / ||right|| over the tensor, or a tenth of the same over one channel or one column
    of the last axis (of 64 values or more), whichever is worse. Where the model has NaN or infinity, so must
    ``left``.
    """
    if not right.is_floating_point() and not right.is_complex():
        return 0.0 if torch.equal(left, right) else math.inf
    if right.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    wide = torch.float64 if right.dtype == torch.float64 or right.numel() < 1 << 16 else torch.float32
    left, right = left.detach().to(wide), right.detach().to(wide)
    size = float(torch.linalg.vector_norm(right))
    if not math.isfinite(size):
        odd = ~torch.isfinite(right)
        same = (left == right) | (left.isnan() & right.isnan())
        if not bool((same | ~odd).all()):
            return math.inf
        left, right = left.masked_fill(odd, 0), right.masked_fill(odd, 0)
        size = float(torch.linalg.vector_norm(right))
    difference = left - right
    worst = float(torch.linalg.vector_norm(difference))
    if not math.isfinite(worst):
        return math.inf
    worst = worst / size if size else worst
    for axis in {1, right.dim() - 1} if right.dim() > 1 else ():
        count = right.shape[axis]
        if 1 < count <= _MAX_SLICES and right.numel() >= _LEAST_VALUES * count and size:
            others = [other for other in range(right.dim()) if other != axis]
            errors = torch.linalg.vector_norm(difference, dim=others)
            sizes = torch.linalg.vector_norm(right, dim=others)
            floor = _SLICE_FLOOR * size / math.sqrt(count)
            worst = max(worst, float((errors / sizes.clamp_min(floor)).max()) / _SLICE_FACTOR)
    return worst
