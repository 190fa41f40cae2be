"""What a model holds and what its code can reach, at one moment, for putting it back afterwards."""

from __future__ import annotations

import copy
import dis
import functools
import random
import sys
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lhc_triton.runtime.network.outputs import same_values
from lhc_triton.runtime.op.dense import FusedConv2d

_CONTAINERS = (list, dict, set, deque)
_CODE = types.ModuleType | types.BuiltinFunctionType
_PLAIN = frozenset({bool, int, float, str, type(None)})  # what modules hold most of
_ARRAYS = bytearray | array | np.ndarray
_GENERATORS = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
_OURS = frozenset({"lhc_triton", "lhc_kernels"})
_NO_STATE = _OURS | {  # of a model's own
    "logging", "threading", "_thread", "io", "_io", "weakref", "re", "concurrent", "multiprocessing", "queue",
}  # fmt: skip
_LIBRARIES = _OURS | sys.stdlib_module_names | {"torch", "numpy"}
_EMPTY: Mapping[Any, Any] = {}  # what most of modules' containers hold: their hooks
_NOTHING = frozenset[str]()
_NONE = object()  # stands for a variable that there is not
_DEPTH = 8  # of containers and plain objects inside each other
# What a layer of ours finds out once, and the tensors that it packs: nobody sees them change.
_PACKED = frozenset({"_prepacked", "_fused", "_configs", "_parameters", "_buffers"})


