"""``torch.ops.lhc.quantise``: activations in int8, one step for a whole tensor, symmetric around zero.

The implementation here serves every device that has no more specific one; loading the native kernel brings
one for the CPU, which reads and writes each value once.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
"""The integers are symmetric: -128 is left out, so that a value and its negative are equally near."""

SHARES = tuple(1 - k / 20 for k in range(16))

torch.library.define("lhc::quantise", "(Tensor x, Tensor step) -> Tensor")


def quantise(x: Tensor, step: Tensor) -> Tensor:
    """Return ``x / step`` as the nearest integers from -127 to 127, ties to even; NaN counts as 0.

    Args:
        x: [N, C, H, W], floating.
        step: what 1 stands for, one float32 above 0 on x's device.

    Returns:
        int8 [N, C, H, W], channels_last.
    """
    integers = (x.float() * step.reciprocal()).round_().clamp_(-LARGEST, LARGEST).nan_to_num_(0.0)
    return integers.to(torch.int8).contiguous(memory_format=torch.channels_last)


torch.library.impl("lhc::quantise", "default", quantise)


@torch.library.register_fake("lhc::quantise")
def _fake(x: Tensor, step: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)


def step_of(values: Tensor) -> Tensor:
    """Return the step with which each row of values loses least when it is rounded to int8.

    Few values are as large as the largest: a smaller step cuts those off and rounds all others less. The sum
    of squared errors decides between shares of the largest value, all of it down to a quarter (range setting
    by the squared error, M. Nagel et al., arXiv 2106.08295).

    Args:
        values: [rows, n], floating; signs do not matter.

    Returns:
        float32 [rows]; 1 where all values are 0.
    """
    values = values.float().abs()
    largest = values.amax(1)
    best, found = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for share in SHARES:
        step = largest * (share / LARGEST)
        integers = (values / step[:, None]).round_().clamp_(max=LARGEST)
        error = (integers * step[:, None] - values).square().sum(1)
        better = error < best  # never where all values are 0: that error is NaN
        best, found = torch.where(better, error, best), torch.where(better, step, found)
    return found
