"""Networks of torch.export (.pt2): checked before torch reads them, then turned back into modules.

torch's reader unpickles objects that an archive may hold, evaluates its size expressions and runs its guards.
So an archive is read only if it holds no pickled object, no compiled code, and expressions of plain sizes;
guards are left out.
"""

from __future__ import annotations

import io
import operator
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lhc_triton.files import open_regular, parse_json

MAX_JSON_BYTES = 1 << 28
# As sympy writes the sizes of a graph: names of symbols, whole numbers, and the functions that torch uses.
_EXPRESSION = re.compile(
    r"(?:Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|FloorDiv|PythonMod|CleanDiv|Rational|True|False|\'[su]\d+\'"
    r"|(?:positive|integer|nonnegative|zero|evaluate)=|\b[su]\d+\b|\d+|[-+*/%(),<>=!&| ])*"
)
_CODE = ("aotinductor", "custom_obj", "opaque", ".so", "extern")

aten = torch.ops.aten
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.relu.default: F.relu,
    aten.relu_.default: F.relu,
    aten.silu.default: F.silu,
    aten.silu_.default: F.silu,
    aten.hardswish.default: F.hardswish,
    aten.hardswish_.default: F.hardswish,
    aten.hardsigmoid.default: F.hardsigmoid,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.gelu.default: F.gelu,
    aten.elu.default: F.elu,
    aten.leaky_relu.default: F.leaky_relu,
    aten.leaky_relu_.default: F.leaky_relu,
    aten.add.Tensor: operator.add,
    aten.add_.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.mul_.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.max_pool2d.default: F.max_pool2d,
    aten.avg_pool2d.default: F.avg_pool2d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    aten.cat.default: torch.cat,
    aten.flatten.using_ints: torch.flatten,
    aten.mean.dim: torch.mean,
    aten.softmax.int: F.softmax,
    aten.log_softmax.int: F.log_softmax,
    aten.pixel_shuffle.default: F.pixel_shuffle,
    operator.getitem: operator.getitem,
}
_METHODS = {
    aten.view.default: "view",
    aten.reshape.default: "reshape",
    aten.permute.default: "permute",
    aten.transpose.int: "transpose",
    aten.unsqueeze.default: "unsqueeze",
    aten.squeeze.dim: "squeeze",
    aten.contiguous.default: "contiguous",
    aten.sym_size.int: "size",
}
_IDENTITIES = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alias.default)


def read_exported(path: Path) -> tuple[nn.Module, tuple[tuple[int, ...], ...]]:
    """Return the network of a torch.export archive with nn.Conv2d modules again, and its example's shapes.

    Raises:
        ValueError: the file is damaged, holds what would run code, or other inputs than tensors.
    """
    _check(path)
    try:
        program = torch.export.load(path)
        graph = program.module(check_guards=False)
    except Exception as error:  # a damaged archive can lead torch's reader to any exception
        line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ValueError(f"{path}: torch.export cannot read it ({line})") from error
    args, kwargs = program.example_inputs or ((), {})
    if kwargs or not args or not all(isinstance(value, Tensor) for value in args):
        raise ValueError(f"{path}: its inputs are not all positional tensors; export it with tensors only")
    return as_modules(graph, program.call_spec.out_spec), tuple(tuple(value.shape) for value in args)


def _check(path: Path) -> None:
    """Refuse an archive in which torch's reader would run code."""
    why = f"{path}: is refused, since reading it would run code ({{}}); give package.module:factory instead"
    open_regular(path).close()
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            odd = next((name for name in names if any(part in name for part in _CODE)), None)
            if odd is not None:
                raise ValueError(why.format(f"it holds {odd}"))
            if not any(name.endswith("archive_format") for name in names):
                raise ValueError(f"{path}: is no archive of this torch's torch.export.save; export it again")
            for name in names:
                if archive.getinfo(name).file_size > MAX_JSON_BYTES and "/weights/" not in name:
                    raise ValueError(f"{path}: {name} is larger than {MAX_JSON_BYTES} bytes")
                if name.endswith(".json"):
                    _check_document(_json(archive.read(name).decode(), f"{path}: {name}"), why)
                elif "/sample_inputs/" in name:
                    with warnings.catch_warnings():
                        warnings.simplefilter(
                            "ignore"
                        )  # on other protocols of pickle, which are refused next
                        torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no intact archive of torch.export") from error
    except pickle.UnpicklingError:
        raise ValueError(why.format("its example holds pickled objects")) from None


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None


def _check_document(document: Any, why: str) -> None:
    for key, value in _items(document):
        if key == "use_pickle" and value:
            raise ValueError(why.format("a tensor is pickled"))
        if key == "expr_str" and not (isinstance(value, str) and _EXPRESSION.fullmatch(value)):
            raise ValueError(why.format("a size is an expression of other things"))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    stack = [value]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            yield from found.items()
            stack += found.values()
        elif isinstance(found, list):
            stack += found


