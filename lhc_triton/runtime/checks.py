"""What ``accelerate`` asks of its arguments, and the copy it works on."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.layers import LHCConv2d
from lhc_triton.planning.schema import LayerTopology, Plan
from lhc_triton.runtime.backends import BACKENDS
from lhc_triton.runtime.dispatch import TUNES
from lhc_triton.runtime.errors import first_line
from lhc_triton.runtime.fusion import border, conv_weight
from lhc_triton.runtime.graph import is_fusible

REQUESTS = ("auto", "dense", *BACKENDS)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def check_names(tune: str, backend: str) -> None:
    """Raise ValueError for an unknown tuning mode or backend."""
    if tune not in TUNES:
        raise ValueError(f"tune={tune!r} is not known; use one of {', '.join(map(repr, TUNES))}")
    if backend not in REQUESTS:
        raise ValueError(f"backend={backend!r} is not known; use one of {', '.join(map(repr, REQUESTS))}")


def check_inputs(model: nn.Module, example_input: Any) -> tuple[Tensor, ...]:
    """Return the example as a tuple of detached tensors.

    Raises:
        TypeError: ``model`` is no module, or the example is not made of tensors.
        ValueError: the example is empty, holds NaN or infinity, or is on another device than the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    values = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(values, tuple | list) or not all(isinstance(value, Tensor) for value in values):
        raise TypeError(
            f"example_input is a {type(example_input).__name__}, expected a tensor [N, C, H, W] or a tuple "
            "of tensors, the model's positional arguments"
        )
    if not values or any(value.numel() == 0 for value in values):
        raise ValueError("example_input is empty; give at least one image")
    home = next((p.device for p in (*model.parameters(), *model.buffers())), None)
    for value in values:
        if home is not None and value.device != home:
            raise ValueError(f"example_input is on {value.device}, the model on {home}; move one of them")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError("example_input holds NaN or infinity; give a real example")
    return tuple(value.detach() for value in values)


def working_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model in eval mode; a bare convolution comes wrapped, as layer "0".

    Weights that a forward hook computed (torch.nn.utils.prune) are copied as they stand.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses these
                memo[id(value)] = value.detach().clone()
    try:
        work = copy.deepcopy(model, memo)
    except Exception as error:  # a model may hold anything, and any of it may refuse
        raise ValueError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    return (nn.Sequential(work) if isinstance(work, nn.Conv2d) else work).eval()


def strip_hooks(model: nn.Module) -> bool:
    """Remove all forward hooks, in place; return whether there were any."""
    found = False
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name, None)
            if hooks:
                found = True
                hooks.clear()
    return found


def check_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions that can be replaced, by name.

    Raises:
        ValueError: there is no convolution at all, one has NaN or infinity, or one is still in its mask
            warm-up.
    """
    everything = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not everything:
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d: there is nothing to accelerate")
    for name, conv in everything.items():
        for what, value in (("weight", conv.weight), ("bias", conv.bias)):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"layer {name!r} has NaN or infinity in its {what}; repair the model first")
        if isinstance(conv, LHCConv2d) and not conv.frozen and not bool(conv.masked_filters.all()):
            raise ValueError(
                f"layer {name!r} is in its mask warm-up, some filters still run dense; call lhc.freeze(model)"
            )
    return {name: conv for name, conv in everything.items() if is_fusible(conv)}


def run_model(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Run the model on copies of the example; ValueError if it refuses them."""
    try:
        with torch.no_grad():
            return model(*[value.clone() for value in inputs])
    except Exception as error:  # foreign code: whatever it raises, the user sees one line
        shapes = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in inputs)
        raise ValueError(
            f"{type(model).__name__} does not take example_input {shapes}: {first_line(error)}"
        ) from error


def fitting_plan(plan: Any, convs: Mapping[str, nn.Conv2d]) -> Plan:
    """Return the plan if it was made for these convolutions.

    Raises:
        TypeError: it is not a Plan.
        ValueError: it names a layer that is missing or has other sizes, or drops weights that live.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}, expected what lhc.plan() returns")
    if set(convs) == {"0"} and [layer.name for layer in plan.layers] == [""]:
        only = plan.layers[0]
        renamed = dataclasses.replace(only, topology=dataclasses.replace(only.topology, name="0"))
        plan = dataclasses.replace(plan, layers=(renamed,))
    for layer in plan.layers:
        problem = _misfit(layer.topology, convs.get(layer.name))
        if problem is not None:
            raise ValueError(
                f"the plan is for another model: layer {layer.name!r} {problem}; make one with lhc.plan()"
            )
    return plan


def _misfit(topology: LayerTopology, conv: nn.Conv2d | None) -> str | None:
    """Say why a layer's topology is not this convolution's; None if it may be."""
    if conv is None:
        return "is not in this model"
    geometry = topology.geometry
    for what, planned, actual in (
        ("in_channels", geometry.in_channels, conv.in_channels),
        ("out_channels", geometry.out_channels, conv.out_channels),
        ("groups", 1, conv.groups),
        ("kernel", tuple(geometry.kernel), tuple(conv.kernel_size)),
        ("stride", tuple(geometry.stride), tuple(conv.stride)),
        ("dilation", tuple(geometry.dilation), tuple(conv.dilation)),
        ("padding", tuple(geometry.padding), border(conv)),
    ):
        if planned != actual:
            return f"has {what} {planned} in the plan and {actual} in the model"
    live = conv_weight(conv) != 0
    mask = torch.from_numpy(topology.block_mask()).to(live.device)
    mask = mask.repeat_interleave(topology.out_block, 0).repeat_interleave(topology.in_block, 1)
    lost = int((live & ~mask[: conv.out_channels, : conv.in_channels]).sum())
    return f"has {lost} live weights that the plan drops" if lost else None
