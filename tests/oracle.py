"""What tests compare with: the masked convolution in float64, one norm error, all partitions of a set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "silu": F.silu}


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    live: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "none",
    pool: str = "none",
) -> Tensor:
    """Convolve in float64, filters with the same live channels together.

    Dead weights are left out rather than multiplied, so that NaN and infinities spread as they should.

    Args:
        x: [N, C, H, W].
        weight: [O, C, kh, kw].
        live: bool, like ``weight``.
        stride: rows, columns.
        padding: top, bottom, left, right.
        dilation: rows, columns.
        bias: [O] or None.
        residual: like the result before pooling, or None.
        scale: [O] or None, a factor of each filter's sum.
        activation: a key of ACTIVATIONS.
        pool: "none" or "max2x2".
    """
    top, bottom, left, right = padding
    x, weight, live = F.pad(x.double().cpu(), (left, right, top, bottom)), weight.double().cpu(), live.cpu()
    kernel = weight.shape[2:]
    rows, columns = (
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)
    )
    y = torch.zeros(x.shape[0], weight.shape[0], rows, columns, dtype=torch.float64)
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            seen = x[:, :, r * dilation[0] :: stride[0], s * dilation[1] :: stride[1]][:, :, :rows, :columns]
            for pattern in live[:, :, r, s].unique(dim=0):
                if pattern.any():
                    filters = (live[:, :, r, s] == pattern).all(1).nonzero().flatten()
                    factors = weight[filters][:, pattern, r, s]
                    y[:, filters] += torch.einsum("nchw,fc->nfhw", seen[:, pattern], factors)
    for vector, combine in ((scale, torch.mul), (bias, torch.add)):
        if vector is not None:
            y = combine(y, vector.double().cpu()[:, None, None])
    if residual is not None:
        y = y + residual.double().cpu()
    y = ACTIVATIONS[activation](y)
    return F.max_pool2d(y, 2) if pool == "max2x2" else y


def norm_error(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected||, the plain norm where ``expected`` is zero.

    It is taken over the finite values; infinite for another shape, and where not both have the same NaN or
    infinity.
    """
    if found.shape != expected.shape:
        return float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = found.detach().to(wide).cpu(), expected.detach().to(wide).cpu()
    finite = torch.isfinite(expected)
    same = (found == expected) | (found.isnan() & expected.isnan())
    if not bool((same | (finite & torch.isfinite(found))).all()):
        return float("inf")
    error = float(torch.linalg.vector_norm((found - expected)[finite]))
    return error / (float(torch.linalg.vector_norm(expected[finite])) or 1.0)


def partitions(items: list) -> Iterator[list[list]]:
    """Yield every way to put items into groups: the reference of whatever looks for the best one."""
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        for index in range(len(parts)):
            yield [*parts[:index], [first, *parts[index]], *parts[index + 1 :]]
        yield [[first], *parts]
