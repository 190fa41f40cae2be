"""The closed list of operations that a stored graph may hold, and what each accepts.

A stored graph comes from a file, so nothing in it is taken on trust: a name stands for an operation only by
this table, and every argument is checked against the operation's parameters before a graph is built.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.op.epilogue import like_format

MAX_NUMBER = 2**40
MAX_ITEMS = 64
MAX_BITS = 256  # of a whole number that a graph computes from sizes
_SIZE_BITS = 40


WORDS = frozenset(
    {
        "nearest", "nearest-exact", "bilinear", "bicubic", "area", "constant", "reflect", "replicate",
        "circular", "zeros", "none", "tanh", "floor", "trunc",
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
            "word" (one of WORDS), "index" (of a getitem), or "shape" (the word itself).
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


def _operation(name: str, target: Any, signature: str) -> Operation:
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


_POOL = "input:tensor kernel_size:ints stride:ints?~ padding:ints? "
_FUNCTIONS = (
    _operation("add", operator.add, "a:value b:value"),
    _operation("iadd", operator.iadd, "a:value b:value"),
    _operation("sub", operator.sub, "a:value b:value"),
    _operation("mul", operator.mul, "a:value b:value"),
    _operation("imul", operator.imul, "a:value b:value"),
    _operation("truediv", operator.truediv, "a:value b:value"),
    _operation("floordiv", operator.floordiv, "a:value b:value"),
    _operation("isub", operator.isub, "a:value b:value"),
    _operation("itruediv", operator.itruediv, "a:value b:value"),
    _operation("pow", operator.pow, "a:tensor b:number"),
    _operation("neg", operator.neg, "a:tensor"),
    _operation("getitem", operator.getitem, "a:tensor b:index"),
    _operation("shape", getattr, "a:tensor b:shape"),
    _operation("like_format", like_format, "value:tensor other:tensor"),
    _operation("torch.add", torch.add, "input:tensor other:value alpha:number?"),
    _operation("torch.sub", torch.sub, "input:tensor other:value alpha:number?"),
    _operation("torch.mul", torch.mul, "input:tensor other:value"),
    _operation("torch.div", torch.div, "input:tensor other:value rounding_mode:word?~"),
    _operation("torch.neg", torch.neg, "input:tensor"),
    _operation("torch.pow", torch.pow, "input:tensor exponent:number"),
    _operation("torch.sqrt", torch.sqrt, "input:tensor"),
    _operation("torch.exp", torch.exp, "input:tensor"),
    _operation("torch.abs", torch.abs, "input:tensor"),
    _operation("torch.clamp", torch.clamp, "input:tensor min:number?~ max:number?~"),
    _operation("torch.tanh", torch.tanh, "input:tensor"),
    _operation("torch.stack", torch.stack, "tensors:tensors dim:int?"),
    _operation("torch.chunk", torch.chunk, "input:tensor chunks:int dim:int?"),
    _operation("torch.split", torch.split, "tensor:tensor split_size_or_sections:ints dim:int?"),
    _operation("torch.transpose", torch.transpose, "input:tensor dim0:int dim1:int"),
    _operation("torch.permute", torch.permute, "input:tensor dims:ints"),
    _operation("torch.reshape", torch.reshape, "input:tensor shape:ints"),
    _operation("torch.unsqueeze", torch.unsqueeze, "input:tensor dim:int"),
    _operation("torch.squeeze", torch.squeeze, "input:tensor dim:int?"),
    _operation("torch.cat", torch.cat, "tensors:tensors dim:int?"),
    _operation("torch.flatten", torch.flatten, "input:tensor start_dim:int? end_dim:int?"),
    _operation("torch.relu", torch.relu, "input:tensor"),
    _operation("torch.relu_", torch.relu_, "input:tensor"),
    _operation("torch.sigmoid", torch.sigmoid, "input:tensor"),
    _operation("torch.mean", torch.mean, "input:tensor dim:ints?~ keepdim:bool?"),
    _operation("torch.softmax", torch.softmax, "input:tensor dim:int"),
    _operation("relu", F.relu, "input:tensor inplace:bool?"),
    _operation("relu6", F.relu6, "input:tensor inplace:bool?"),
    _operation("silu", F.silu, "input:tensor inplace:bool?"),
    _operation("hardswish", F.hardswish, "input:tensor inplace:bool?"),
    _operation("hardsigmoid", F.hardsigmoid, "input:tensor inplace:bool?"),
    _operation("softmax", F.softmax, "input:tensor dim:int?~ _stacklevel:int?"),
    _operation("log_softmax", F.log_softmax, "input:tensor dim:int?~ _stacklevel:int?"),
    _operation("leaky_relu", F.leaky_relu, "input:tensor negative_slope:number? inplace:bool?"),
    _operation("prelu", F.prelu, "input:tensor weight:tensor"),
    _operation("elu", F.elu, "input:tensor alpha:number? inplace:bool?"),
    _operation("gelu", F.gelu, "input:tensor approximate:word?"),
    _operation("mish", F.mish, "input:tensor inplace:bool?"),
    _operation("softplus", F.softplus, "input:tensor beta:number? threshold:number?"),
    _operation("hardtanh", F.hardtanh, "input:tensor min_val:number? max_val:number? inplace:bool?"),
    _operation("tanh", F.tanh, "input:tensor"),
    _operation("sigmoid", F.sigmoid, "input:tensor"),
    _operation("dropout", F.dropout, "input:tensor p:number? training:false inplace:bool?"),
    _operation("dropout2d", F.dropout2d, "input:tensor p:number? training:false inplace:bool?"),
    _operation(
        "interpolate",
        F.interpolate,
        "input:tensor size:ints?~ scale_factor:numbers?~ mode:word? align_corners:bool?~"
        " recompute_scale_factor:bool?~ antialias:bool?",
    ),
    _operation("pixel_shuffle", F.pixel_shuffle, "input:tensor upscale_factor:int"),
    _operation("pixel_unshuffle", F.pixel_unshuffle, "input:tensor downscale_factor:int"),
    _operation("channel_shuffle", F.channel_shuffle, "input:tensor groups:int"),
    _operation(
        "group_norm", F.group_norm, "input:tensor num_groups:int weight:tensor?~ bias:tensor?~ eps:number?"
    ),
    _operation(
        "layer_norm",
        F.layer_norm,
        "input:tensor normalized_shape:ints weight:tensor?~ bias:tensor?~ eps:number?",
    ),
    _operation("linear", F.linear, "input:tensor weight:tensor bias:tensor?~"),
    _operation("max_pool2d", F.max_pool2d, _POOL + "dilation:ints? ceil_mode:bool? return_indices:bool?"),
    _operation(
        "avg_pool2d",
        F.avg_pool2d,
        _POOL + "ceil_mode:bool? count_include_pad:bool? divisor_override:int?~",
    ),
    _operation("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "input:tensor output_size:ints~"),
    _operation("adaptive_max_pool2d", F.adaptive_max_pool2d, "input:tensor output_size:ints~"),
    _operation("pad", F.pad, "input:tensor pad:ints mode:word? value:number?~"),
)
_METHODS = tuple(
    _operation(name, name, signature)
    for name, signature in (
        ("view", "input:tensor *:int"),
        ("reshape", "input:tensor *:int"),
        ("permute", "input:tensor *:int"),
        ("transpose", "input:tensor dim0:int dim1:int"),
        ("flatten", "input:tensor start_dim:int? end_dim:int?"),
        ("squeeze", "input:tensor dim:int?"),
        ("unsqueeze", "input:tensor dim:int"),
        ("size", "input:tensor dim:int?"),
        ("dim", "input:tensor"),
        ("contiguous", "input:tensor"),
        ("mean", "input:tensor dim:ints?~ keepdim:bool?"),
        ("sum", "input:tensor dim:ints?~ keepdim:bool?"),
        ("relu", "input:tensor"),
        ("relu_", "input:tensor"),
        ("sigmoid", "input:tensor"),
        ("softmax", "input:tensor dim:int"),
        ("add", "input:tensor other:value alpha:number?"),
        ("add_", "input:tensor other:value alpha:number?"),
        ("mul", "input:tensor other:value"),
        ("mul_", "input:tensor other:value"),
        ("sub", "input:tensor other:value alpha:number?"),
        ("sub_", "input:tensor other:value alpha:number?"),
        ("div", "input:tensor other:value"),
        ("div_", "input:tensor other:value"),
        ("neg", "input:tensor"),
        ("pow", "input:tensor exponent:number"),
        ("sqrt", "input:tensor"),
        ("exp", "input:tensor"),
        ("abs", "input:tensor"),
        ("tanh", "input:tensor"),
        ("clamp", "input:tensor min:number?~ max:number?~"),
        ("log_softmax", "input:tensor dim:int"),
        ("expand", "input:tensor *:int"),
        ("chunk", "input:tensor chunks:int dim:int?"),
        ("split", "input:tensor split_size:ints dim:int?"),
    )
)
OPERATIONS: Mapping[str, Mapping[str, Operation]] = {
    "call_function": {operation.name: operation for operation in _FUNCTIONS},
    "call_method": {operation.name: operation for operation in _METHODS},
}


# The plain modules that a file may name: for each, the constructor's arguments and their kinds.
MODULES: Mapping[type[nn.Module], Mapping[str, str]] = {
    nn.Linear: {"in_features": "size", "out_features": "size", "bias": "bool"},
    nn.BatchNorm2d: {
        "num_features": "size",
        "eps": "number",
        "weight": "bool",
        "bias": "bool",
        "running_mean": "bool",
        "running_var": "bool",
        "num_batches_tracked": "bool",
    },
    nn.ReLU: {"inplace": "bool"},
    nn.ReLU6: {"inplace": "bool"},
    nn.SiLU: {"inplace": "bool"},
    nn.Hardswish: {"inplace": "bool"},
    nn.Hardsigmoid: {"inplace": "bool"},
    nn.Sigmoid: {},
    nn.MaxPool2d: {
        "kernel_size": "pair",
        "stride": "pair",
        "padding": "border",
        "dilation": "pair",
        "ceil_mode": "bool",
    },
    nn.AvgPool2d: {
        "kernel_size": "pair",
        "stride": "pair",
        "padding": "border",
        "ceil_mode": "bool",
        "count_include_pad": "bool",
    },
    nn.AdaptiveAvgPool2d: {"output_size": "sizes"},
    nn.AdaptiveMaxPool2d: {"output_size": "sizes"},
    nn.LeakyReLU: {"negative_slope": "number", "inplace": "bool"},
    nn.PReLU: {"num_parameters": "size"},
    nn.ELU: {"alpha": "number", "inplace": "bool"},
    nn.GELU: {"approximate": "word"},
    nn.Mish: {"inplace": "bool"},
    nn.Softplus: {"beta": "number", "threshold": "number"},
    nn.Hardtanh: {"min_val": "number", "max_val": "number", "inplace": "bool"},
    nn.Tanh: {},
    nn.Softmax: {"dim": "int"},
    nn.LogSoftmax: {"dim": "int"},
    nn.Conv2d: {
        "in_channels": "size",
        "out_channels": "size",
        "kernel_size": "pair",
        "stride": "pair",
        "padding": "border",
        "dilation": "pair",
        "groups": "size",
        "bias": "bool",
        "padding_mode": "word",
    },
    nn.ConvTranspose2d: {
        "in_channels": "size",
        "out_channels": "size",
        "kernel_size": "pair",
        "stride": "pair",
        "padding": "border",
        "output_padding": "border",
        "groups": "size",
        "bias": "bool",
        "dilation": "pair",
    },
    nn.GroupNorm: {"num_groups": "size", "num_channels": "size", "eps": "number", "affine": "bool"},
    nn.LayerNorm: {
        "normalized_shape": "shape",
        "eps": "number",
        "elementwise_affine": "bool",
        "bias": "bool",
    },
    nn.Upsample: {
        "size": "size?",
        "scale_factor": "scale?",
        "mode": "word",
        "align_corners": "bool?",
        "recompute_scale_factor": "bool?",
    },
    nn.UpsamplingNearest2d: {"size": "size?", "scale_factor": "scale?"},
    nn.UpsamplingBilinear2d: {"size": "size?", "scale_factor": "scale?"},
    nn.PixelShuffle: {"upscale_factor": "size"},
    nn.PixelUnshuffle: {"downscale_factor": "size"},
    nn.ChannelShuffle: {"groups": "size"},
    nn.ZeroPad2d: {"padding": "border4"},
    nn.ReflectionPad2d: {"padding": "border4"},
    nn.ReplicationPad2d: {"padding": "border4"},
    nn.ConstantPad2d: {"padding": "border4", "value": "number"},
    nn.Flatten: {"start_dim": "int", "end_dim": "int"},
    nn.Identity: {},
}
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def operation_of(node: fx.Node) -> Operation:
    """Return the operation of a function or method node; GraphError if it is not on the list."""
    for operation in OPERATIONS[node.op].values():
        if operation.target is node.target or (node.op == "call_method" and operation.name == node.target):
            return operation
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    raise GraphError(f"operation {str(name)!r} (node {node.name!r}) is not on the list of stored operations")


def check_listed(network: nn.Module) -> None:
    """Raise GraphError unless a network is a graph of listed operations and modules, and nothing else."""
    if not isinstance(network, fx.GraphModule):
        raise GraphError("the model was not traced")
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise GraphError(f"module {name!r} has a forward hook, which is code")
    for node in network.graph.nodes:
        target = str(node.target)
        if node.op in OPERATIONS:
            check_arguments(operation_of(node), node.args, node.kwargs)
        elif node.op == "call_module":
            _check_module(target, network.get_submodule(target))
        elif node.op == "placeholder" and (target.startswith("*") or node.args):
            raise GraphError(f"the input {target!r} has a default or is variadic")
        elif node.op == "get_attr" and not isinstance(_attribute(network, target), Tensor):
            raise GraphError(f"the attribute {target!r} is not a tensor")


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, FusedConv2d) or type(module) in IDENTITIES:
        return
    if type(module) not in MODULES:
        raise GraphError(f"module {name!r} is a {type(module).__name__}, which is not on the list")
    bordered = isinstance(module, nn.ConvTranspose2d) and module.padding_mode != "zeros"
    odd = bordered or (isinstance(module, nn.Conv2d) and isinstance(module.padding, str))
    indices = getattr(module, "return_indices", False)
    if odd or indices or getattr(module, "divisor_override", None) is not None:
        raise GraphError(f"module {name!r} has an argument that is not on the list")


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

_ARITHMETIC = frozenset({"add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "floordiv"})


def result_of(
    operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], results: Mapping[fx.Node, Result]
) -> Result:
    """Return what an operation gives, from what its arguments are.

    Raises:
        GraphError: it repeats a list or a shape, or a number of its kind could grow at every step: a graph of
            60 squarings would compute for ever.
    """
    name = operation.name
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
    "shape": lambda v: v == "shape",
    "index": lambda v: all(map(_is_index, v)) if isinstance(v, tuple) else _is_index(v),
    "ints": lambda v: (
        all(item is None or _is_kind(item, "int") for item in v)
        if isinstance(v, list | tuple) and len(v) <= MAX_ITEMS
        else _is_kind(v, "int")
    ),
}


def _is_kind(value: Any, kind: str) -> bool:
    return _KINDS[kind](value)


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
