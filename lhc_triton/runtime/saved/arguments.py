"""What the arguments of stored operations are: as JSON, by kind, and what an operation makes of them.

A stored graph comes from a file, so every argument is checked against its operation's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

MAX_NUMBER = 2**40
MAX_ITEMS = 64
MAX_BITS = 256  # of a whole number that a graph computes from sizes
_SIZE_BITS = 40


WORDS = frozenset(
    {
        "nearest", "nearest-exact", "bilinear", "bicubic", "area", "constant", "reflect", "replicate",
        "circular", "zeros", "none", "tanh", "floor", "trunc", "row", "batch",
    }
)  # fmt: skip
"""Modes that operations and modules are told by name."""


class GraphError(ValueError):
    """A graph cannot be stored, or a stored graph is not valid; the message is one line."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operation.

    Attributes:
        name: as in a keyword argument.
        kind: "tensor", "tensors" (a list), "value" (tensor or number), "int" (or the value of a node),
            "ints" (one or a list), "number", "numbers" (one or a list), "bool", "false" (nothing else),
            "word" (one of WORDS), "index" (of a getitem), "text" (a line for people), or
            "shape" (that word, or "ndim").
        optional: whether it may be left out.
        nullable: whether it may be None.
    """

    name: str
    kind: str
    optional: bool = False
    nullable: bool = False


@dataclass(frozen=True)
class Operation:
    """A function or a method: what it is called in a file, and its parameters; "*ints" takes the rest."""

    name: str
    target: Any
    parameters: tuple[Parameter, ...]
    rest: str | None = None


def read_operation(name: str, target: Any, signature: str) -> Operation:
    """Read a signature such as "input:tensor dim:ints?~ *:int": ? may be left out, ~ may be None."""
    parameters = []
    rest = None
    for word in signature.split():
        label, _, kind = word.partition(":")
        if label == "*":
            rest = kind
            continue
        parameters.append(Parameter(label, kind.rstrip("?~"), "?" in kind, "~" in kind))
    return Operation(name, target, tuple(parameters), rest)


def encode(value: Any) -> Any:
    """Turn a node's argument into plain JSON data: nodes by name, tuples, sizes, slices and dicts marked.

    Types count: what is read back has to be what the network returned.
    """
    kind = type(value)
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        if not math.isfinite(value):
            raise GraphError(f"the argument {value} is not finite")
        return value
    if kind is tuple or kind is torch.Size:
        return {"tuple" if kind is tuple else "sizes": [encode(item) for item in value]}
    if kind in (list, immutable_list):
        return [encode(item) for item in value]
    if kind is slice:
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if kind in (dict, immutable_dict) and all(type(key) is str for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    raise GraphError(f"an argument of type {kind.__name__} cannot be stored")


def decode(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """Turn ``encode``'s data back into an argument; GraphError where it is none or names an unknown node."""
    if depth > 8:
        raise GraphError("an argument is nested too deep")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        if not abs(value) <= MAX_NUMBER:  # NaN neither
            raise GraphError(f"a number is out of bounds, which are {-MAX_NUMBER} and {MAX_NUMBER}")
        return value
    if isinstance(value, list):
        return [decode(item, nodes, depth + 1) for item in _bounded(value)]
    if not isinstance(value, dict) or len(value) != 1:
        raise GraphError("an argument is neither a number, a list nor a marked value")
    ((mark, content),) = value.items()
    if mark == "node":
        if not isinstance(content, str) or content not in nodes:
            raise GraphError(f"an argument names the node {str(content)[:40]!r}, which does not come before")
        return nodes[content]
    if mark == "tuple" and isinstance(content, list):
        return tuple(decode(item, nodes, depth + 1) for item in _bounded(content))
    if mark == "sizes" and isinstance(content, list) and all(_is_int(item) for item in _bounded(content)):
        return torch.Size(decode(content, nodes, depth + 1))
    if mark == "slice" and isinstance(content, list) and len(content) == 3:
        return slice(*(decode(item, nodes, depth + 1) for item in content))
    if mark == "dict" and isinstance(content, dict):
        return {key: decode(item, nodes, depth + 1) for key, item in content.items()}
    raise GraphError(f"an argument is marked {str(mark)[:40]!r}, which is unknown")


def _bounded(items: list[Any]) -> list[Any]:
    if len(items) > 4096:
        raise GraphError(f"a list of {len(items)} arguments is too long")
    return items


