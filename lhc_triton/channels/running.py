"""Runs a network and another that should compute the same, and compares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.conversion import evaluating
from lhc_triton.errors import one_line

_ROUNDINGS = 1e3  # of the type, relative to the output's norm: networks are deep
_MOST = 0.1  # where a type is that coarse


def check_same(model: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Run both in eval mode on the example, and on other values of its size, and compare every output.

    Raises:
        ValueError: one of them does not run, or the outputs differ by more than rounding.
    """
    for number, values in enumerate((inputs, tuple(map(_others, inputs)))):
        expected, found = list(_outputs(model, values)), list(_outputs(other, values))
        if len(expected) != len(found) or not all(map(_close, found, expected)):
            what = "the example" if number == 0 else "other values than the example"
            raise ValueError(
                f"{type(model).__name__} would compute something else on {what}: its code may ask for the"
                " numbers of channels, or keep state outside of itself"
            )


def _others(value: Tensor) -> Tensor:
    return value.flip(tuple(range(value.dim()))) if value.is_floating_point() else value


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    try:
        with evaluating(model):
            yield from _tensors(model(*[value.clone() for value in inputs]))
    except Exception as error:  # the model's own code: anything may come out of it
        raise ValueError(f"{type(model).__name__} does not run: {one_line(error)}") from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return bool((found == expected).all())
    allowed = min(_ROUNDINGS * torch.finfo(expected.dtype).eps, _MOST)
    return bool((found.double() - expected.double()).norm() <= allowed * expected.double().norm())
