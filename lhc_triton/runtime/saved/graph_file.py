"""Accelerated networks as plain data: their graph and modules, written as JSON and checked when read."""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.errors import first_line
from lhc_triton.files import printable
from lhc_triton.planning.backends import BACKENDS
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.network.grouped import GroupedConv2d
from lhc_triton.runtime.network.int8 import Int8Conv2d
from lhc_triton.runtime.op.dense import DenseConv2d, FusedConv2d
from lhc_triton.runtime.saved.arguments import (
    MAX_ITEMS,
    MAX_NUMBER,
    WORDS,
    GraphError,
    Result,
    check_arguments,
    decode,
    encode,
    result_of,
)
from lhc_triton.runtime.saved.operations import IDENTITIES, MODULES, OPERATIONS, check_listed, operation_of

MAX_NODES = 30_000
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}(\.[A-Za-z0-9_-]{1,100}){0,50}")

_DENSE_FIELDS = {
    "in_channels": "size",
    "out_channels": "size",
    "kernel_size": "pair",
    "stride": "pair",
    "padding": "border4",
    "dilation": "pair",
    "groups": "size",
    "bias": "bool",
    "dtype": "dtype",
    "activation": "text",
    "pool": "text",
    "keeps_format": "bool",
}
_GROUPED_FIELDS = {
    "layer": "text",
    "backend": "text",
    "bias": "bool",
    "dtype": "dtype",
    "activation": "text",
    "pool": "text",
    "keeps_format": "bool",
}
_INT8_FIELDS = {
    "layer": "text",
    "backend": "text",
    "bias": "bool",
    "activation": "text",
    "pool": "text",
    "keeps_format": "bool",
    "writes_int8": "bool",
}
FLOATS: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}

# What a file may claim without holding any value, and so much more for each value that it holds. Weights are
# counted with their zeros: a density of 1/1024 is far below any real network's. Packed, they are counted with
# what tiles leave empty, tables included; cells are (tile, entry) pairs of one layer.
FREE = 2**24
PER_VALUE = {"weights": 1024, "packed weights": 64, "cells": 128}
MAX_STEP = 2**12  # stride, dilation and border, in pixels
MAX_SCALE = 64  # of a side, at an upsampling


def store_module(name: str, module: nn.Module) -> dict[str, Any]:
    """Describe a module that is on the list as plain data."""
    if isinstance(module, Int8Conv2d):
        values = {"layer": module.layer.name, "writes_int8": module.out_step is not None}
        return _described("Int8Conv2d", _INT8_FIELDS, module, {**_of_conv(module), **values})
    if isinstance(module, GroupedConv2d):
        return _described(
            "GroupedConv2d", _GROUPED_FIELDS, module, {"layer": module.layer.name, **_of_conv(module)}
        )
    if isinstance(module, DenseConv2d):
        return _described("DenseConv2d", _DENSE_FIELDS, module, _of_conv(module))
    if type(module) in IDENTITIES:
        return {"type": "Identity"}
    fields = MODULES[type(module)]
    kept = {key: getattr(module, key) is not None for key in fields if key in (*_NORM_TENSORS, "bias")}
    return _described(type(module).__name__, fields, module, kept)


_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _of_conv(module: DenseConv2d | GroupedConv2d) -> dict[str, Any]:
    weight = module.blocks if isinstance(module, GroupedConv2d) else module.weight
    return {
        "bias": module.bias is not None,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "keeps_format": getattr(module, "keeps_format", False),
    }


def _described(
    kind: str, fields: Mapping[str, str], module: nn.Module, values: Mapping[str, Any]
) -> dict[str, Any]:
    spec: dict[str, Any] = {"type": kind}
    for field in fields:
        value = values[field] if field in values else getattr(module, field)
        spec[field] = list(value) if isinstance(value, tuple) else value
    return spec