def check_arguments(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise GraphError unless the arguments fit the operation's parameters in number, name and kind."""
    known = {parameter.name: parameter for parameter in operation.parameters}
    given: dict[str, Any] = {}
    for index, value in enumerate(args):
        if index < len(operation.parameters):
            given[operation.parameters[index].name] = value
        elif operation.rest is None or not _is_kind(value, "ints"):
            raise GraphError(f"{operation.name}: argument {index} is not allowed")
    for name, value in kwargs.items():
        if name not in known or name in given:
            raise GraphError(f"{operation.name}: the keyword {str(name)[:40]!r} is not allowed")
        given[name] = value
    for parameter in operation.parameters:
        if parameter.name not in given:
            if not parameter.optional:
                raise GraphError(f"{operation.name}: the argument {parameter.name!r} is missing")
            continue
        value = given[parameter.name]
        if not (value is None and parameter.nullable) and not _is_kind(value, parameter.kind):
            raise GraphError(f"{operation.name}: {parameter.name}={str(value)[:40]!r} is no {parameter.kind}")


Result = str | int
"""What a node gives: "tensor", "tensors" (several), "sizes", or of a number the bits that it may have."""

_ARITHMETIC = frozenset(
    {"eq", "add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "floordiv"}
)


def result_of(
    operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], results: Mapping[fx.Node, Result]
) -> Result:
    """Return what an operation gives, from what its arguments are.

    Raises:
        GraphError: it repeats a list or a shape, or a number of its kind could grow at every step: a graph of
            60 squarings would compute for ever.
    """
    name = operation.name
    if name == "shape" and args[-1] == "ndim":
        return _SIZE_BITS
    if name == "shape" or (name == "size" and len(args) + len(kwargs) == 1):
        return "sizes"
    if name in ("size", "dim"):
        return _SIZE_BITS
    if name in ("pow", "neg") and results.get(args[0], "tensor") != "tensor":
        raise GraphError(f"{name}: its operand is a number or a shape, with which a file may not calculate")
    if name in ("chunk", "split", "torch.chunk", "torch.split") or (
        name == "max_pool2d" and (len(args) == 7 or "return_indices" in kwargs)
    ):
        return "tensors"
    if name == "getitem":
        base = results.get(args[0], "tensor") if args else "tensor"
        if base in ("sizes", "tensors") and not isinstance(args[-1], slice):
            return _SIZE_BITS if base == "sizes" else "tensor"
        return base
    if name not in _ARITHMETIC:
        return "tensor"
    operands = [_operand(value, results) for value in (*args, *kwargs.values())]
    if "tensor" in operands:
        return "tensor"
    bits = [operand for operand in operands if isinstance(operand, int)]
    if len(bits) < len(operands):
        raise GraphError(f"{name}: an operand is a shape or a list, with which a file may not calculate")
    grown = sum(bits) if name in ("mul", "imul") else max(bits) + 1
    if grown > MAX_BITS:
        raise GraphError(f"{name}: its result may have {grown} bits, more than {MAX_BITS}")
    return grown


def _operand(value: Any, results: Mapping[fx.Node, Result]) -> Result:
    if isinstance(value, fx.Node):
        return results.get(value, "tensor")
    return value.bit_length() if isinstance(value, int) else 64


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    if isinstance(value, slice):
        return all(part is None or _is_kind(part, "int") for part in (value.start, value.stop, value.step))
    return value is None or value is Ellipsis or _is_kind(value, "int")


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "tensor": lambda v: isinstance(v, fx.Node),
    "tensors": lambda v: isinstance(v, list | tuple) and all(isinstance(item, fx.Node) for item in v),
    "value": lambda v: isinstance(v, fx.Node) or _is_int(v) or isinstance(v, float),
    "int": lambda v: _is_int(v) or isinstance(v, fx.Node),
    "number": lambda v: _is_int(v) or isinstance(v, float),
    "numbers": lambda v: (
        all(_is_kind(item, "number") for item in v)
        if isinstance(v, list | tuple) and len(v) <= MAX_ITEMS
        else _is_kind(v, "number")
    ),
    "word": lambda v: isinstance(v, str) and v in WORDS,
    "bool": lambda v: isinstance(v, bool),
    "false": lambda v: v is False,
    "shape": lambda v: v in ("shape", "ndim"),
    "text": lambda v: isinstance(v, str) and len(v) <= 200 and v.isprintable(),
    "index": lambda v: all(map(_is_index, v)) if isinstance(v, tuple) else _is_index(v),
    "ints": lambda v: (
        all(item is None or _is_kind(item, "int") for item in v)
        if isinstance(v, list | tuple) and len(v) <= MAX_ITEMS
        else _is_kind(v, "int")
    ),
}


def _is_kind(value: Any, kind: str) -> bool:
    return _KINDS[kind](value)
