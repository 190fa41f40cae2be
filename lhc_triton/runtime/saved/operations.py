"""The closed list of operations and modules that a stored graph may hold, and what each accepts.

A stored graph comes from a file, so nothing in it is taken on trust: a name stands for an operation only by
this table.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.op.epilogue import like_format
from lhc_triton.runtime.saved.arguments import GraphError, Operation, check_arguments, read_operation


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool) -> Tensor:
    """torchvision.ops.stochastic_depth in eval mode, which returns its input; needs no torchvision."""
    return input


_POOL = "input:tensor kernel_size:ints stride:ints?~ padding:ints? "
_FUNCTIONS = (
    read_operation("add", operator.add, "a:value b:value"),
    read_operation("iadd", operator.iadd, "a:value b:value"),
    read_operation("sub", operator.sub, "a:value b:value"),
    read_operation("mul", operator.mul, "a:value b:value"),
    read_operation("imul", operator.imul, "a:value b:value"),
    read_operation("truediv", operator.truediv, "a:value b:value"),
    read_operation("floordiv", operator.floordiv, "a:value b:value"),
    read_operation("isub", operator.isub, "a:value b:value"),
    read_operation("itruediv", operator.itruediv, "a:value b:value"),
    read_operation("pow", operator.pow, "a:tensor b:number"),
    read_operation("neg", operator.neg, "a:tensor"),
    read_operation("getitem", operator.getitem, "a:tensor b:index"),
    read_operation("shape", getattr, "a:tensor b:shape"),
    read_operation("eq", operator.eq, "a:value b:value"),
    read_operation("torch._assert", torch._assert, "condition:value message:text"),
    read_operation("stochastic_depth", stochastic_depth, "input:tensor p:number mode:word training:false"),
    read_operation("like_format", like_format, "value:tensor other:tensor"),
    read_operation("torch.add", torch.add, "input:tensor other:value alpha:number?"),
    read_operation("torch.sub", torch.sub, "input:tensor other:value alpha:number?"),
    read_operation("torch.mul", torch.mul, "input:tensor other:value"),
    read_operation("torch.div", torch.div, "input:tensor other:value rounding_mode:word?~"),
    read_operation("torch.neg", torch.neg, "input:tensor"),
    read_operation("torch.pow", torch.pow, "input:tensor exponent:number"),
    read_operation("torch.sqrt", torch.sqrt, "input:tensor"),
    read_operation("torch.exp", torch.exp, "input:tensor"),
    read_operation("torch.abs", torch.abs, "input:tensor"),
    read_operation("torch.clamp", torch.clamp, "input:tensor min:number?~ max:number?~"),
    read_operation("torch.tanh", torch.tanh, "input:tensor"),
    read_operation("torch.stack", torch.stack, "tensors:tensors dim:int?"),
    read_operation("torch.chunk", torch.chunk, "input:tensor chunks:int dim:int?"),
    read_operation("torch.split", torch.split, "tensor:tensor split_size_or_sections:ints dim:int?"),
    read_operation("torch.transpose", torch.transpose, "input:tensor dim0:int dim1:int"),
    read_operation("torch.permute", torch.permute, "input:tensor dims:ints"),
    read_operation("torch.reshape", torch.reshape, "input:tensor shape:ints"),
    read_operation("torch.unsqueeze", torch.unsqueeze, "input:tensor dim:int"),
    read_operation("torch.squeeze", torch.squeeze, "input:tensor dim:int?"),
    read_operation("torch.cat", torch.cat, "tensors:tensors dim:int?"),
    read_operation("torch.flatten", torch.flatten, "input:tensor start_dim:int? end_dim:int?"),
    read_operation("torch.relu", torch.relu, "input:tensor"),
    read_operation("torch.relu_", torch.relu_, "input:tensor"),
    read_operation("torch.sigmoid", torch.sigmoid, "input:tensor"),
    read_operation("torch.mean", torch.mean, "input:tensor dim:ints?~ keepdim:bool?"),
    read_operation("torch.softmax", torch.softmax, "input:tensor dim:int"),
    read_operation("relu", F.relu, "input:tensor inplace:bool?"),
    read_operation("relu6", F.relu6, "input:tensor inplace:bool?"),
    read_operation("silu", F.silu, "input:tensor inplace:bool?"),
    read_operation("hardswish", F.hardswish, "input:tensor inplace:bool?"),
    read_operation("hardsigmoid", F.hardsigmoid, "input:tensor inplace:bool?"),
    read_operation("softmax", F.softmax, "input:tensor dim:int?~ _stacklevel:int?"),
    read_operation("log_softmax", F.log_softmax, "input:tensor dim:int?~ _stacklevel:int?"),
    read_operation("leaky_relu", F.leaky_relu, "input:tensor negative_slope:number? inplace:bool?"),
    read_operation("prelu", F.prelu, "input:tensor weight:tensor"),
    read_operation("elu", F.elu, "input:tensor alpha:number? inplace:bool?"),
    read_operation("gelu", F.gelu, "input:tensor approximate:word?"),
    read_operation("mish", F.mish, "input:tensor inplace:bool?"),
    read_operation("softplus", F.softplus, "input:tensor beta:number? threshold:number?"),
    read_operation("hardtanh", F.hardtanh, "input:tensor min_val:number? max_val:number? inplace:bool?"),
    read_operation("tanh", F.tanh, "input:tensor"),
    read_operation("sigmoid", F.sigmoid, "input:tensor"),
    read_operation("dropout", F.dropout, "input:tensor p:number? training:false inplace:bool?"),
    read_operation("dropout2d", F.dropout2d, "input:tensor p:number? training:false inplace:bool?"),
    read_operation(
        "interpolate",
        F.interpolate,
        "input:tensor size:ints?~ scale_factor:numbers?~ mode:word? align_corners:bool?~"
        " recompute_scale_factor:bool?~ antialias:bool?",
    ),
    read_operation("pixel_shuffle", F.pixel_shuffle, "input:tensor upscale_factor:int"),
    read_operation("pixel_unshuffle", F.pixel_unshuffle, "input:tensor downscale_factor:int"),
    read_operation("channel_shuffle", F.channel_shuffle, "input:tensor groups:int"),
    read_operation(
        "group_norm", F.group_norm, "input:tensor num_groups:int weight:tensor?~ bias:tensor?~ eps:number?"
    ),
    read_operation(
        "layer_norm",
        F.layer_norm,
        "input:tensor normalized_shape:ints weight:tensor?~ bias:tensor?~ eps:number?",
    ),
    read_operation(
        "batch_norm",
        F.batch_norm,
        "input:tensor running_mean:tensor running_var:tensor weight:tensor?~ bias:tensor?~ training:false?"
        " momentum:number? eps:number?",
    ),
    read_operation("linear", F.linear, "input:tensor weight:tensor bias:tensor?~"),
    read_operation("max_pool2d", F.max_pool2d, _POOL + "dilation:ints? ceil_mode:bool? return_indices:bool?"),
    read_operation(
        "avg_pool2d",
        F.avg_pool2d,
        _POOL + "ceil_mode:bool? count_include_pad:bool? divisor_override:int?~",
    ),
    read_operation("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "input:tensor output_size:ints~"),
    read_operation("adaptive_max_pool2d", F.adaptive_max_pool2d, "input:tensor output_size:ints~"),
    read_operation("pad", F.pad, "input:tensor pad:ints mode:word? value:number?~"),
)
_METHODS = tuple(
    read_operation(name, name, signature)
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
    if getattr(node.target, "__module__", None) == "torchvision.ops.stochastic_depth":
        return OPERATIONS["call_function"]["stochastic_depth"]
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


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