def check_sizes(plan: Plan, modules: Mapping[str, Any], values: int) -> None:
    """Raise GraphError unless what a file's layers claim is in proportion to the values that it holds.

    Args:
        plan: of the file.
        modules: descriptions of modules, not yet checked; several may be of one layer.
        values: numbers in the file's tensors.
    """
    named = [spec.get("layer") for spec in modules.values() if isinstance(spec, dict)]
    uses = Counter(name for name in named if isinstance(name, str))
    weights = packed = 0
    for layer in plan.layers:
        topology, times = layer.topology, max(1, uses[layer.name])
        # Packing and dense weights pad blocks, so the padded weight is what either may allocate.
        weights += times * topology.groups * topology.out_block * topology.in_block * topology.entries
        rows = sum(len(tile.entries) for tile in layer.tiles) * topology.in_block + len(layer.tiles)
        packed += times * rows * layer.tile_width
        cells = len(layer.tiles) * topology.entries
        for what, claimed in (("weights", weights), ("packed weights", packed), ("cells", cells)):
            allowed = FREE + PER_VALUE[what] * values
            if claimed > allowed:
                raise GraphError(
                    f"layer {layer.name[:80]!r} of its plan brings its {what} to {claimed}; with {values} "
                    f"values in the file, up to {allowed} are read"
                )


