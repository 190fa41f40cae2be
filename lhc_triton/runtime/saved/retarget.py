"""Chooses the backends of a stored network again where it is loaded on another device."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lhc_triton.planning.cost import itemsize_of
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.planner import plan_layer, price_tiles
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.calibration import cost_model
from lhc_triton.runtime.choosing.dispatch import choose_backend, supports
from lhc_triton.runtime.network.fusion import build_fused
from lhc_triton.runtime.network.grouped import GroupedConv2d
from lhc_triton.runtime.network.int8 import Int8Conv2d
from lhc_triton.runtime.network.record import LayerRow, Record
from lhc_triton.runtime.op.backends import unavailable
from lhc_triton.runtime.op.dense import DenseConv2d, FusedConv2d

# Tiles are formed by comparing patterns pair by pair, entry by entry. The layers of a file together may take
# so much of that, about 15 s on a busy core; those beyond it keep the tiles that they have.
MAX_COMPARED = 2**30
_PER_PAIR = 2048  # what else a pair costs, in entries


def check_device(device: torch.device | str) -> torch.device:
    """Return the device; ValueError if there is no such device here."""
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not known; use 'cpu' or 'cuda'") from error
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} is not supported; use 'cpu' or 'cuda'")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r} is not available on this machine; use 'cpu'")
    return target


def retarget(
    network: nn.Module, plan: Plan, record: Record, saved_device: str, device: torch.device
) -> tuple[nn.Module, Plan, Record]:
    """Move a network from the CPU to ``device``, choosing backends again where that is needed.

    On the kind of device it was saved from, layers whose backend is available are left as they are. Otherwise
    the layer is planned for the device; a forced backend is kept where it can serve.

    Args:
        network: holds the fused layers, on the CPU.
        plan: the plan in force.
        record: how the network was made.
        saved_device: kind of the device it was saved from.
        device: where it shall run.

    Raises:
        ValueError: a layer is in int8, which its backend does not serve there.

    Returns:
        The network on ``device``, and plan and record as they are now.
    """
    moved = saved_device != device.type
    layers = {layer.name: layer for layer in plan.layers}
    fused = {name: m for name, m in network.named_modules() if isinstance(m, FusedConv2d)}
    rows = {row.layer: row for row in record.rows}
    replacements: dict[int, nn.Module] = {}
    compared = 0
    for site in record.sites:
        module = fused.get(site.module)
        layer = layers.get(site.layer)
        if module is None or id(module) in replacements:
            continue
        if isinstance(module, Int8Conv2d):
            _check_int8(module, device)
            continue
        if layer is None or not (moved or _unavailable(module, layer, device)):
            continue
        compared += len(layer.topology.patterns) ** 2 * (layer.topology.entries + _PER_PAIR)
        layer, backend, reason = _choose(
            layer, module, record.requested, device, moved, compared <= MAX_COMPARED
        )
        layers[site.layer] = layer
        replacements[id(module)] = _rebuilt(module, layer, backend, device)
        if site.module in rows:
            rows[site.module] = _updated(rows[site.module], layer, backend, reason)
    for parent in list(network.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                parent._modules[key] = replacements[id(child)]
    plan = dataclasses.replace(plan, layers=tuple(layers[layer.name] for layer in plan.layers))
    record = dataclasses.replace(record, rows=tuple(rows[row.layer] for row in record.rows))
    return network.to(device), plan, record


def _check_int8(module: Int8Conv2d, device: torch.device) -> None:
    reason = unavailable(module.backend, torch.int8, device)
    if reason is not None:
        raise ValueError(
            f"layer {module.layer.name!r} was quantised to int8 for backend {module.backend!r}: {reason}; "
            "call accelerate() on the model here"
        )


def _unavailable(module: FusedConv2d, layer: LayerPlan, device: torch.device) -> str | None:
    if not isinstance(module, GroupedConv2d):
        return None
    return supports(module.backend, layer, module.blocks.dtype, device)


def _choose(
    layer: LayerPlan,
    module: FusedConv2d,
    requested: str,
    device: torch.device,
    moved: bool,
    new_tiles: bool,
) -> tuple[LayerPlan, str, str]:
    """Return plan, backend and reason of a layer on its new device."""
    dtype = module.blocks.dtype if isinstance(module, GroupedConv2d) else module.weight.dtype
    assert isinstance(dtype, torch.dtype)
    problem = None if requested == "auto" else supports(requested, layer, dtype, device)
    if requested != "auto" and problem is None:
        return dataclasses.replace(layer, backend=requested, reason="forced"), requested, "forced"
    problem = problem or _unavailable(module, layer, device)
    cost, name = cost_model(requested, dtype, device), str(dtype).removeprefix("torch.")
    if new_tiles:
        layer = plan_layer(layer.topology, cost, dtype=name)
    else:
        layer = price_tiles(layer.topology, layer.tiles, layer.tile_width, cost, itemsize_of(name))
    decision = choose_backend(layer, dtype, device)
    why = "loaded on another kind of device" if moved and problem is None else problem
    kept = "" if new_tiles else "; the tiles are the file's, for there are too many patterns to form new ones"
    reason = f"{decision.reason} (chosen again: {why}{kept})"
    return dataclasses.replace(layer, backend=decision.backend, reason=reason), decision.backend, reason


def _rebuilt(module: FusedConv2d, layer: LayerPlan, backend: str, device: torch.device) -> FusedConv2d:
    # built where it will run: a backend refuses weights on a device it cannot serve
    bias = None if module.bias is None else module.bias.to(device)
    if isinstance(module, GroupedConv2d):
        weight = module.dense_weight().to(device)
    else:
        assert isinstance(module, DenseConv2d)
        weight = module.weight.to(device)
    return build_fused(
        weight,
        bias,
        layer,
        backend,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        activation=module.activation,
        pool=module.pool,
    )


def _updated(row: LayerRow, layer: LayerPlan, backend: str, reason: str) -> LayerRow:
    scale = row.macs / layer.topology.geometry.macs
    planned = row.macs if backend == "dense" else round(layer.planned_macs * scale)
    return dataclasses.replace(
        row,
        backend=backend,
        reason=reason,
        patterns=len(layer.topology.patterns),
        tiles=len(layer.tiles),
        tile_width=layer.tile_width,
        planned_macs=planned,
        predicted_us=layer.predicted_us.get(backend),
        measured_us=None,
    )
