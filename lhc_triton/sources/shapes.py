"""The example input of a command line: "1x3x224x224", or one such for each argument, with commas between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_VALUES = 1 << 28  # of an example, 1 GiB of float32


def parse_input(text: str) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that a text such as "1x3x224x224" or "2x3x8x8,2x5" stands for.

    Raises:
        ValueError: a shape is no list of positive sizes with "x" between, or has too many values.
    """
    shapes = []
    for part in text.split(","):
        sizes = part.strip().lower().split("x")
        if not all(size.isdecimal() and 0 < len(size) < 10 and int(size) > 0 for size in sizes):
            raise ValueError(f"input {text!r} is no shape; give one such as 1x3x224x224 (N, C, H, W)")
        shapes.append(tuple(map(int, sizes)))
        if math.prod(shapes[-1]) > MAX_VALUES:
            raise ValueError(f"input {text!r} has more than {MAX_VALUES} values; give a smaller one")
    return tuple(shapes)


def random_inputs(
    shapes: tuple[tuple[int, ...], ...], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Return normal random tensors of these shapes, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