def build_module(name: str, spec: Any, layers: Mapping[str, LayerPlan]) -> nn.Module:
    """Build the module that a description stands for, on the meta device: shapes without memory.

    Raises:
        GraphError: the description is not valid.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise GraphError(f"module {str(name)[:80]!r} has no valid description")
    kind = spec["type"]
    values = {key: value for key, value in spec.items() if key != "type"}
    where = f"module {name[:80]!r} ({printable(kind, 40)})"
    try:
        if kind in ("GroupedConv2d", "Int8Conv2d"):
            _check_fields(where, values, _GROUPED_FIELDS if kind == "GroupedConv2d" else _INT8_FIELDS)
            return _build_grouped(where, values, layers)
        if kind == "DenseConv2d":
            _check_fields(where, values, _DENSE_FIELDS)
            return _build_dense(where, values)
        plain = next((module_type for module_type in MODULES if module_type.__name__ == kind), None)
        if plain is None:
            raise GraphError(f"{where}: the type is not on the list")
        _check_fields(where, values, MODULES[plain])
        if plain is nn.BatchNorm2d:
            return _build_norm(where, values)
        options = {"device": "meta"} if plain in _WITH_TENSORS else {}
        arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return plain(**arguments, **options).eval()
    except GraphError:
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise GraphError(f"{where}: {first_line(error)}") from error


_WITH_TENSORS = (nn.Linear, nn.PReLU, nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, nn.LayerNorm)


def _build_norm(where: str, values: dict[str, Any]) -> nn.BatchNorm2d:
    if values["running_mean"] != values["running_var"]:
        raise GraphError(f"{where}: it has one of running_mean and running_var only")
    norm = nn.BatchNorm2d(values["num_features"], values["eps"], device="meta").eval()
    for name in _NORM_TENSORS:
        if not values[name]:
            setattr(norm, name, None)
    return norm


def _build_grouped(where: str, values: dict[str, Any], layers: Mapping[str, LayerPlan]) -> GroupedConv2d:
    if values["backend"] not in BACKENDS:
        raise GraphError(
            f"{where}: backend {values['backend'][:40]!r} runs no sparse layer; one of "
            f"{', '.join(BACKENDS)} is needed"
        )
    int8 = "writes_int8" in values
    dtype = torch.float32 if int8 else FLOATS[values["dtype"]]
    layer = layers.get(values["layer"])
    if layer is None:
        raise GraphError(f"{where}: its layer {values['layer'][:80]!r} is not in the plan")
    topology = layer.topology
    pairs = sum(len(topology.pattern_of(group)) for group in range(topology.groups))
    blocks = torch.empty((pairs, topology.out_block, topology.in_block), dtype=dtype, device="meta")
    vector = torch.empty(topology.geometry.out_channels, dtype=dtype, device="meta")
    bias = vector if values["bias"] else None
    options = {key: values[key] for key in ("backend", "activation", "pool")}
    if int8:
        one = torch.empty((), device="meta")
        out_step = one if values["writes_int8"] else None
        integers = blocks.to(torch.int8)
        module: GroupedConv2d = Int8Conv2d(
            layer, integers, bias, scale=vector, in_step=one, out_step=out_step, **options
        )
    else:
        module = GroupedConv2d(layer, blocks, bias, **options)
    module.keeps_format = values["keeps_format"]
    return module


def _build_dense(where: str, values: dict[str, Any]) -> DenseConv2d:
    dtype = FLOATS[values["dtype"]]
    groups = values["groups"]
    if max(*values["stride"], *values["padding"], *values["dilation"]) > MAX_STEP:
        raise GraphError(f"{where}: stride, padding and dilation are supported up to {MAX_STEP}")
    if values["in_channels"] % groups or values["out_channels"] % groups:
        raise GraphError(f"{where}: groups={groups} does not divide its channels")
    shape = (values["out_channels"], values["in_channels"] // groups, *values["kernel_size"])
    weight = torch.empty(shape, dtype=dtype, device="meta")
    bias = torch.empty(shape[0], dtype=dtype, device="meta") if values["bias"] else None
    keys = ("stride", "padding", "dilation", "groups", "activation", "pool")
    module = DenseConv2d(weight, bias, **{key: values[key] for key in keys})
    module.keeps_format = values["keeps_format"]
    return module


def _check_fields(where: str, values: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    if set(values) != set(fields):
        odd = sorted(printable(str(key), 40) for key in set(values) ^ set(fields))[:8]
        raise GraphError(f"{where}: the fields {', '.join(odd)} are missing or unknown")
    for field, kind in fields.items():
        if not _fits(values[field], kind):
            raise GraphError(f"{where}: {field}={printable(repr(values[field]), 40)} is no valid {kind}")


def _fits(value: Any, kind: str) -> bool:
    def is_int(number: Any, least: int = 0) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and least <= number <= 2**31

    def all_ints(least: int, length: int | None = None) -> bool:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            return False
        return 1 <= len(value) <= MAX_ITEMS and all(is_int(item, least) for item in value)

    match kind:
        case "bool":
            return isinstance(value, bool)
        case "bool?":
            return value is None or isinstance(value, bool)
        case "word":
            return isinstance(value, str) and value in WORDS
        case "shape":
            return all_ints(1)
        case "size?":
            return value is None or is_int(value, 1) or all_ints(1, 2)
        case "scale?":
            scales = value if isinstance(value, list) else [value]
            return value is None or (
                len(scales) in (1, 2)
                and all(isinstance(scale, int | float) and 0 < scale <= MAX_SCALE for scale in scales)
            )
        case "text":
            return isinstance(value, str) and len(value) <= 1000
        case "number":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return number and abs(value) < MAX_NUMBER
        case "dtype":
            return isinstance(value, str) and value in FLOATS
        case "int":
            return is_int(value, -64)
        case "size":
            return is_int(value, 1)
        case "pair":
            return is_int(value, 1) or all_ints(1, 2)
        case "border":
            return is_int(value) or all_ints(0, 2)
        case "border4":
            return all_ints(0, 4)
        case "sizes":
            pair = isinstance(value, list) and len(value) == 2
            return is_int(value, 1) or (pair and all(item is None or is_int(item, 1) for item in value))
    return False


def store_graph(network: fx.GraphModule) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return a network's nodes and modules as plain data; GraphError names what cannot be stored."""
    check_listed(network)
    nodes: list[dict[str, Any]] = []
    modules: dict[str, dict[str, Any]] = {}
    for node in network.graph.nodes:
        target = str(node.target)
        args, kwargs = list(node.args), dict(node.kwargs)
        if node.op in OPERATIONS:
            target = operation_of(node).name
        elif node.op == "call_module":
            modules[target] = store_module(target, network.get_submodule(target))
        entry = {"name": node.name, "op": node.op, "target": target, "args": [encode(arg) for arg in args]}
        nodes.append({**entry, "kwargs": {key: encode(value) for key, value in kwargs.items()}})
    return nodes, modules


