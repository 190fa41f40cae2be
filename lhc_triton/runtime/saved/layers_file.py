"""Networks whose graph no file can hold: all their tensors, to be put into the model they were made of."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.errors import first_line
from lhc_triton.files import printable
from lhc_triton.runtime.network.copying import carry_hooks, drop_gradients, working_copy
from lhc_triton.runtime.network.fusion import swapped
from lhc_triton.runtime.network.record import Record
from lhc_triton.runtime.network.sites import find_sites, rewrite
from lhc_triton.runtime.network.tracing import Shapes, TraceError, record_shapes, trace
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.saved.arguments import GraphError
from lhc_triton.runtime.saved.keepsakes import kept_values, tensors_kept, written_by_calls
from lhc_triton.runtime.saved.record_file import DTYPES

MAX_OUTLINE = 100_000  # lines
MAX_LINE = 500
MAX_EXAMPLE = 2**22  # values of the inputs that the model is run on where their sizes do not suffice
_FORMATS = {"contiguous", "channels_last", "input", "image"}
_WRITTEN = ", which calls write to"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def written(network: nn.Module, record: Record) -> frozenset[str]:
    """Return what calls write to; see `written_by_calls`."""
    return written_by_calls(network, [(shape, DTYPES[name]) for shape, name in record.inputs])


def tensors_of(network: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return every tensor of a network by name, but for those that its fused layers pack from others.

    Beside parameters and buffers, persistent or not, these are the tensors that modules keep as attributes,
    in lists or in dicts: a fresh instance of the model's class would have its own. What calls put there (see
    `written`) is left out.
    """
    fused = {
        f"{name}.{key}": tensor
        for name, module in network.named_modules()
        if isinstance(module, FusedConv2d)
        for key, tensor in module.state_dict().items()
    }
    return {
        **{place.name: place.tensor for place in tensors_kept(network) if place.name not in without},
        **fused,
    }


def outline(network: nn.Module, without: Collection[str] = ()) -> list[str]:
    """Describe what a network computes beside its fused layers, a line for each module, step and attribute.

    Numbers that forward takes from elsewhere (a slope, a factor) are in it, and what modules keep, so that a
    model with others is known to be another one. Of what calls write to, ``without``, the name alone counts.
    """
    lines = []
    for name, module in network.named_modules():
        if name and not isinstance(module, FusedConv2d):
            lines.append(f"{name}: {type(module).__name__}({module.extra_repr()})")
    if isinstance(network, fx.GraphModule):
        lines += [
            f"{node.name} = {_target(node)} {node.args} {dict(node.kwargs)}"
            for node in network.graph.nodes
            if node.op != "placeholder"
        ]
    for label, text in kept_values(network).items():
        lines.append(label + _WRITTEN if label in without else f"{label} = {text}")
    if not isinstance(network, fx.GraphModule):
        lines.append(f"a {type(network).__name__}")
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
    without = frozenset(line.removesuffix(_WRITTEN) for line in lines if line.endswith(_WRITTEN))
    for mine, theirs in zip(outline(network, without), lines, strict=False):
        if mine != theirs:
            raise GraphError(f"model= is another model: it has {mine[:120]!r}, the file {theirs[:120]!r}")
    _fill(network, tensors)
    if record.sites:  # else the model runs as it is, and may ask for gradients
        drop_gradients(network)
    if outline(network, without) != lines:
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
    places = {place.name: place for place in tensors_kept(network) if not place.held or place.name in tensors}
    missing, unknown = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing or unknown:
        name = (missing or unknown)[0][:80]
        what = f"the file has no tensor {name!r}" if missing else f"it has no tensor {name!r}"
        raise GraphError(f"model= is another model: {what}")
    made: dict[int, Tensor] = {}
    for name, place in places.items():
        old, new = place.tensor, tensors[name]
        if old.shape != new.shape or old.is_floating_point() != new.is_floating_point():
            raise GraphError(
                f"model= is another model: its tensor {name[:80]!r} is {old.dtype} {tuple(old.shape)}, the "
                f"file's {new.dtype} {tuple(new.shape)}"
            )
        # One object under several names (tied weights) stays one; what is kept is another tensor, for a
        # model may be on another device or in another type.
        if isinstance(old, nn.Parameter) and id(old) not in made:
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        place.kept[place.key] = made.setdefault(id(old), new)
