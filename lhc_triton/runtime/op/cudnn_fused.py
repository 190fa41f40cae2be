"""cuDNN's convolution that adds bias and residual and applies ReLU in the same kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PROBED_ERROR = 2e-2


@functools.cache
def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel is there and computes what torch's separate operations do, NaN included.

    Tries it on a few pixels, once for each device and type, and waits for the result: not for use inside of a
    capture. Whether cuDNN's ReLU keeps NaN is up to its release.
    """
    if device.type != "cuda" or torch.version.hip or not torch.backends.cudnn.is_available():
        return False
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    with torch.inference_mode():
        x = random(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
        x[1, 3, 2, 2] = float("nan")
        weight = random(16, 16, 3, 3).contiguous(memory_format=torch.channels_last) / 12
        bias, z = random(16), x.roll(1, 0)
        plain = F.conv2d(x, weight, bias, padding=1)
        for residual in (None, z):
            expected = (plain if residual is None else plain + residual).relu()
            try:
                found = convolve(x, weight, bias, residual, (1, 1), (1, 1), (1, 1), 1)
            except RuntimeError:  # each release of cuDNN has types and sizes that it does not fuse
                return False
            if not torch.equal(found.isnan(), expected.isnan()):
                return False
            difference = (found - expected).nan_to_num().double().norm()
            if not float(difference) <= PROBED_ERROR * float(expected.nan_to_num().double().norm()):
                return False
    return True


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return ``relu(conv2d(x, weight) + bias + residual)``; arguments as in ``torch.conv2d``, on CUDA."""
    options = (stride, padding, dilation, groups)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *options)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *options)
