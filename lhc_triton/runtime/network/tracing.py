"""Turns a network into a ``torch.fx`` graph, and learns its shapes."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.errors import one_line
from lhc_triton.layers import convolves_plainly
from lhc_triton.runtime.network.aliasing import Aliases
from lhc_triton.runtime.network.calling import settled
from lhc_triton.runtime.network.outputs import is_strided
from lhc_triton.runtime.network.snapshots import Snapshot
from lhc_triton.runtime.op.epilogue import format_of, is_channels_last

_CONSTANT = "_tensor_constant"  # how torch.fx names what forward makes without looking at its inputs


@dataclass(frozen=True)
class Seen:
    """What a node's tensor was in one run: its shape, type and memory format (see ``epilogue.format_of``)."""

    shape: torch.Size
    dtype: torch.dtype
    format: str


Shapes = Mapping[str, Seen]


class TraceError(RuntimeError):
    """``torch.fx`` could not turn the network into a graph; the message is one line."""


class _Value(fx.Proxy):
    """A traced value that records augmented assignments as what they are: writes in place.

    fx.Proxy itself records ``y += x`` as ``y = y + x``, which other names of ``y`` would not see.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:  # which list() asks for
        count = _pieces(self.node)
        if count is None:
            raise TraceError("the length of a value is not known while it is traced")
        return count


def _augmented(function: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _function in (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor,
):  # fmt: skip
    setattr(_Value, f"__{_function.__name__}__", _augmented(_function))


class _ConvTracer(fx.Tracer):
    """Traces into everything except torch's own modules, scripted ones, and convolutions."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | torch.jit.ScriptModule) or super().is_leaf_module(
            m, module_qualified_name
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        count = _pieces(obj.node)
        if count is None:
            return super().iter(obj)
        return iter([obj[place] for place in range(count)])  # type: ignore[index]


def _pieces(node: fx.Node) -> int | None:
    """Return into how many pieces a node splits a tensor, where that stands in the code.

    Of ``chunk`` only along the channels: where a length varies, there may be fewer than are asked for.
    """
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    given = [*node.args[1:], *node.kwargs.values()]
    if name == "chunk":
        return given[0] if len(given) == 2 and isinstance(given[0], int) and given[1] == 1 else None
    if name in ("split", "tensor_split") and given and isinstance(given[0], tuple | list):
        return len(given[0]) + (name == "tensor_split")
    return None


def trace(model: nn.Module, arity: int | None = None) -> fx.GraphModule:
    """Trace a network in eval mode, convolutions as leaves; what tracing does to the model is undone.

    Args:
        model: the network.
        arity: number of inputs; parameters of ``forward`` beyond them are fixed at their defaults, so that
            control flow may depend on them. None leaves all of them open.

    Raises:
        TraceError: ``torch.fx`` cannot trace it, for example because its control flow depends on data, or
            the graph would write to tensors that belong to one call only.
    """
    tracer = _ConvTracer()
    try:
        fixed = {} if arity is None else dict(settled(model, arity).defaults)
        before = Snapshot(model)
        try:
            with _called_by_forward(model), _asked_for_modes() as asked:
                graph = tracer.trace(model, concrete_args=fixed or None)
            _drop_inputs(graph, _places(model, fixed))
            traced = fx.GraphModule(model, graph, type(model).__name__)
            for name in [name for name in vars(model) if name.startswith(_CONSTANT)]:
                delattr(model, name)
            if before.changed():
                raise TraceError(
                    "forward changes state (attributes, globals); the graph would do so only once"
                )
            if asked:
                raise TraceError(f"forward asks for {asked[0]}; the graph would keep the answer")
        finally:
            before.restore()
    except TraceError:
        raise
    except Exception as error:  # tracing runs foreign code: anything may come out of it
        raise TraceError(one_line(error)) from error
    _refuse_written_constants(traced)
    return traced


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)  # looked up now: while it traces, torch.fx has a __call__ of its own


