"""How the arguments of a call find their places in a traced network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

_CONSTANTS = (bool, int, float, str, type(None))
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Settled:
    """Parameters of a model's forward that a trace fixes at their defaults: the example left them out.

    Attributes:
        defaults: of those, by name.
        order: names of all parameters that can be given by position.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()


def settled(model: nn.Module, arity: int) -> Settled:
    """Return what a trace for ``arity`` inputs fixes: defaults that are constants."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return Settled()
    defaults = {p.name: p.default for p in parameters[arity:] if isinstance(p.default, _CONSTANTS)}
    return Settled(defaults, tuple(p.name for p in parameters if p.kind in _BY_POSITION))


class Parameters:
    """What a traced network takes.

    Args:
        model: the model's name, for messages.
        network: the network.
        given: number of inputs that the example had: the first ones, all of them tensors.
        fixed: what the trace has settled.
    """

    def __init__(self, model: str, network: fx.GraphModule, given: int, fixed: Settled) -> None:
        inputs = [node for node in network.graph.nodes if node.op == "placeholder"]
        self._model = model
        self._names = tuple(str(node.target) for node in inputs)
        self._defaults = {str(node.target): node.args[0] for node in inputs if node.args}
        self._given = given
        self._fixed = fixed
        self._any = any(name.startswith("*") for name in self._names)  # *args, **kwargs

    def bind(
        self, inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments as the network takes them.

        Raises:
            TypeError: one is missing, given twice, or none of those that the network was made for.
        """
        if self._any or (
            not named and len(inputs) == self._given and all(isinstance(value, Tensor) for value in inputs)
        ):
            return inputs, dict(named)
        order = self._fixed.order or self._names
        odd = [f"argument {len(order) + 1}"] if len(inputs) > len(order) else []
        twice = [name for name in order[: len(inputs)] if name in named]
        places = {name: f"argument {place}" for place, name in enumerate(order[: len(inputs)], start=1)}
        found = {**dict(zip(order, inputs, strict=False)), **named}
        for name in [name for name in found if name not in self._names]:
            if not self._is_default(name, found.pop(name)):
                odd.append(places.get(name, repr(name)))
        if odd:
            raise TypeError(
                f"{self._model} was accelerated for the arguments {', '.join(self._names)}, with defaults "
                f"for all others; {odd[0]} is none of them: give it in example_input, and accelerate again"
            )
        missing = [name for name in self._names if name not in {**self._defaults, **found}]
        if twice or missing:
            what = f"{twice[0]!r} is given twice" if twice else f"{missing[0]!r} is missing"
            raise TypeError(f"{self._model} takes the arguments {', '.join(self._names)}; {what}")
        values = {**self._defaults, **found}
        for name in self._names[: self._given]:
            # numbers compute as tensors do; of anything else forward may make something else
            if not isinstance(values[name], Tensor | bool | int | float | complex):
                kind = type(values[name]).__name__
                raise TypeError(
                    f"{self._model} was accelerated for a tensor as {name!r}, and this is a {kind}: give a "
                    "tensor, or accelerate again with the example_input of such calls"
                )
        return tuple(values[name] for name in self._names), {}

    def _is_default(self, name: str, value: Any) -> bool:
        """Return whether a value is the one that the trace has settled."""
        if name not in self._fixed.defaults:
            return False
        default = self._fixed.defaults[name]
        return value is default or (type(value) is type(default) and bool(value == default))