def build_graph(
    nodes: Any, modules: Mapping[str, nn.Module], constants: Mapping[str, Tensor]
) -> fx.GraphModule:
    """Build a network from stored nodes.

    Names become part of generated code, so they have to be plain identifiers.

    Args:
        nodes: ``store_graph``'s list, not yet checked.
        modules: built modules by name.
        constants: the tensors that get_attr nodes may name.

    Raises:
        GraphError: a node is not valid.
    """
    if not isinstance(nodes, list) or not 2 <= len(nodes) <= MAX_NODES:
        raise GraphError("the graph is no list of nodes")
    shell = fx.GraphModule(nn.Module(), fx.Graph(), "AcceleratedNetwork")
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    results: dict[fx.Node, Result] = {}
    inputs: set[str] = set()
    for index, item in enumerate(nodes):
        result: Result = "tensor"
        name, op, target, args, kwargs = _read_node(item, known)
        if (op == "output") != (index == len(nodes) - 1):
            raise GraphError("the graph must end with its one output")
        if op == "placeholder":
            _check_identifier(target, "input")
            if args or kwargs or target in inputs:
                raise GraphError(f"the input {target!r} has arguments, or is there twice")
            inputs.add(target)
        elif op in OPERATIONS:
            operation = OPERATIONS[op].get(target)
            if operation is None:
                raise GraphError(f"operation {target[:40]!r} is unknown")
            check_arguments(operation, args, kwargs)
            result = result_of(operation, args, kwargs, results)
            target = operation.target
        elif op == "call_module":
            _add_module(shell, target, modules, args, kwargs)
        elif op == "get_attr":
            _add_constant(shell, target, constants)
        elif op != "output" or len(args) != 1 or kwargs:
            raise GraphError(f"a node of kind {op[:40]!r} is unknown or not valid")
        known[name] = graph.create_node(op, target, tuple(args), kwargs, name=name)
        if known[name].name != name:
            raise GraphError(f"the node name {name!r} is reserved or given twice")
        results[known[name]] = result
    graph.lint()
    shell.graph = graph
    return shell.eval()


def _read_node(item: Any, known: Mapping[str, fx.Node]) -> tuple[str, str, Any, list[Any], dict[str, Any]]:
    if not isinstance(item, dict) or set(item) != {"name", "op", "target", "args", "kwargs"}:
        raise GraphError("a node is not valid: it has other fields than name, op, target, args, kwargs")
    name, op, target = item["name"], item["op"], item["target"]
    if not all(isinstance(text, str) for text in (name, op, target)):
        raise GraphError("a node is not valid: its name, op and target are not all text")
    _check_identifier(name, "node")
    if not isinstance(item["args"], list) or not isinstance(item["kwargs"], dict):
        raise GraphError(f"node {name!r} has no valid arguments")
    args = decode(item["args"], known)
    kwargs = {key: decode(value, known) for key, value in item["kwargs"].items()}
    return name, op, target, args, kwargs


def _check_identifier(name: str, what: str) -> None:
    # Names become names of Python's, where "__debug__" cannot be set and "self" is the network.
    taken = keyword.iskeyword(name) or name.startswith("__") or name == "self"
    if not _IDENTIFIER.fullmatch(name) or taken:
        raise GraphError(f"the {what} name {name[:40]!r} is not allowed")


def _check_module_name(name: str) -> None:
    if not _MODULE_NAME.fullmatch(name):
        raise GraphError(f"the name {name[:80]!r} is not allowed for a module or a tensor")
    taken = next((part for part in name.split(".") if hasattr(fx.GraphModule, part)), None)
    if taken is not None:
        raise GraphError(f"the name {name[:80]!r} is not allowed: {taken!r} is a word of torch's modules")


def _add_module(
    shell: fx.GraphModule, target: str, modules: Mapping[str, nn.Module], args: list[Any], kwargs: Any
) -> None:
    _check_module_name(target)
    module = modules.get(target)
    if module is None:
        raise GraphError(f"module {target!r} has no description")
    most = 2 if isinstance(module, FusedConv2d) else 1
    if kwargs or not 1 <= len(args) <= most or not all(isinstance(arg, fx.Node) for arg in args):
        raise GraphError(f"module {target!r} is called with other arguments than tensors")
    try:
        added = shell.add_submodule(target, module)
    except AttributeError:
        added = False
    if not added:
        raise GraphError(f"module {target!r} clashes with another name")


def _add_constant(shell: fx.GraphModule, target: str, constants: Mapping[str, Tensor]) -> None:
    _check_module_name(target)
    if target not in constants:
        raise GraphError(f"the tensor {target!r} is missing")
    *path, last = target.split(".")
    holder: nn.Module = shell
    for part in path:
        if not isinstance(getattr(holder, part, None), nn.Module):
            if hasattr(holder, part):
                raise GraphError(f"the tensor {target!r} clashes with another name")
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    if hasattr(holder, last):
        if last in holder._buffers:
            return  # named by two nodes
        raise GraphError(f"the tensor {target!r} clashes with another name")
    holder.register_buffer(last, constants[target])
