"""Other ways to save the same work on one layer: a narrower dense one, block-sparse and 2:4 products."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lhc_bench.measure.peers import layouts, norm_error
from lhc_bench.measure.setting import Contender
from lhc_triton.planning.schema import ConvGeometry

CHANNEL_STEP = 8  # narrower layers keep channel counts that vector units and tensor cores like
SEMI_STRUCTURED_DENSITY = 0.5
MASK_FREE = frozenset({"narrow", "2:4"})
"""Rivals that do not see the mask: a run measures them under its first block size only."""


def narrow_channels(channels: tuple[int, int], density: float) -> tuple[int, int]:
    """Return (I, O) of the dense layer whose MACs come nearest to a share of the given one's.

    Both shrink by about the square root of the density, to multiples of 8.
    """
    choices = []
    for count in channels:
        step = min(count, CHANNEL_STEP)
        low = max(step, math.floor(count * math.sqrt(density) / step) * step)
        choices.append((low, min(low + step, count)))
    wanted = channels[0] * channels[1] * density
    inputs, outputs = min(itertools.product(*choices), key=lambda c: abs(math.log(c[0] * c[1] / wanted)))
    return inputs, outputs


def narrow(geometry: ConvGeometry, x: Tensor, density: float) -> Contender:
    """Return a dense convolution with bias and ReLU on fewer channels; its weights are random.

    Args:
        geometry: of the layer that it stands in for.
        x: that layer's input; the first channels of it are read.
        density: share of the MACs to keep.
    """
    inputs, outputs = narrow_channels((geometry.in_channels, geometry.out_channels), density)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, *geometry.kernel, generator=generator).to(x)
    weight /= math.sqrt(inputs * geometry.taps)
    bias = torch.randn(outputs, generator=generator).to(x)
    border = (geometry.padding[0], geometry.padding[2])

    def convolve(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(a, w, b, geometry.stride, border, geometry.dilation).relu_()

    forms = {}
    for name, layout in layouts(x.device.type).items():
        a, w = x[:, :inputs].contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
        forms[name] = partial(convolve, a, w, bias)
    with torch.inference_mode():
        exact = convolve(x[:1, :inputs].double(), weight.double(), bias.double())
        error = max(norm_error(form()[:1], exact) for form in forms.values())
    return Contender(forms, error, geometry.out_pixels * geometry.taps * inputs * outputs)


def block_sparse(
    geometry: ConvGeometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    block: tuple[int, int],
    expected: Tensor,
    live_macs: int,
) -> Contender:
    """Return im2col and torch's product with a block-sparse (BSR) matrix.

    Args:
        geometry: of the layer; dilation 1.
        x: [N, I, H, W].
        weight: [O, I, kh, kw] with zeros where blocks are dead.
        bias: [O].
        block: (in_block, out_block).
        expected: exact output, of the first images at least.
        live_macs: of one call.

    Raises:
        RuntimeError: torch has no such product here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        matrix = _matrix(weight).to_sparse_bsr((block[1], block[0]))
    call = _product(geometry, x, matrix, bias)
    with torch.inference_mode():
        error = norm_error(call()[: len(expected)], expected)
    return Contender({"im2col": call}, error, live_macs)


def semi_structured(geometry: ConvGeometry, x: Tensor, weight: Tensor, bias: Tensor) -> Contender:
    """Return im2col and torch's product with a 2:4 matrix: the two largest of any four weights are kept.

    Args:
        geometry: of the layer; dilation 1.
        x: [N, I, H, W].
        weight: [O, I, kh, kw], dense.
        bias: [O].

    Raises:
        RuntimeError, ValueError: torch has no such product here, or not for these sizes.
    """
    matrix = _matrix(weight)
    fours = matrix.view(len(matrix), -1, 4)
    kept = torch.zeros_like(fours).scatter_(2, fours.abs().topk(2, dim=2).indices, 1.0)
    pruned = (fours * kept).view_as(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype"
        sparse = torch.sparse.to_sparse_semi_structured(pruned)
    call = _product(geometry, x, sparse, bias)
    with torch.inference_mode():
        exact = _product(geometry, x[:1].double(), pruned.double(), bias.double())()
        error = norm_error(call()[:1], exact)
    return Contender({"im2col": call}, error, geometry.macs // 2)


def _matrix(weight: Tensor) -> Tensor:
    """Return the weight as [O, kh * kw * I]: the channels of a tap lie side by side, as blocks do."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1).contiguous()


def _product(geometry: ConvGeometry, x: Tensor, matrix: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """Return relu(columns @ matrix.T + bias), gathering the columns anew in each call."""
    if geometry.dilation != (1, 1):
        raise ValueError(f"dilation={geometry.dilation}: the im2col forms support 1")
    (kh, kw), (sh, sw) = geometry.kernel, geometry.stride
    top, bottom, left, right = geometry.padding
    x = x.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        windows = F.pad(x, (left, right, top, bottom)).unfold(2, kh, sh).unfold(3, kw, sw)
        n, _, oh, ow = windows.shape[:4]
        columns = windows.permute(0, 2, 3, 4, 5, 1).reshape(n * oh * ow, -1)
        y = F.linear(columns, matrix, bias).relu_()
        return y.view(n, oh, ow, -1).permute(0, 3, 1, 2)

    return call
