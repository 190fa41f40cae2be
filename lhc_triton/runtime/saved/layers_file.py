"""Networks whose graph no file can hold: all their tensors, to be put into the model they were made of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.errors import first_line
from lhc_triton.files import printable
from lhc_triton.runtime.network.copying import carry_hooks, working_copy
from lhc_triton.runtime.network.fusion import swapped
from lhc_triton.runtime.network.record import Record
from lhc_triton.runtime.network.sites import find_sites, rewrite
from lhc_triton.runtime.network.tracing import Shapes, TraceError, record_shapes, trace
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.saved.arguments import GraphError
from lhc_triton.runtime.saved.record_file import DTYPES

MAX_OUTLINE = 100_000  # lines
MAX_LINE = 500
MAX_EXAMPLE = 2**22  # values of the inputs that the model is run on where their sizes do not suffice
_FORMATS = {"contiguous", "channels_last", "input", "image"}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a network by name, but for those that its fused layers pack from others.

    Beside parameters and buffers, persistent or not, these are the tensors that modules keep as plain
    attributes: a fresh instance of the model's class would have its own.
    """
    fused = {
        f"{name}.{key}": tensor
        for name, module in network.named_modules()
        if isinstance(module, FusedConv2d)
        for key, tensor in module.state_dict().items()
    }
    return {**{name: tensor for name, _, _, tensor in _others(network)}, **fused}