@contextmanager
def _asked_for_modes() -> Iterator[list[str]]:
    """Note what code outside torch asks about the mode that it runs in."""
    names = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
    asked: list[str] = []

    def noting(name: str, original: Any) -> Any:
        def ask(*device: str) -> bool:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] not in ("torch", __name__.partition(".")[0]):
                asked.append(f"torch.{name}()")
            return bool(original(*device))

        return ask

    originals = {name: getattr(torch, name) for name in names}
    for name, original in originals.items():
        setattr(torch, name, noting(name, original))
    try:
        yield asked
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextmanager
def _called_by_forward(model: nn.Module) -> Iterator[None]:
    """Let ``layer.forward(x)`` count as ``layer(x)``, which is what a tracer sees."""
    plain = [
        module for module in model.modules() if isinstance(module, nn.Conv2d) and convolves_plainly(module)
    ]
    for module in plain:
        vars(module)["forward"] = partial(_call, module)
    try:
        yield
    finally:
        for module in plain:
            vars(module).pop("forward", None)


def _refuse_written_constants(traced: fx.GraphModule) -> None:
    """Raise TraceError where a tensor that ``forward`` makes anew at each call would be written to.

    In the graph it is one constant: what a call writes there, the next one would find.
    """
    aliases = Aliases(traced)
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    shared = {
        "writes to": aliases.written_roots(),
        "returns": frozenset().union(*(aliases.roots[node] for node in output.all_input_nodes)),
    }
    for verb, nodes in shared.items():
        if any(node.op == "get_attr" and str(node.target).startswith(_CONSTANT) for node in nodes):
            raise TraceError(f"forward {verb} a tensor that it makes; the graph would keep it as a constant")


def _places(model: nn.Module, names: Collection[str]) -> list[int]:
    """Return which of forward's parameters have these names, by number."""
    parameters = inspect.signature(model.forward).parameters if names else ()
    return [place for place, name in enumerate(parameters) if name in names]


def _drop_inputs(graph: fx.Graph, places: Sequence[int]) -> None:
    """Remove the inputs that are fixed, given by their numbers, and torch.fx's checks of them."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    doomed = dict.fromkeys(placeholders[place] for place in places)
    for node in graph.nodes:
        if any(source in doomed for source in node.all_input_nodes):
            doomed[node] = None
    for node in reversed(doomed):
        graph.erase_node(node)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps what it sees of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.seen: dict[str, Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and is_strided(value):
            self.seen[n.name] = Seen(value.shape, value.dtype, format_of(value))
        return value


def record_shapes(traced: fx.GraphModule, example: Sequence[Tensor]) -> tuple[Shapes, Any]:
    """Run a traced network once; return what each node's tensor was by name, and the output.

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


def record_formats(
    traced: fx.GraphModule, shapes: Shapes, example: Sequence[Tensor], other: Sequence[Tensor]
) -> Mapping[str, str]:
    """Return the memory formats that the values of a model's own graph have.

    Args:
        traced: the graph.
        shapes: what ``record_shapes`` saw on the example.
        example: the inputs of that run.
        other: inputs of any size, for a run with all images in the first one's other format.

    Returns:
        By node: "contiguous" or "channels_last" where the value always is, "input" where it has the format of
        the first image as a convolution reads it, "image" for that image itself; nothing for values in other
        formats.
    """
    which = next((place for place, value in enumerate(example) if value.dim() == 4), None)
    if which is None:
        return {name: seen.format for name, seen in shapes.items() if seen.format != "other"}
    swap = torch.contiguous_format if is_channels_last(example[which]) else torch.channels_last
    inputs = [value.contiguous(memory_format=swap) if value.dim() == 4 else value for value in other]
    try:
        second, _ = record_shapes(traced, inputs)
    except TraceError:
        second = shapes  # a ``view`` that takes contiguous values only: so they always are
    both = {name: (seen.format, second.get(name, seen).format) for name, seen in shapes.items()}
    image = [node.name for node in traced.graph.nodes if node.op == "placeholder"][which]
    read = next(_read_by_convolutions(traced), image)
    if read in both and both[read] != both[image] and len(set(both[read])) == 2:
        image = read  # turned before: [N, H, W, C], for example
    follows = tuple("contiguous" if one == "other" else one for one in both[image])
    formats = {image: "image"}
    for name, (first, swapped) in both.items():
        if name != image and first == swapped != "other":
            formats[name] = first
        elif name != image and (first, swapped) == follows:
            formats[name] = "input"
    return formats


def _read_by_convolutions(traced: fx.GraphModule) -> Iterator[str]:
    """Yield the names of the values that convolutions read, in the graph's order."""
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), nn.Conv2d):
            yield from (source.name for source in node.all_input_nodes)
