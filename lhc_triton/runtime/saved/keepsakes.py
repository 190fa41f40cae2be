"""What modules keep beside parameters and buffers: numbers, lists, objects, what functions close over.

A network that is stored by its layers is put into another instance of its class. Tensors there are replaced
by the file's wherever that can be done; everything else is described, so that an instance with other values
is known to be another model.
"""

from __future__ import annotations

import functools
import hashlib
import types
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lhc_triton.generators import generators_kept
from lhc_triton.runtime.network.snapshots import preserved
from lhc_triton.runtime.op.dense import FusedConv2d

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (
    bool | int | float | complex | str | bytes | slice | range | torch.dtype | torch.device | torch.layout
)
_CODE = type | types.ModuleType | types.BuiltinFunctionType
_SHORT = 80  # characters; of longer descriptions a digest is kept
_DEPTH = 8  # of containers and objects inside each other


@dataclass(frozen=True)
class Place:
    """Where a tensor is kept.

    Attributes:
        name: the dotted name, with the way through lists and dicts in brackets.
        kept: the mapping or list that holds it.
        key: under which key.
        tensor: the tensor.
        held: whether it is in a list or dict of a module's, which calls may fill.
    """

    name: str
    kept: Any
    key: Any
    tensor: Tensor
    held: bool = False


def tensors_kept(network: nn.Module) -> Iterator[Place]:
    """Yield the places of the tensors outside fused layers.

    These are parameters and buffers, persistent or not, and what modules keep as attributes, in lists and in
    dicts, modules that are not registered included.
    """
    yield from _in_modules(network, "", {id(module) for module in network.modules()}, False)


def _in_modules(network: nn.Module, prefix: str, registered: set[int], held: bool) -> Iterator[Place]:
    for inner, module in network.named_modules(prefix=prefix):
        if isinstance(module, FusedConv2d):
            continue
        start = f"{inner}." if inner else ""
        for kept in (module._parameters, module._buffers):
            places = [Place(start + key, kept, key, tensor, held) for key, tensor in kept.items()]
            yield from (place for place in places if isinstance(place.tensor, Tensor))
        own = vars(module)
        for key, value in _own(module):
            yield from _held(start + key, own, key, value, registered, held)


def _held(
    name: str, kept: Any, key: Any, value: Any, registered: set[int], held: bool, depth: int = 0
) -> Iterator[Place]:
    """Yield the tensors of one attribute that can be replaced; each container is entered once."""
    if isinstance(value, Tensor):
        yield Place(name, kept, key, value, held)
    elif depth > _DEPTH or id(value) in registered:
        return
    elif isinstance(value, nn.Module):
        registered |= {id(module) for module in value.modules()}
        yield from _in_modules(value, name, registered, True)
    elif type(value) in (list, dict):
        registered.add(id(value))
        for inner, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, str | int):
                yield from _held(f"{name}[{inner!r}]", value, inner, item, registered, True, depth + 1)


def kept_values(network: nn.Module, everything: bool = False) -> dict[str, str]:
    """Describe each hook and attribute of a module, by a label.

    Tensors that `tensors_kept` yields are described by their presence alone, unless ``everything`` counts.
    """
    replaced = set() if everything else {id(place.tensor) for place in tensors_kept(network)}
    describe = _Describer(replaced, {id(module) for module in network.modules()})
    found: dict[str, str] = {}
    for name, module in network.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        for number, hook in enumerate(hooks):
            what = getattr(hook, "__qualname__", type(hook).__name__)
            found[f"{name}: hook {what} {number}"] = _short(describe(hook))
        if not isinstance(module, FusedConv2d):
            found.update({f"{name}: {key}": _short(describe(value)) for key, value in _own(module)})
    return found