def _others(network: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Yield (name, where it is kept, under which key, tensor) of the tensors outside fused layers."""
    for prefix, module in network.named_modules():
        if isinstance(module, FusedConv2d):
            continue
        for kept in (module._parameters, module._buffers, vars(module)):
            for key, tensor in kept.items():
                if isinstance(tensor, Tensor):
                    yield f"{prefix}.{key}" if prefix else key, kept, key, tensor


def outline(network: nn.Module) -> list[str]:
    """Describe what a network computes beside its fused layers, a line for each module, hook and step.

    Numbers that forward takes from elsewhere (a slope, a factor) are in it, so that a model with others is
    known to be another one.
    """
    lines = []
    for name, module in network.named_modules():
        if name and not isinstance(module, FusedConv2d):
            lines.append(f"{name}: {type(module).__name__}({module.extra_repr()})")
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        lines += [f"{name}: hook {getattr(hook, '__qualname__', type(hook).__name__)}" for hook in hooks]
    if isinstance(network, fx.GraphModule):
        lines += [
            f"{node.name} = {_target(node)} {node.args} {dict(node.kwargs)}"
            for node in network.graph.nodes
            if node.op != "placeholder"
        ]
    return [printable(_ADDRESS.sub("", line), MAX_LINE) for line in lines]


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else torch.typename(node.target)


def formats_of(network: nn.Module) -> dict[str, str]:
    """Return the memory formats of the model's values that its graph was rewritten by, see ``rewrite``."""
    return dict(getattr(network, "meta", {}).get("formats", {}))


def check_formats(data: Any) -> dict[str, str]:
    """Return formats that a file holds; GraphError if they are none."""
    valid = isinstance(data, dict) and len(data) <= MAX_OUTLINE
    if not valid or not all(isinstance(value, str) and value in _FORMATS for value in data.values()):
        raise GraphError("the formats of its model's values are not valid")
    return data


def check_outline(data: Any) -> list[str]:
    """Return an outline that a file holds; GraphError if it is none."""
    if not isinstance(data, list) or len(data) > MAX_OUTLINE:
        raise GraphError("the outline of its model is not valid")
    if not all(isinstance(line, str) and len(line) <= 4 * MAX_LINE for line in data):
        raise GraphError("the outline of its model is not valid")
    return data


def into_model(
    model: nn.Module,
    record: Record,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    lines: list[str],
    formats: Mapping[str, str],
) -> nn.Module:
    """Put stored layers and tensors into a copy of the model they were made from.

    Args:
        model: of the same class and settings; its own weights do not matter.
        record: how the network was made.
        modules: the fused layers, with their tensors.
        tensors: all others.
        lines: the outline of the network.
        formats: of the model's values, where it was traced.

    Raises:
        GraphError: the model is another one: the message names the first layer, tensor or step that differs.
    """
    if not isinstance(model, nn.Module):
        raise GraphError(f"model= is a {type(model).__name__}, expected the torch.nn.Module it was made of")
    try:
        work = working_copy(model)
    except ValueError as error:
        raise GraphError(f"model= {first_line(error)}") from error
    _check_sites(work, record, modules)
    network = _traced(work, record, modules, formats) if record.traced else swapped(work, modules)
    for mine, theirs in zip(outline(network), lines, strict=False):
        if mine != theirs:
            raise GraphError(f"model= is another model: it has {mine[:120]!r}, the file {theirs[:120]!r}")
    _fill(network, tensors)
    if outline(network) != lines:
        raise GraphError("model= is another model: it has other modules or steps than the file")
    return network


def _check_sites(work: nn.Module, record: Record, modules: Mapping[str, nn.Module]) -> None:
    named = dict(work.named_modules())
    for site in record.sites:
        conv, fused = named.get(site.layer), modules.get(site.module)
        if not isinstance(fused, FusedConv2d):
            raise GraphError(f"layer {site.module[:80]!r} is in its record, but not in its modules")
        if not isinstance(conv, nn.Conv2d) or (
            (conv.in_channels, conv.out_channels, tuple(conv.kernel_size), tuple(conv.stride), conv.groups)
            != (fused.in_channels, fused.out_channels, fused.kernel_size, fused.stride, fused.groups)
        ):
            raise GraphError(
                f"model= is another model: layer {site.layer[:80]!r} is missing or has other sizes"
            )
    if {site.module for site in record.sites} != set(modules):
        raise GraphError("its record and its modules name different layers")


def _traced(
    work: nn.Module, record: Record, modules: Mapping[str, nn.Module], formats: Mapping[str, str]
) -> nn.Module:
    """Trace the model and put the layers in, without running it on the sizes that the file claims."""
    try:
        traced = trace(work, len(record.inputs))
        sites = find_sites(traced, _shapes(work, traced, record))
    except (TraceError, RuntimeError, ValueError) as error:
        raise GraphError(f"model= is another model: {printable(first_line(error), 200)}") from error
    if sites != record.sites:
        raise GraphError("model= is another model: its convolutions are followed by other operations")
    network = rewrite(traced, sites, modules, formats)
    carry_hooks(work, network)
    return network


def _shapes(work: nn.Module, traced: fx.GraphModule, record: Record) -> Shapes:
    from torch._subclasses.fake_tensor import FakeTensorMode

    home = next((tensor.device for tensor in work.parameters()), torch.device("cpu"))

    def shapes() -> Shapes:
        inputs = [torch.zeros(shape, dtype=DTYPES[name], device=home) for shape, name in record.inputs]
        return record_shapes(traced, inputs)[0]

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # sizes without memory and without work
            return shapes()
    except TraceError:  # an operation that needs values
        if sum(math.prod(shape) for shape, _ in record.inputs) > MAX_EXAMPLE:
            raise
        return shapes()


def _fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network outside its fused layers the tensors of a file, in the file's types."""
    places = {name: (kept, key, tensor) for name, kept, key, tensor in _others(network)}
    missing, unknown = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing or unknown:
        name = (missing or unknown)[0][:80]
        what = f"the file has no tensor {name!r}" if missing else f"it has no tensor {name!r}"
        raise GraphError(f"model= is another model: {what}")
    for name, (_, _, old) in places.items():
        if old.shape != tensors[name].shape or old.is_floating_point() != tensors[name].is_floating_point():
            raise GraphError(
                f"model= is another model: its tensor {name[:80]!r} is {old.dtype} {tuple(old.shape)}, the "
                f"file's {tensors[name].dtype} {tuple(tensors[name].shape)}"
            )
    made: dict[int, Tensor] = {}
    for name, (kept, key, old) in places.items():
        # One object under several names (tied weights) stays one; what is kept is another tensor, for a
        # model may be on another device or in another type.
        new = made.get(id(old))
        if new is None:
            new = tensors[name]
            new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            made[id(old)] = new
        kept[key] = new
