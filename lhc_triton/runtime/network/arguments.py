"""What ``accelerate`` asks of its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lhc_triton.finite import all_finite
from lhc_triton.layers import LHCConv2d
from lhc_triton.planning.backends import requests
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.schema import LayerTopology
from lhc_triton.runtime.choosing.dispatch import TUNES
from lhc_triton.runtime.network.fusion import border, conv_weight
from lhc_triton.runtime.network.sites import is_fusible


def check_names(tune: str, backend: str) -> None:
    """Raise ValueError for an unknown tuning mode or backend."""
    if tune not in TUNES:
        raise ValueError(f"tune={tune!r} is not known; use one of {', '.join(map(repr, TUNES))}")
    if backend not in requests():
        raise ValueError(f"backend={backend!r} is not known; use one of {', '.join(map(repr, requests()))}")


def check_inputs(model: nn.Module, example_input: Any) -> tuple[Tensor, ...]:
    """Return the example as a tuple of detached tensors.

    Raises:
        TypeError: ``model`` is no module, or the example is not made of tensors.
        ValueError: the example is empty or not dense, holds NaN or infinity, or is on another device than
            the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    values = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(values, tuple | list) or not all(isinstance(value, Tensor) for value in values):
        raise TypeError(
            f"example_input is a {type(example_input).__name__}, expected a tensor [N, C, H, W] or a tuple "
            "of tensors, the model's positional arguments"
        )
    for value in values:
        if value.layout != torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout)
            raise ValueError(f"example_input is {kind}; give a dense tensor")
    if not values or any(value.numel() == 0 for value in values):
        raise ValueError("example_input is empty; give at least one image")
    home = next((p.device for p in (*model.parameters(), *model.buffers())), None)
    for value in values:
        if home is not None and value.device != home:
            raise ValueError(f"example_input is on {value.device}, the model on {home}; move one of them")
        if value.is_floating_point() and not all_finite(value):
            raise ValueError("example_input holds NaN or infinity; give a real example")
    return tuple(value.detach() for value in values)


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
            if value is not None and not all_finite(value):
                raise ValueError(f"layer {name!r} has NaN or infinity in its {what}; repair the model first")
        if isinstance(conv, LHCConv2d) and not conv.frozen and not bool(conv.masked_filters.all()):
            raise ValueError(
                f"layer {name!r} is in its mask warm-up, some filters still run dense; call lhc.freeze(model)"
            )
    return {name: conv for name, conv in everything.items() if is_fusible(conv)}


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
