"""Whether tensors hold NaN or infinity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity.

    Either would be left in the sum, which takes a fifteenth of the time of a look at every value; only where
    the sum is not finite, which an overflow can do as well, every value is looked at.
    """
    return math.isfinite(abs(tensor.detach().sum().item())) or bool(torch.isfinite(tensor).all())


def has_nan(tensor: Tensor) -> bool:
    """Return whether a tensor has NaN; see `all_finite`."""
    return not math.isfinite(abs(tensor.detach().sum().item())) and bool(torch.isnan(tensor).any())
