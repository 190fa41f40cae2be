"""Copies of a model that are safe to run and to change."""

from __future__ import annotations

import copy
import functools
import sys
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lhc_triton.errors import first_line
from lhc_triton.layers import attributes_of_others
from lhc_triton.takeover import own_class

_PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    *_PRE_HOOKS,
)
_DICTS = (dict, OrderedDict, defaultdict)
_DEPTH = 8  # of containers inside each other


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what torch.compile, DataParallel or DistributedDataParallel wrapped; else the module itself.

    A wrapper that has hooks is more than that, and stays.
    """
    while (name := _wrapped_as(module)) is not None:
        module = getattr(module, name)
    return module


def _wrapped_as(module: nn.Module) -> str | None:
    """Return the name under which a wrapper holds what it wraps; None for any other module."""
    if has_hooks(module):
        return None
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if "_orig_mod" in module._modules else None  # torch.compile's


def drop_gradients(network: nn.Module) -> None:
    """Leave a network's parameters without gradients, but for scripted ones that torch computes anew."""
    for parameter in network.parameters():
        if parameter.is_leaf:
            parameter.requires_grad_(False)


class _Unwrapped(nn.Module):
    """Stands where a wrapper was, so that names, and what the model reads through the wrapper, stay."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self._inner = str(_wrapped_as(wrapper))
        self.add_module(self._inner, getattr(wrapper, self._inner))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self._inner](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self._modules.get(vars(self).get("_inner", ""))
            if inner is None:
                raise
            return getattr(inner, name)


def path_to_unwrapped(module: nn.Module) -> str:
    """Return how names inside ``unwrapped(module)`` start in the module itself, as in "module."."""
    inner = unwrapped(module)
    return "" if inner is module else f"{next(n for n, m in module.named_modules() if m is inner)}."


def wrappers(model: nn.Module) -> list[str]:
    """Return the names of the modules at which ``working_copy`` leaves something out; "" for the model."""
    start = path_to_unwrapped(model)
    inside = [
        name for name, m in unwrapped(model).named_modules() if unwrapped(m) is not m or _is_compiled(m)
    ]
    return [""] * bool(start) + inside


def _is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile works on a module in place, or on functions that were set on it."""
    mine = vars(module)
    if "_orig_mod" in module._modules:  # one that wraps, and has hooks: it stays
        return False
    return mine.get("_compiled_call_impl") is not None or any(_uncompiled(v) is not v for v in mine.values())


def _uncompiled(function: Any) -> Any:
    """Return the function that torch.compile made another of; anything else as it is."""
    if isinstance(function, types.FunctionType) and not hasattr(function, "_torchdynamo_disable"):
        return getattr(function, "_torchdynamo_orig_callable", function)
    return function


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile has made as it was before, so that its caches see nothing of what is tried."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and to load it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile")  # beside hooks on all modules, such as ours
        yield