def written_by_calls(
    network: nn.Module, inputs: Sequence[tuple[Sequence[int], torch.dtype]]
) -> frozenset[str]:
    """Return what a call writes to: labels of `kept_values`, and names of tensors in lists and dicts.

    Plain numbers and texts do not count: what a call finds in those may decide what it returns.

    Args:
        network: it is called once, on noise, and left as it was.
        inputs: (shape, type) of each input.
    """
    tensors = (*network.parameters(), *network.buffers())
    home = next((tensor.device for tensor in tensors), torch.device("cpu"))
    gpus = [torch.cuda.current_device() if home.index is None else home.index] if home.type == "cuda" else []
    with preserved(network), generators_kept(gpus), torch.no_grad():
        before = _contents(network)
        try:
            noise = [torch.ones(shape, dtype=dtype, device=home) for shape, dtype in inputs]
            network(*(x.normal_() if x.is_floating_point() else x for x in noise))
        except Exception:  # the model's code is not ours, and the inputs are not real ones
            return frozenset()
        after = _contents(network)
    return frozenset(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _contents(network: nn.Module) -> dict[str, str]:
    held = {place.name: _tensor(place.tensor) for place in tensors_kept(network) if place.held}
    values = {key: text for key, text in kept_values(network, True).items() if not _is_plain(text)}
    return {**values, **held}


def _is_plain(text: str) -> bool:
    return "(" not in text and "[" not in text and "{" not in text


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:_SHORT]} ... {_digest(text.encode())}"


def _own(module: nn.Module) -> list[tuple[str, Any]]:
    """Return what was set on a module, by name."""
    if isinstance(module, fx.GraphModule):
        return [(key, value) for key, value in vars(module).items() if isinstance(value, Tensor)]
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return sorted((key, value) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE)


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class _Describer:
    """Describes values in a text that is the same for equal ones, in whatever process they are."""

    def __init__(self, replaced: set[int], registered: set[int]) -> None:
        self._replaced = replaced
        self._registered = registered
        self._open: set[int] = set()

    def __call__(self, value: Any) -> str:
        if value is None or value is Ellipsis or isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, nn.Module):
            if id(value) in self._registered:
                return type(value).__name__
            return f"{value} {', '.join(map(self, (*value.parameters(), *value.buffers())))}"
        if isinstance(value, Tensor):
            return "a tensor" if id(value) in self._replaced else _tensor(value)
        if isinstance(value, np.ndarray | array | bytearray):
            return f"{type(value).__name__} {_digest(bytes(value))}"
        if isinstance(value, _CODE):
            return str(getattr(value, "__qualname__", type(value).__name__))
        if id(value) in self._open or len(self._open) > _DEPTH:
            return type(value).__name__
        self._open.add(id(value))
        try:
            return self._parts(value)
        finally:
            self._open.discard(id(value))

    def _parts(self, value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self(key)}: {self(item)}" for key, item in value.items()) + "}"
        if isinstance(value, set | frozenset):
            return f"{type(value).__name__}({sorted(map(self, value))})"
        if isinstance(value, list | tuple | deque):
            return f"{type(value).__name__}({', '.join(map(self, value))})"
        if isinstance(value, types.MethodType):
            return f"{value.__func__.__qualname__} of {self(value.__self__)}"
        if isinstance(value, functools.partial):
            return f"partial({self(value.func)}, {self(value.args)}, {self(value.keywords)})"
        if isinstance(value, types.FunctionType):
            cells = [self._cell(cell) for cell in value.__closure__ or ()]
            return f"{value.__qualname__} {cells} {self(value.__defaults__)} {self(value.__kwdefaults__)}"
        return f"{type(value).__name__}({self(getattr(value, '__dict__', None))})"

    def _cell(self, cell: types.CellType) -> str:
        try:
            return self(cell.cell_contents)
        except ValueError:  # not filled yet
            return "empty"


def _tensor(tensor: Tensor) -> str:
    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return kind
    values = tensor.detach().cpu().contiguous().flatten()
    return f"{kind} {_digest(values.view(torch.uint8).numpy().tobytes())}"
