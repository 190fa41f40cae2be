"""Turns a network into a ``torch.fx`` graph, and learns its shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lhc_triton.runtime.errors import one_line

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]


class TraceError(RuntimeError):
    """``torch.fx`` could not turn the network into a graph; the message is one line."""


class _ConvTracer(fx.Tracer):
    """Traces into everything except torch's own modules and convolutions."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, arity: int | None = None) -> fx.GraphModule:
    """Trace a network in eval mode, convolutions as leaves.

    Args:
        model: the network.
        arity: number of inputs; parameters of ``forward`` beyond them are fixed at their defaults, so that
            control flow may depend on them. None leaves all of them open.

    Raises:
        TraceError: ``torch.fx`` cannot trace it, for example because its control flow depends on data.
    """
    tracer = _ConvTracer()
    try:
        fixed = {} if arity is None else _defaults(model, arity)
        graph = tracer.trace(model, concrete_args=fixed or None)
        if fixed:
            _drop_inputs(graph, arity or 0)
        return fx.GraphModule(model, graph, type(model).__name__)
    except Exception as error:  # tracing runs foreign code: anything may come out of it
        raise TraceError(one_line(error)) from error


def _defaults(model: nn.Module, arity: int) -> dict[str, Any]:
    """Return the defaults of forward's parameters beyond the first ``arity``, where they are constants."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return {}
    constants = (bool, int, float, str, type(None))
    return {p.name: p.default for p in parameters[arity:] if isinstance(p.default, constants)}


def _drop_inputs(graph: fx.Graph, arity: int) -> None:
    """Remove the inputs beyond the first ``arity``, which are fixed, and torch.fx's checks of them."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    doomed = dict.fromkeys(placeholders[arity:])
    for node in graph.nodes:
        if any(source in doomed for source in node.all_input_nodes):
            doomed[node] = None
    for node in reversed(doomed):
        graph.erase_node(node)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps shape and dtype of every tensor it makes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.seen: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.seen[n.name] = (value.shape, value.dtype)
        return value


def record_shapes(traced: fx.GraphModule, example: Sequence[torch.Tensor]) -> tuple[Shapes, Any]:
    """Run a traced network once; return shape and dtype of each node's tensor by name, and the output.

    Raises:
        TraceError: it does not run, for the trace fixed something that varies.
    """
    recorder = _ShapeRecorder(traced)
    try:
        with torch.no_grad():
            output = recorder.run(*[value.clone() for value in example])
    except Exception as error:  # the model's own code, once more
        raise TraceError(f"the traced network does not run: {one_line(error)}") from error
    return recorder.seen, output
