"""Copies of a model that are safe to run and to change."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lhc_triton.errors import first_line
from lhc_triton.layers import attributes_of_others

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
    """Return what torch.compile, DataParallel or DistributedDataParallel wrapped; else the module itself."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := dict(module.named_children()).get("_orig_mod"), nn.Module):
            module = inner  # torch.compile keeps the module under this name
        else:
            return module


def wrappers(model: nn.Module) -> list[str]:
    """Return the names of the modules inside a model that ``working_copy`` unwraps."""
    return [name for name, m in model.named_modules() if name and unwrapped(m) is not m and not has_hooks(m)]


def working_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy of the model in eval mode; a bare convolution comes wrapped, as layer "0".

    What wraps modules without computing anything (``unwrapped``) is left out. Weights that are computed from
    others (torch.nn.utils.prune, parametrizations, weight and spectral norm) are copied as they stand, and no
    longer computed. Forward hooks are kept; those that refer to the model refer to its copy in the copy.

    Args:
        model: it is left as it is.
        memo: receives what was copied, by the id of the original.

    Raises:
        ValueError: the model cannot be copied.
    """
    try:
        work = duplicate(unwrapped(model), {} if memo is None else memo)
    except Exception as error:  # a model may hold anything, and any of it may refuse
        raise ValueError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    for module in work.modules():
        _fix_computed_weights(module)
        for key, child in list(module._modules.items()):
            if child is not None and not has_hooks(child) and unwrapped(child) is not child:
                module._modules[key] = unwrapped(child)
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
    taken = set(map(id, given.values()))
    for twin in [twin for twin in memo.values() if isinstance(twin, nn.Module) and id(twin) not in taken]:
        vars(twin).update({name: _rebound(value, memo) for name, value in vars(twin).items()})
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
    """Return a function or a weak reference to copies of what it refers to; what was not copied it shares."""
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
        # torch makes a class for the module, which the copy shares, and removes the property from the class
        kind = type(module)
        own = {key: v for key, v in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, own)
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