def working_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy of the model in eval mode; a bare convolution comes wrapped, as layer "0".

    What wraps modules without computing anything (``unwrapped``) is left out, as is torch.compile in all its
    forms but a decorator in the model's class. Weights that are computed from others (torch.nn.utils.prune,
    parametrizations, weight and spectral norm) are copied as they stand, and no longer computed. Forward
    hooks are kept; those that refer to the model refer to its copy in the copy.

    Args:
        model: it is left as it is.
        memo: receives what was copied, by the id of the original.

    Raises:
        ValueError: the model has lazy layers that have not seen an input, or cannot be copied.
    """
    for name, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(
                f"layer {name!r} is lazy and has no weights yet; call the model on an image first"
            )
    try:
        work = duplicate(unwrapped(model), {} if memo is None else memo)
    except Exception as error:  # a model may hold anything, and any of it may refuse
        raise ValueError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    for module in work.modules():
        _fix_computed_weights(module)
        for key, child in list(module._modules.items()):
            if child is not None and unwrapped(child) is not child:
                module._modules[key] = _Unwrapped(child)
    if isinstance(work, nn.Conv2d):
        work = nn.Sequential(work)
    work.eval()  # its result is not used: a model's own eval may return nothing
    return work


def duplicate(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return ``copy.deepcopy(model, memo)`` that refers to copies wherever the model refers to its own.

    Functions and weak references are no copies by themselves: a hook, or a ``forward`` that was set on a
    module, may hold on to the model in its closure, and would go on working on that. A module that ``memo``
    brings along takes the place of an original, and has its hooks and the attributes that others put there.
    """
    given = {key: module for key, module in memo.items() if isinstance(module, nn.Module)}
    originals = list(model.modules())
    for module in originals:
        for value in (*vars(module).values(), *_hooks_of(module)):
            for tensor in _tensors(value):
                if not tensor.is_leaf:  # deepcopy refuses these
                    memo.setdefault(id(tensor), tensor.detach().clone())
            if isinstance(value, types.MethodType):
                memo[id(value)] = value  # bound anew below, where its object is the model's own
    made = copy.deepcopy(model, memo)
    for module in originals:
        if id(module) in given:
            twin = given[id(module)]
            for name in _HOOKS:
                getattr(twin, name).update(_rebound(dict(getattr(module, name)), memo))
            for name in attributes_of_others(module) - vars(twin).keys() - {"forward"}:
                vars(twin)[name] = _rebound(copy.deepcopy(vars(module)[name], memo), memo)
        elif id(module) in memo:
            for name in _HOOKS:  # torch.compile's modules lose theirs in a copy
                held = getattr(memo[id(module)], name)
                held.update({k: hook for k, hook in getattr(module, name).items() if k not in held})
    taken = set(map(id, given.values()))
    for twin in [twin for twin in memo.values() if isinstance(twin, nn.Module) and id(twin) not in taken]:
        vars(twin).update({name: _rebound(value, memo) for name, value in vars(twin).items()})
        forward = vars(twin).get("forward")
        if isinstance(forward, types.MethodType) and forward == types.MethodType(type(twin).forward, twin):
            del vars(twin)["forward"]  # it was compiled, and is the class's own again
    return made


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module itself has forward hooks."""
    return any(True for _ in _hooks_of(module))


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the forward hooks of the module that it replaces."""
    for name in _HOOKS:
        getattr(target, name).update(getattr(source, name))


def _hooks_of(module: nn.Module) -> Iterator[Callable[..., Any]]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set | deque):
        for item in value:
            yield from _tensors(item)


def _rebound(value: Any, memo: dict[int, Any], depth: int = 0) -> Any:
    """Return a value of a copy with its functions and weak references bound to copies.

    Containers, which are copies themselves, are changed in place.
    """
    if depth > _DEPTH or type(value) not in (*_DICTS, list, deque, tuple):
        return _bound(value, memo)
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    items = {key: _rebound(item, memo, depth + 1) for key, item in pairs}
    changed = {key: items[key] for key, item in pairs if items[key] is not item}
    if isinstance(value, tuple):
        return tuple(items.values()) if changed else value
    for key, item in changed.items():
        value[key] = item
    return value


def _bound(value: Any, memo: dict[int, Any]) -> Any:
    """Return a function or a weak reference to copies of what it refers to; what was not copied it shares.

    A function that torch.compile made is what it was made of.
    """
    value = _uncompiled(value)
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
    if isinstance(value, functools.partial):
        arguments = [_bound(one, memo) for one in value.args]
        keywords = {name: _bound(one, memo) for name, one in value.keywords.items()}
        return functools.partial(_bound(value.func, memo), *arguments, **keywords)
    if isinstance(value, types.FunctionType):
        return _rebound_function(value, memo)
    if isinstance(value, weakref.ref):
        target = memo.get(id(value()))
        return value if target is None else weakref.ref(target)
    return memo.get(id(value), value)


def _rebound_function(function: types.FunctionType, memo: dict[int, Any]) -> Callable[..., Any]:
    defaults = function.__defaults__ and tuple(memo.get(id(value), value) for value in function.__defaults__)
    cells = function.__closure__ and tuple(_rebound_cell(cell, memo) for cell in function.__closure__)
    if not cells and not defaults:
        return function
    bound = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
    bound.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(bound, function)


def _rebound_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    if id(cell) in memo:  # functions that share a variable go on sharing it
        bound: types.CellType = memo[id(cell)]
        return bound
    try:
        content = cell.cell_contents
    except ValueError:  # not filled yet
        return cell
    if id(content) not in memo:
        return cell
    memo[id(cell)] = types.CellType(memo[id(content)])
    return _rebound_cell(cell, memo)


def _fix_computed_weights(module: nn.Module) -> None:
    """Make parameters that hooks or parametrizations compute plain ones, of the values they have."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):
        own_class(module)
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