class Snapshot:
    """What a model was at one moment, for putting it back, whatever running it changes.

    Put back are the attributes of its modules, the contents of lists, dicts, sets, plain objects and closures
    among them, random generators, and the values of buffers and other tensors; parameters see
    `restore_parameters`. So is what its code can reach beside them (see `_Reach`): attributes of classes and
    functions, defaults, and global variables. Libraries are taken to keep nothing.

    Attributes:
        iterates: whether the model holds an iterator, whose place can neither be seen nor put back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._contents: dict[int, tuple[Any, Any, frozenset[str]]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._cells: dict[int, tuple[types.CellType, Any]] = {}
        self._arrays: dict[int, tuple[Any, Any]] = {}
        self._generators: dict[int, tuple[Any, Any]] = {}
        self._slotted: list[tuple[Any, str, Any]] = []
        self._scripted: list[tuple[Any, str, Any]] = []
        self._classes: dict[type, dict[str, Any]] = {}
        self._globals: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}
        self._reach = _Reach(self._keep, self._keep_class, self._keep_global)
        self.iterates = False
        for module in model.modules():
            self._keep_module(module)
        iterates = self.iterates
        self._reach.follow()
        self.iterates = iterates  # what a copy shares with the model goes on wherever it is

    def changed(self) -> bool:
        """Return whether anything but parameters is another than it was."""
        return (
            any(_differs(held, *before) for held, *before in self._contents.values())
            or any(not same_values(tensor, before) for tensor, before in self._tensors.values())
            or any(cell.cell_contents is not before for cell, before in self._cells.values())
            or any(bytes(held) != bytes(before) for held, before in self._arrays.values())
            or any(not same_state(_state_of(one), state) for one, state in self._generators.values())
            or any(getattr(owner, name, None) is not value for owner, name, value in self._slotted)
            or any(not _same(getattr(owner, name), value) for owner, name, value in self._scripted)
            or any(_differs(_attributes(kind), before) for kind, before in self._classes.items())
            or any(names.get(name, _NONE) is not value for (_, name), (names, value) in self._globals.items())
        )

    def restore(self) -> None:
        """Put everything back but parameters."""
        for held, before, ignored in self._contents.values():
            _restore(held, before, ignored)
        with torch.no_grad():
            for tensor, values in self._tensors.values():
                # by value: running statistics are written without a trace in the tensor's version
                if not same_values(tensor, values):
                    tensor.copy_(values)
        for cell, content in self._cells.values():
            if cell.cell_contents is not content:
                cell.cell_contents = content
        for held, before in self._arrays.values():
            if bytes(held) != bytes(before):
                held[... if isinstance(held, np.ndarray) else slice(None)] = before
        for generator, state in self._generators.values():
            if not same_state(_state_of(generator), state):
                _set_state(generator, state)
        for owner, name, value in self._slotted:
            if getattr(owner, name, None) is not value:
                setattr(owner, name, value)
        for owner, name, value in self._scripted:
            if not _same(getattr(owner, name), value):
                setattr(owner, name, copy.deepcopy(value))
        for kind, attributes in self._classes.items():
            _restore_class(kind, attributes)
        for (_, name), (names, value) in self._globals.items():
            if value is _NONE:
                names.pop(name, None)
            elif names.get(name, _NONE) is not value:
                names[name] = value

    def _keep_module(self, module: nn.Module) -> None:
        self._reach.add_class(type(module))
        home, ignored = vars(module), _NOTHING
        if isinstance(module, torch.jit.ScriptModule):  # in Python it has what was asked for, no more
            self._scripted += [(module, name, copy.deepcopy(value)) for name, value in _scripted(module)]
            return
        if isinstance(module, FusedConv2d):  # the model's are hooks, and attributes beside ours
            ignored = _PACKED
        before = {name: value for name, value in home.items() if name not in ignored}
        self._contents[id(home)] = (home, before, ignored)
        for value in before.values():
            self._keep(value)

    def _keep(self, value: Any, depth: int = 0) -> None:
        if type(value) in _PLAIN or depth > _DEPTH or isinstance(value, nn.Module | _CODE):
            return
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._tensors[id(value)] = (value, value.detach().clone())
            home = vars(value)
            self._contents[id(home)] = (home, dict(home) if home else _EMPTY, _NOTHING)
            for item in home.values():
                self._keep(item, depth + 1)
        elif isinstance(value, tuple):
            for item in value:
                self._keep(item, depth + 1)
        elif isinstance(value, _CONTAINERS):
            if id(value) not in self._contents:
                items = list(value.values() if isinstance(value, dict) else value) if value else ()
                self._contents[id(value)] = (value, copy.copy(value) if items else _EMPTY, _NOTHING)
                for item in items:
                    self._keep(item, depth + 1)
        elif isinstance(value, types.FunctionType):
            self._reach.add_function(value)
            for cell in value.__closure__ or ():
                self._keep_cell(cell, depth)
        elif isinstance(value, types.MethodType):
            self._keep((value.__func__, value.__self__), depth + 1)
        elif isinstance(value, functools.partial):
            self._keep((value.func, value.args, value.keywords), depth + 1)
        elif isinstance(value, type):
            self._reach.add_class(value)
        elif isinstance(value, _ARRAYS):
            self._arrays[id(value)] = (value, copy.copy(value))
        elif isinstance(value, _GENERATORS):
            self._generators[id(value)] = (value, _state_of(value))
        elif hasattr(value, "__next__") and type(value).__module__ in ("builtins", "itertools"):
            self.iterates = True
        elif _library_of(type(value)) not in _NO_STATE:
            self._reach.add_class(type(value))
            for name in _slots(value):
                self._slotted.append((value, name, getattr(value, name)))
                self._keep(getattr(value, name), depth + 1)
            if hasattr(value, "__dict__"):
                self._keep(vars(value), depth + 1)

    def _keep_cell(self, cell: types.CellType, depth: int) -> None:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            return
        if id(cell) not in self._cells:
            self._cells[id(cell)] = (cell, content)
            self._keep(content, depth + 1)

    def _keep_class(self, kind: type) -> None:
        self._classes[kind] = _attributes(kind)

    def _keep_global(self, names: dict[str, Any], name: str) -> None:
        value = names.get(name, _NONE)
        self._globals[id(names), name] = (names, value)
        if value is not _NONE:
            self._keep(value)


class _Reach:
    """What code can reach: functions and classes of the model, what they name, and so on; libraries aside.

    Which object a name belongs to is not known beforehand, so a function or another attribute of a class
    counts as reached as soon as any reached code has its name.

    Args:
        keep: called with what is found: values of attributes, defaults and functions' attributes.
        keep_class: called with every class.
        keep_global: called with a module's variables and the name of one.
    """

    def __init__(
        self,
        keep: Callable[[Any], None],
        keep_class: Callable[[type], None],
        keep_global: Callable[[dict[str, Any], str], None],
    ) -> None:
        self._keep = keep
        self._keep_class = keep_class
        self._keep_global = keep_global
        self._classes: dict[type, None] = {}
        self._functions: dict[int, types.FunctionType] = {}
        self._waiting: list[types.FunctionType] = []
        self._names = {"forward"}

    def add_class(self, kind: type) -> None:
        """Let a class and what it inherits from count as reached."""
        for one in kind.__mro__:
            if one not in self._classes and _library_of(one) not in _LIBRARIES:
                self._classes[one] = None
                self._keep_class(one)
                for name, attribute in list(vars(one).items()):
                    # what Python calls by itself is written nowhere
                    special = isinstance(attribute, types.FunctionType) and name.startswith("__")
                    if name in self._names or (special and name not in ("__init__", "__new__")):
                        self._look(attribute)

    def add_function(self, function: types.FunctionType) -> None:
        """Let a function count as reached."""
        if id(function) not in self._functions and _library_of(function) not in _LIBRARIES:
            self._functions[id(function)] = function
            self._waiting.append(function)

    def follow(self) -> None:
        """Read all code until nothing new is reached."""
        while self._waiting:
            function = self._waiting.pop()
            self._keep((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
            self._keep(vars(function))
            names, variables = _names_in(function.__code__)
            for name in variables:
                self._keep_global(function.__globals__, name)
            for name in names - self._names:
                self._names.add(name)
                for kind in list(self._classes):
                    if name in vars(kind):
                        self._look(vars(kind)[name])

    def _look(self, attribute: Any) -> None:
        """Keep an attribute of a class, or the functions that it stands for."""
        if isinstance(attribute, property):
            parts: list[Any] = [attribute.fget, attribute.fset]
        elif isinstance(attribute, functools.cached_property):
            parts = [attribute.func]
        else:
            parts = [attribute]
        for part in parts:
            whole = isinstance(part, types.FunctionType)
            self._keep(part if whole else getattr(part, "__wrapped__", part))


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return all names in a piece of code, and those of global variables; functions inside included."""
    names, variables = set(code.co_names), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.endswith("_GLOBAL"):
            variables.add(str(instruction.argval))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_names, inner_variables = _names_in(constant)
            names |= inner_names
            variables |= inner_variables
    return frozenset(names), frozenset(variables)


