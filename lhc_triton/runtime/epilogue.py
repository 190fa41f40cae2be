"""What follows the sum: scale, bias, residual, activation, pooling, and the layout of the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu")
POOLS = ("none", "max2x2")
LAYOUTS = ("channels_last", "contiguous")

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def finish(
    total: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    *,
    activation: str,
    pool: str,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """Turn accumulated sums into the layer's output: ``pool(act(scale * total + bias + residual))``.

    Args:
        total: sums [N, O, OH, OW] in the accumulation type; it belongs to the caller's backend and may be
            overwritten.
        bias: [O] or None.
        residual: [N, O, OH, OW] or None, added before the activation.
        scale: [O] or None, a factor for each filter's sum.
        activation: "none" or "relu".
        pool: "none" or "max2x2" (2x2 windows, stride 2, an odd last row or column dropped).
        layout: "channels_last" or "contiguous".
        dtype: type of the result.

    Returns:
        [N, O, OH, OW], or [N, O, OH // 2, OW // 2] with pooling, dense in the asked layout.
    """
    if scale is not None:
        total.mul_(scale.to(total.dtype).view(1, -1, 1, 1))
    if bias is not None:
        total.add_(bias.to(total.dtype).view(1, -1, 1, 1))
    if residual is not None:
        total.add_(residual)
    if activation == "relu":
        total.relu_()
    if pool == "max2x2":
        total = F.max_pool2d(total, 2)
    # A size-1 dimension makes both formats "contiguous" in torch's eyes, so the strides are forced.
    return with_layout(total.to(dtype), layout)


def with_layout(y: Tensor, layout: str) -> Tensor:
    """Return ``y`` [N, C, H, W] with exactly the strides that ``layout`` gives a new tensor."""
    n, c, h, w = y.shape
    wanted = (c * h * w, 1, w * c, c) if layout == "channels_last" else (c * h * w, h * w, w, 1)
    if y.stride() == wanted:
        return y
    out = torch.empty((n, c, h, w), dtype=y.dtype, device=y.device, memory_format=MEMORY_FORMATS[layout])
    return out.copy_(y)
