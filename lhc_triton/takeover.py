"""What an LHCConv2d takes over from the convolution that it replaces: parameters, hooks, attributes.

torch keeps a module's hooks in dicts of the module, and a handle that removes one refers to its dict. So the
dicts themselves change hands and handles work on; the old convolution keeps copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

# All hooks of a module, and which of them take keyword arguments or run after an exception as well.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# What every nn.Conv2d has in its __dict__; anything else was put there by somebody.
_PLAIN = frozenset(vars(nn.Conv2d(1, 1, 1, device="meta")))


def own_forward(conv: nn.Module) -> bool:
    """Return whether somebody replaced a convolution's forward on the instance."""
    return "forward" in vars(conv) or "_conv_forward" in vars(conv)


def added_attributes(conv: nn.Module, own: Collection[str]) -> set[str]:
    """Return the names of attributes that somebody put on a convolution, which itself needs ``own``."""
    return set(vars(conv)) - _PLAIN - set(own)


def weight_in_force(conv: nn.Conv2d) -> Tensor:
    """Return the weight [O, I / groups, kh, kw] that the next forward uses, before a topology's mask.

    torch.nn.utils.prune computes the attribute `weight` before each forward, so that between a change and
    the next call it is out of date: here the mask is applied as it is.
    """
    method = _pruned(conv).get("weight")
    if method is not None:
        return method.apply_mask(conv)
    if not parametrize.is_parametrized(conv, "weight"):
        return conv.weight
    with _still(conv):
        return conv.weight


@contextmanager
def _still(conv: nn.Module) -> Iterator[None]:
    """Eval mode for what computes a parameter: spectral norm moves on with every look at it in training."""
    parts = list(conv.parametrizations.modules()) if parametrize.is_parametrized(conv) else []  # type: ignore[union-attr]
    flags = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, training in zip(parts, flags, strict=True):
            part.training = training


def why_not_taken_over(conv: nn.Conv2d, reserved: Collection[str]) -> str | None:
    """Say what of a convolution cannot be taken over, and what to do about it; None if everything can.

    Args:
        conv: the convolution.
        reserved: names of attributes that the new layer needs for itself.
    """
    if own_forward(conv):
        return "has a forward of its own: leave it dense with filter_fn"
    if vars(conv).get("_compiled_call_impl") is not None:
        return "was compiled in place: compile the new layer, after it has replaced this one"
    computed = _why_computed(conv)
    if computed is not None:
        return computed
    taken = sorted(_additions(conv) & set(reserved))
    if taken:
        return f"has an attribute {taken[0]!r}, a name of the new layer's own: give yours another name"
    for name in _HOOKS:
        for hook in vars(conv)[name].values():
            if getattr(hook, "__self__", None) is conv:
                return f"has its own method {hook.__name__!r} as a hook: give a function that takes a module"
    return None


def _why_computed(conv: nn.Conv2d) -> str | None:
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(conv, name):
            continue
        if name not in conv._parameters and name not in _pruned(conv):
            hooks = [
                type(h).__name__ for h in conv._forward_pre_hooks.values() if vars(h).get("name") == name
            ]
            return (
                f"computes its {name} in a hook ({', '.join(hooks) or 'unknown'}): undo that, with torch.nn"
                ".utils.remove_weight_norm or remove_spectral_norm, say, and repeat it on the new layer"
            )
    return None


def take_over(conv: nn.Conv2d, layer: nn.Conv2d, leave: Collection[str] = ()) -> None:
    """Hand a convolution's parameters, hooks and what was added to it to a layer of the same sizes.

    Pruning by torch.nn.utils.prune is made permanent first, as its own `remove` does: the masked values stay
    in the same Parameter object, and its hook and mask go. So are parametrisations, with a warning: what they
    gave last is the weight from then on, a new Parameter where they computed it from several.

    Args:
        conv: a convolution for which `why_not_taken_over` has nothing to say.
        layer: what replaces it.
        leave: names of parameters, buffers and attributes that stay behind.
    """
    for name in _pruned(conv):
        prune.remove(conv, name)
    if parametrize.is_parametrized(conv):
        own_class(conv)
        for name, functions in list(conv.parametrizations.items()):  # type: ignore[union-attr, operator]
            kinds = ", ".join(type(function).__name__ for function in functions)
            with _still(conv):
                parametrize.remove_parametrizations(conv, name, leave_parametrized=True)
            warnings.warn(
                f"a convolution's {name} was computed ({kinds}): the new layer takes its values as they are"
                " now, without that; parametrise the new layer to go on with it",
                stacklevel=4,
            )
    for name, parameter in conv._parameters.items():
        if name not in leave:
            layer.register_parameter(name, parameter)
    for name, buffer in conv._buffers.items():
        if name not in leave:
            layer.register_buffer(name, buffer, persistent=name not in conv._non_persistent_buffers_set)
    for name, child in conv._modules.items():
        layer.register_module(name, child)
    for name in added_attributes(conv, leave):
        setattr(layer, name, vars(conv)[name])
    for name in _HOOKS:
        hooks = vars(conv)[name]
        vars(conv)[name] = type(hooks)(hooks)
        for key, hook in hooks.items():
            if getattr(
                hook, "with_module", False
            ):  # torch's wrapper, which calls the hook with the old module
                hooks[key] = type(hook)(hook.hook, layer)
        vars(layer)[name] = hooks
    layer._is_full_backward_hook = conv._is_full_backward_hook


def own_class(module: nn.Module) -> None:
    """Give a parametrised module a class of its own.

    torch makes a class for such a module, which copies of it share. To remove a parametrisation takes the
    property from the class, and so from all of them.
    """
    kind = type(module)
    own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)


def _pruned(conv: nn.Module) -> dict[str, prune.BasePruningMethod]:
    """The torch.nn.utils.prune method of each pruned parameter, "weight" or "bias"."""
    hooks = conv._forward_pre_hooks.values()
    return {hook._tensor_name: hook for hook in hooks if isinstance(hook, prune.BasePruningMethod)}


def _additions(conv: nn.Conv2d) -> set[str]:
    """Names of the attributes, parameters, buffers and children that no plain convolution has."""
    names = set(vars(conv)) - _PLAIN
    names.update(conv._parameters, conv._buffers, conv._modules)
    parts = {f"{name}{part}" for name in _pruned(conv) for part in ("", "_orig", "_mask")}
    return names - {"weight", "bias"} - parts