def _library_of(thing: Any) -> str:
    """Return the top-level package of a class or a function."""
    return str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]


def parameter_values(model: nn.Module, copies: Mapping[int, Any]) -> dict[str, Tensor]:
    """Return the values of a model's parameters, from copies by id where those hold the same."""
    values = {}
    for name, parameter in model.named_parameters():
        twin = copies.get(id(parameter))
        if isinstance(twin, Tensor) and same_values(twin, parameter):
            values[name] = twin.detach()
        else:
            values[name] = parameter.detach().clone()
    return values


def restore_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """Put back the parameters that have other values than these; return their names."""
    written = [name for name, p in model.named_parameters() if not same_values(p, values[name])]
    with torch.no_grad():
        for name in written:
            model.get_parameter(name).copy_(values[name])
    return written


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Give a model back as it was found, its parameters taken to be read only; see `Snapshot`."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()


def _slots(value: Any) -> list[str]:
    """Return the names in an object's ``__slots__`` that have values."""
    slots = (vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
    names = (name for these in slots for name in ((these,) if isinstance(these, str) else these))
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def _scripted(module: Any) -> list[tuple[str, Any]]:
    """Return the attributes of a scripted module, parameters aside: TorchScript keeps them in C++."""
    kind = getattr(module, "_concrete_type", None)
    names = (
        []
        if kind is None
        else [name for name, (_, is_parameter) in kind.get_attributes().items() if not is_parameter]
    )
    values = ((name, getattr(module, name)) for name in names if name != "training")
    return [
        (name, value) for name, value in values if isinstance(value, Tensor | int | float | str | list | dict)
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_values(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def _state_of(generator: Any) -> Any:
    """Return a copy of a random generator's state."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    state = generator.bit_generator.state if isinstance(generator, np.random.Generator) else None
    return copy.deepcopy(state or generator.get_state(legacy=False))


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def same_state(a: Any, b: Any) -> bool:
    """Return whether two states of a random generator are the same."""
    if isinstance(a, dict):
        return all(same_state(a[key], b[key]) for key in a)
    return bytes(a) == bytes(b) if isinstance(a, np.ndarray) else bool(np.all(np.asarray(a == b)))


def _differs(held: Any, before: Any, ignored: frozenset[str] = _NOTHING) -> bool:
    if ignored:
        held = {name: value for name, value in held.items() if name not in ignored}
    if len(held) != len(before):
        return True
    if isinstance(held, dict):
        return any(key not in held or held[key] is not value for key, value in before.items())
    return any(a is not b for a, b in zip(held, before, strict=True))


def _restore(held: Any, before: Any, ignored: frozenset[str] = _NOTHING) -> None:
    """Give a container its earlier contents; one that still has them is not touched."""
    if not _differs(held, before, ignored):
        return
    if isinstance(held, dict):
        for key in [key for key in held if key not in before and key not in ignored]:
            del held[key]
        for key, value in before.items():
            if key not in held or held[key] is not value:
                held[key] = value
        return
    held.clear()
    (held.update if isinstance(held, set) else held.extend)(before)


def _attributes(kind: type) -> dict[str, Any]:
    """Return the attributes of a class, without those that Python keeps there for itself."""
    return {name: value for name, value in vars(kind).items() if not name.startswith("__")}


def _restore_class(kind: type, before: Mapping[str, Any]) -> None:
    held = _attributes(kind)
    for name in held.keys() - before.keys():
        delattr(kind, name)
    for name, value in before.items():
        if name not in held or held[name] is not value:
            setattr(kind, name, value)
