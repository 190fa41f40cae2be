"""How two outputs of any structure differ: in kind, in layout, or in value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from oracle import norm_error
from torch import Tensor

_FLIPS = 5e-4  # share of integers and booleans that rounding may flip


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        text: what differs, for people.
        amount: a norm error, a share of the values, or infinite for a difference in kind.
        place: of the leaf, see ``leaves``.
    """

    text: str
    amount: float = float("inf")
    place: str = ""


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of all leaves; the types of the containers are part of the place."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif dataclasses.is_dataclass(value):
        items = vars(value).items()
    elif isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        items = enumerate(value)
    else:
        yield place, value
        return
    items = list(items)
    yield f"{place}.{kind}", len(items)
    for key, item in items:
        yield from leaves(item, f"{place}.{kind}[{key!r}]")


def difference(
    mine: Any, theirs: Any, tolerance: float, *, values: bool = True, strides: bool = True
) -> Difference | None:
    """Return the first difference of two outputs, tensor by tensor; None if they are the same.

    Args:
        mine: what is tried.
        theirs: what it should be.
        tolerance: norm error up to which floating-point and complex tensors count as equal.
        values: whether the values count, or only types, shapes and strides.
        strides: whether the strides count.
    """
    left, right = dict(leaves(mine)), dict(leaves(theirs))
    if left.keys() != right.keys():
        return Difference(f"outputs {sorted(left)} instead of {sorted(right)}")
    for place, reference in right.items():
        found = leaf_difference(left[place], reference, tolerance, values=values, strides=strides)
        if found is not None:
            return Difference(f"output{place}: {found.text}", found.amount, place)
    return None


def leaf_difference(
    mine: Any, theirs: Any, tolerance: float, *, values: bool = True, strides: bool = True
) -> Difference | None:
    """Return how two leaves differ, see ``difference``."""
    if type(mine) is not type(theirs):
        return Difference(f"a {type(mine).__name__} instead of a {type(theirs).__name__}")
    if isinstance(theirs, float):
        mine, theirs = torch.tensor(mine), torch.tensor(theirs)
    if not isinstance(theirs, Tensor):
        return None if mine == theirs else Difference(f"{mine!r} instead of {theirs!r}")
    kinds: list[tuple[str, Any, Any]] = [
        ("dtype", mine.dtype, theirs.dtype),
        ("shape", tuple(mine.shape), tuple(theirs.shape)),
    ]
    if strides:
        kinds.append(("strides", _strides(mine), _strides(theirs)))
    for what, a, b in kinds:
        if a != b:
            return Difference(f"{what} {a} instead of {b}")
    if not values or not theirs.numel():
        return None
    if not (theirs.is_floating_point() or theirs.is_complex()):
        share = float((mine != theirs).double().mean())
        return Difference(f"{share:.2%} of {theirs.dtype} differ", share) if share > _FLIPS else None
    error = norm_error(mine.detach(), theirs.detach())
    return None if error <= tolerance else Difference(f"norm error {error:.1e}", error)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that matter: those of axes longer than 1, of tensors that are not empty."""
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return tuple(stride for stride, size in strides if size > 1) if tensor.numel() else ()