def as_modules(traced: fx.GraphModule, outputs: pytree.TreeSpec | None) -> fx.GraphModule:
    """Return an exported program's graph with modules for its convolutions, norms and linear layers.

    Operations become the functions of torch that stand for them; operators in place become others, since an
    exported graph uses no value after it was overwritten. What is not known stays an operator of torch.

    Args:
        traced: the program's graph.
        outputs: how its outputs are packed: a tensor, a tuple, a dict.

    Raises:
        ValueError: a node is something other than an operator of torch.
    """
    root, graph = nn.Module(), fx.Graph()
    copies: dict[fx.Node, Any] = {}
    holders = dict(traced.named_parameters()) | dict(traced.named_buffers())
    for name, value in vars(traced).items():
        if isinstance(value, Tensor):
            holders[name] = value

    def tensor(node: fx.Node | None) -> Tensor | None:
        return None if node is None else holders[str(node.target)]

    for node in traced.graph.nodes:
        if node.op == "call_module":  # guards, and nothing else: see read_exported
            continue
        args = fx.map_arg(node.args, lambda n: copies[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: copies[n])
        if node.op == "output" and outputs is not None:
            graph.output(pytree.tree_unflatten(list(args[0]), outputs))
            continue
        if node.op != "call_function":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if node.op == "get_attr":
                root.register_buffer(_flat(str(node.target)), holders[str(node.target)])
                copies[node].target = _flat(str(node.target))
            continue
        module = _module(node, tensor)
        if module is not None:
            name = _flat(str(node.args[1].target)).removesuffix("_weight")
            name = f"{name}_{node.name}" if hasattr(root, name) else name
            root.add_module(name, module.eval())
            copies[node] = graph.call_module(name, (args[0],))
        elif node.target in _IDENTITIES:
            copies[node] = args[0]
        elif node.target in _FUNCTIONS:
            function = _FUNCTIONS[node.target]
            copies[node] = graph.call_function(function, *_named(node, function, args, kwargs))
        elif node.target in _METHODS:
            method = _METHODS[node.target]
            if method in ("view", "reshape", "permute"):
                args = (args[0], *args[1])
            copies[node] = graph.call_method(method, args, kwargs)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
            copies[node] = graph.call_function(node.target, args, kwargs)
        else:
            raise ValueError(
                f"its operation {str(node.target)[:60]} is not one of torch's own; it is not read"
            )
    made = fx.GraphModule(root, graph, "ExportedNetwork")
    made.graph.eliminate_dead_code()
    made.delete_all_unused_submodules()
    used = {str(node.target) for node in made.graph.nodes if node.op == "get_attr"}
    for name in set(dict(made.named_buffers(recurse=False))) - used:
        delattr(made, name)
    made.recompile()
    return made


def _flat(name: str) -> str:
    return re.sub(r"\W", "_", name) if not name[:1].isdigit() else "layer_" + re.sub(r"\W", "_", name)


def _named(
    node: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Give what follows the first arguments by name, where a function has other places for them."""
    if function in (F.softmax, F.log_softmax):
        return args[:1], {"dim": args[1]}
    schema = [argument.name for argument in node.target._schema.arguments] if args[2:] else []
    if function in (F.max_pool2d, F.avg_pool2d):
        named = dict(zip(schema[2:], args[2:], strict=False))
        named = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in named.items()}
        if not named.get("stride", True):
            named.pop("stride")
        return (args[0], tuple(args[1])), {**named, **kwargs}
    if function is F.adaptive_avg_pool2d:
        return (args[0], tuple(args[1])), kwargs
    return args, kwargs


def _module(node: Any, tensor: Callable[[Any], Tensor | None]) -> nn.Module | None:
    """Return the module that a node stands for, if its weights are the program's own."""
    if node.target not in (
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.batch_norm.default,
        aten.linear.default,
    ):
        return None
    operands = [node.args[1], node.args[2] if len(node.args) > 2 else None]
    if not all(
        operand is None or (isinstance(operand, fx.Node) and operand.op == "get_attr") for operand in operands
    ):
        return None
    weight, bias = (tensor(operand) for operand in operands)
    if weight is None:
        return None
    if node.target is aten.linear.default:
        made: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    elif node.target is aten.batch_norm.default:
        _, _, _, mean, variance, training, momentum, eps = node.args[:8]
        if training or bias is None or tensor(mean) is None or weight.ndim != 1:
            return None
        made = nn.BatchNorm2d(len(weight), eps, momentum, device="meta")
        made.running_mean, made.running_var = tensor(mean), tensor(variance)
        made.num_batches_tracked = torch.tensor(0)
    else:
        given: list[Any] = [*node.args[3:]]
        stride, padding, dilation, groups = given + [[1], [0], [1], 1][len(given) :]
        kh, kw = weight.shape[2:]
        made = nn.Conv2d(
            weight.shape[1] * groups,
            len(weight),
            (kh, kw),
            _pair(stride),
            padding if isinstance(padding, str) else _pair(padding),
            _pair(dilation),
            groups,
            bias is not None,
            device="meta",
        )
    made.weight = nn.Parameter(weight.detach())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach())
    return made


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[-1])
