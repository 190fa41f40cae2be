"""What a network returns, taken apart, and how the outputs of two networks differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lhc_triton.runtime.op.accuracy import error_of

# Within one tensor a channel may be much smaller than the others (scores beside boxes in pixels): each is
# held to this many times the tolerance of the whole, down to so small a share of the tensor's own scale.


@dataclass(frozen=True)
class Leaf:
    """One value of an output: as it was when the network returned it, and the tensor itself."""

    value: Any
    live: Tensor | None = None
    strides: tuple[int, ...] = ()

    @property
    def overwritten(self) -> bool:
        """Whether the tensor has been changed since."""
        return self.live is not None and not same_values(self.live, self.value)


@dataclass(frozen=True)
class Outcome:
    """What one call returned and did.

    Attributes:
        leaves: the values in the output by place, for example "['boxes'][0]"; containers stand among them as
            their types.
        inputs: values of the arguments that the call wrote to, by number.
        overwritten: places of the outputs that later calls changed; known once it is `closed`.
        random: whether it drew from one of the common random generators.
    """

    leaves: Mapping[str, Leaf]
    inputs: Mapping[int, Tensor] = field(default_factory=dict)
    overwritten: frozenset[str] = frozenset()
    random: bool = False

    def closed(self) -> Outcome:
        """Return the outcome after all later calls, without its hold on the tensors themselves."""
        overwritten = frozenset(place for place, leaf in self.leaves.items() if leaf.overwritten)
        leaves = {place: dataclasses.replace(leaf, live=None) for place, leaf in self.leaves.items()}
        return dataclasses.replace(self, leaves=leaves, overwritten=overwritten)


@dataclass(frozen=True)
class Difference:
    """One way in which two outcomes differ.

    Attributes:
        what: one phrase that names the output, for people.
        values: whether nothing but values differ.
        flipped: places of integers or booleans that differ; None for any other difference.
        place: of the output.
    """

    what: str
    values: bool = False
    flipped: int | None = None
    place: str = ""


def outcome(output: Any, given: Sequence[Tensor] = (), after: Sequence[Tensor] = ()) -> Outcome:
    """Take an output apart; ``given`` and ``after`` are the arguments before and after the call."""
    leaves = dict(_leaves(output))
    written = {
        i: b.clone() for i, (a, b) in enumerate(zip(given, after, strict=True)) if not same_values(a, b)
    }
    return Outcome(leaves, written)


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, Tensor) and not is_strided(value):
        yield f"{place} (its layout)", Leaf(f"{value.dtype} {value.layout}")
        for number, part in enumerate(_parts(value)):
            yield from _leaves(part, f"{place}[{number}]")
        return
    if isinstance(value, Tensor):
        live = value.detach()
        yield place, Leaf(live.clone(), live, tuple(live.stride()))
        return
    items: list[tuple[str, Any]] | None = None
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [(f".{name}", getattr(value, name)) for name in value._fields]
    elif isinstance(value, list | tuple):
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f".{one.name}", getattr(value, one.name)) for one in dataclasses.fields(value)]
    if items is None:
        yield place, Leaf(value)
        return
    yield f"{place} (its type)", Leaf(type(value))
    for name, item in items:
        yield from _leaves(item, place + name)


def differences(mine: Outcome, theirs: Outcome, tolerance: float) -> list[Difference]:
    """Return how an outcome differs from the model's; nothing if it does not.

    Floating-point and complex tensors may differ by a norm error up to ``tolerance``, each by itself and, ten
    times as much, in each of its channels; NaN and infinities count as equal where both sides have the same.
    Everything else must be equal, the outputs' types and their strides included.
    """
    if list(mine.leaves) != list(theirs.leaves):
        odd = sorted(set(mine.leaves) ^ set(theirs.leaves)) or ["(their order)"]
        return [Difference(f"the output has another structure at {odd[0]!r}")]
    found: list[Difference] = []
    for place, leaf in theirs.leaves.items():
        name = f"output {place}" if place else "the output"
        found += _leaf_differences(name, mine.leaves[place], leaf, tolerance, place)
        if place in mine.overwritten and place not in theirs.overwritten:
            found.append(Difference(f"{name} is overwritten by later calls"))
    for number in sorted(set(mine.inputs) | set(theirs.inputs)):
        one, other = mine.inputs.get(number), theirs.inputs.get(number)
        if one is None or other is None or error_of(one, other) > tolerance:
            found.append(Difference(f"argument {number} is left with other values"))
    return found


def _leaf_differences(
    name: str, mine: Leaf, theirs: Leaf, tolerance: float, place: str
) -> Iterator[Difference] | list[Difference]:
    left, right = mine.value, theirs.value
    if not isinstance(right, Tensor):
        if isinstance(right, float) and isinstance(left, float):
            close = math.isclose(left, right, rel_tol=tolerance) or (left != left and right != right)
            return [] if close else [Difference(f"{name} is {left!r} instead of {right!r}")]
        same = type(left) is type(right) and (_plain(right) is False or left == right)
        return [] if same else [Difference(f"{name} is {str(left)[:60]} instead of {str(right)[:60]}")]
    if not isinstance(left, Tensor):
        return [Difference(f"{name} is a {type(left).__name__} instead of a tensor")]
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        mine_is, theirs_is = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (left, right))
        return [Difference(f"{name} is {mine_is} instead of {theirs_is}")]
    if not _same_strides(right.shape, mine.strides, theirs.strides):
        return [Difference(f"{name} has strides {mine.strides} instead of {theirs.strides}")]
    if right.is_floating_point() or right.is_complex():
        error = error_of(left, right)
        return [] if error <= tolerance else [Difference(f"{name} differs by {error:.1e}", True)]
    flipped = int((left != right).sum())
    return [Difference(f"{name} differs at {flipped} places", True, flipped, place)] if flipped else []


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | type | torch.dtype)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, type and values, NaN where the other has NaN."""
    if (a.shape, a.dtype, a.layout, a.is_meta) != (b.shape, b.dtype, b.layout, b.is_meta):
        return False
    if a.is_meta:  # it has none
        return True
    if not (is_strided(a) and is_strided(b)):
        both = list(zip(_parts(a), _parts(b), strict=False))
        return a.layout == b.layout and all(same_values(one, other) for one, other in both)
    if torch.equal(a, b):
        return True
    floats = a.is_floating_point() or a.is_complex()
    return floats and bool(((a == b) | (a.isnan() & b.isnan())).all())


def is_strided(tensor: Tensor) -> bool:
    """Return whether a tensor is plain numbers in memory."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return what a tensor in any other form (nested, quantised, sparse, of oneDNN) stands for."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]


def _same_strides(shape: Sequence[int], mine: Sequence[int], theirs: Sequence[int]) -> bool:
    """Compare strides where they matter: an axis of size 1 may have any."""
    return all(a == b for size, a, b in zip(shape, mine, theirs, strict=True) if size > 1)


def worst_error(mine: Outcome, theirs: Outcome) -> float:
    """Return the worst ``error_of`` a floating-point or complex tensor in two outputs of one structure."""
    errors = [0.0]
    for place, leaf in theirs.leaves.items():
        other = mine.leaves[place].value if place in mine.leaves else None
        if isinstance(leaf.value, Tensor) and (leaf.value.is_floating_point() or leaf.value.is_complex()):
            if isinstance(other, Tensor) and other.shape == leaf.value.shape:
                errors.append(error_of(other, leaf.value))
            else:
                errors.append(math.inf)
    return max(errors)
