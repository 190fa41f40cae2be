"""``torch.ops.lhc.quantise``: activations in int8, one step for a whole tensor, symmetric around zero.

The implementation here serves every device that has no more specific one; loading the native kernel brings
one for the CPU, which reads and writes each value once.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
"""The integers are symmetric: -128 is left out, so that a value and its negative are equally near."""

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


def step_of(largest: Tensor) -> Tensor:
    """Return the step with which values up to ``largest`` (absolute) fill the integers; 1 where it is 0."""
    return torch.where(largest > 0, largest.float() / LARGEST, 1.0)
