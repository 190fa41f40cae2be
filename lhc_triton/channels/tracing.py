"""Traces a copy of a network for its channels, convolutions as leaves."""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

from torch import Tensor, fx, nn

from lhc_triton.errors import first_line, one_line

from .reading import ChannelError, ChannelGraph, read_channels


class _Value(fx.Proxy):
    """A traced value that records ``y += x`` as the write that it is, which other names of ``y`` see."""


def _augmented(function: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Value, f"__{_function.__name__}__", _augmented(_function))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


def checked_inputs(example_input: Any) -> tuple[Tensor, ...]:
    """Return an example as a tuple of tensors; TypeError if it is neither a tensor nor a tuple of them."""
    inputs = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"example_input is a {type(example_input).__name__}: give a tensor, or the tuple of the inputs"
        )
    return inputs


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network; what torch.nn.utils.prune has computed is copied as values.

    Raises:
        ChannelError: it cannot be copied.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    memo = {id(v): v.detach().clone() for v in values if isinstance(v, Tensor) and not v.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # a model may hold anything, and any of it may refuse
        raise ChannelError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error


def channels_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> ChannelGraph:
    """Trace a network in eval mode and return its channels; it is copied, and left as it was.

    Args:
        model: the network.
        inputs: the example, run once.

    Raises:
        ChannelError: it cannot be copied, torch.fx cannot trace it (its control flow depends on data, for
            example), it does not run, or it has a module with parameters that it does not call in eval mode.
    """
    twin = copied(model)
    twin.eval()  # its result is not used: a model's own eval may return nothing
    try:
        graph = _Tracer().trace(twin, concrete_args=_defaults(twin, len(inputs)) or None)
        traced = fx.GraphModule(twin, graph)
    except Exception as error:  # tracing runs foreign code: anything may come out of it
        raise ChannelError(f"torch.fx cannot trace {type(model).__name__} ({one_line(error)})") from error
    called = {id(module) for module in traced.modules()}
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for name, module in twin.named_modules():
        if name and module._parameters and id(module) not in called and name not in read:
            raise ChannelError(
                f"module {name!r} is not called in eval mode, so that nobody knows what it reads: remove it"
                " first"
            )
    return read_channels(traced, inputs)


def _defaults(model: nn.Module, arity: int) -> dict[str, Any]:
    """Return the defaults of forward's parameters beyond the inputs, which control flow may ask for."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return {}
    return {p.name: p.default for p in parameters[arity:] if p.default is not p.empty}
