"""From a convolution of the model to the fused module that replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.layers import LHCConv2d
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.network.copying import duplicate
from lhc_triton.runtime.network.grouped import GroupedConv2d
from lhc_triton.runtime.op.dense import DenseConv2d, FusedConv2d
from lhc_triton.runtime.op.epilogue import is_channels_last


def conv_weight(conv: nn.Conv2d) -> Tensor:
    """Return the weight [O, I / groups, kh, kw] in force: masked where the layer has a mask."""
    with torch.no_grad():
        return (conv.masked_weight() if isinstance(conv, LHCConv2d) else conv.weight).detach()


def border(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return a convolution's zero border as (top, bottom, left, right)."""
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    vertical, horizontal = (int(p) for p in conv.padding)
    return (vertical, vertical, horizontal, horizontal)


def folded(conv: nn.Conv2d, norm: Any = None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a convolution with a batch norm in eval mode folded in.

    Computed in float64 and rounded once. Filters are scaled, so zeros stay zeros.

    Args:
        conv: the convolution.
        norm: nn.BatchNorm2d with running statistics, or None.
    """
    weight = conv_weight(conv)
    bias = None if conv.bias is None else conv.bias.detach()
    if norm is None:
        return weight, bias
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    start = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = start * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def fuse(
    conv: nn.Conv2d,
    norm: Any,
    *,
    layer: LayerPlan | None,
    backend: str,
    activation: str,
    pool: str,
    tune: str = "cached",
    in_place: bool = False,
) -> FusedConv2d:
    """Build the fused module of one convolution.

    Args:
        conv: nn.Conv2d or LHCConv2d with zero borders.
        norm: the batch norm to fold, or None.
        layer: its plan; None for a layer without one, which runs dense.
        backend: "dense", or the sparse backend that runs the plan.
        activation: "none" or "relu".
        pool: "none" or "max2x2".
        tune: "off" for the kernels' heuristic configs, see GroupedConv2d.
        in_place: whether the model's own code will call it: then it writes the memory format that the
            convolution would.

    Raises:
        ValueError: the backend cannot serve the weight's type and device.
    """
    weight, bias = folded(conv, norm)
    fused: FusedConv2d
    if layer is None or backend == "dense":
        fused = DenseConv2d(
            weight,
            bias,
            stride=conv.stride,
            padding=border(conv),
            dilation=conv.dilation,
            groups=conv.groups,
            activation=activation,
            pool=pool,
        )
    else:
        fused = GroupedConv2d.from_weight(
            layer, weight, bias, backend=backend, activation=activation, pool=pool, tune=tune
        )
    if in_place:
        # torch's convolution writes channels_last where its weight has that format, whatever its input has
        fused.keeps_format = not is_channels_last(weight)
    return fused


def swapped(work: nn.Module, fused: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of the module tree, sharing tensors, with convolutions replaced wherever they are.

    What takes a convolution's place has its forward hooks.
    """
    named = dict(work.named_modules())
    # Everything but the replaced modules is shared with the original by way of deepcopy's memo.
    memo: dict[int, Any] = {id(named[name]): module for name, module in fused.items()}
    memo.update({id(t): t for t in (*work.parameters(), *work.buffers())})
    return duplicate(work, memo)
