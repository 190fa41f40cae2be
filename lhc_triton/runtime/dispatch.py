"""Who runs a layer: the cost model's choice, a stored measurement, or a new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import lhc_triton.runtime.ops  # noqa: F401  (registers torch.ops.lhc)
from lhc_triton.planning.plan import ConvGeometry, LayerPlan
from lhc_triton.runtime.backends import unavailable
from lhc_triton.runtime.packing import pack
from lhc_triton.runtime.store import TimingStore, layer_key
from lhc_triton.runtime.timing import time_paired

AUTO_BACKENDS = {"cpu": ("torch",), "cuda": ("triton",)}
"""The sparse backends that "auto" considers on each device kind."""

ROUNDS = 7
TUNES = ("off", "cached", "full")


@dataclass(frozen=True)
class Decision:
    """A layer's backend.

    Attributes:
        backend: its name, or "dense".
        reason: why, in one phrase.
        measured_us: measured time of every backend that was tried, dense included; empty without one.
    """

    backend: str
    reason: str
    measured_us: dict[str, float]


def supports(backend: str, layer: LayerPlan, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Say why a backend cannot run a layer in this type on this device; None if it can ("dense" always)."""
    return None if backend == "dense" else unavailable(backend, dtype, device)


def choose_backend(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device | str,
    tune: str = "cached",
    store: TimingStore | None = None,
) -> Decision:
    """Choose between dense and the device's sparse backend.

    Args:
        layer: the plan; its backend and reason are the cost model's choice.
        dtype: of the activations.
        device: of the activations.
        tune: "off" takes the plan's choice; "cached" a stored measurement where there is one; "full"
            measures what is not stored, on random data of the planned shapes, and stores it.
        store: measured times; default the user's.

    Raises:
        ValueError: for an unknown ``tune``.
    """
    if tune not in TUNES:
        raise ValueError(f"tune is {tune!r}; supported are {', '.join(TUNES)}")
    device = torch.device(device)
    sparse = AUTO_BACKENDS.get(device.type, ("torch",))
    reasons = {name: supports(name, layer, dtype, device) for name in sparse}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        return Decision("dense", next(iter(reasons.values())) or "no sparse backend", {})
    times: dict[str, float] = {}
    if tune != "off":
        store = store or TimingStore()
        key = layer_key(layer, dtype, device)
        times = {name: t for name, t in store.get(key).items() if name in (*able, "dense")}
        missing = [name for name in (*able, "dense") if name not in times]
        if missing and tune == "full":
            times = measure(layer, dtype, device, able)
            _keep(store, key, times)
        elif missing:
            times = {}
    if times:
        best = min(times, key=lambda name: times[name])
        fastest = min(able, key=lambda name: times[name])
        ratio = times["dense"] / times[fastest]
        return Decision(best, f"measured {ratio:.2f}x dense's speed with {fastest}", times)
    if layer.backend == "dense" or layer.backend in able:
        return Decision(layer.backend, layer.reason, {})
    return Decision("dense", supports(layer.backend, layer, dtype, device) or "not for this device", {})


def _keep(store: TimingStore, key: str, times: dict[str, float]) -> None:
    try:
        store.put(key, times)
    except OSError as error:
        warnings.warn(f"measured times are not kept: {error}", stacklevel=3)


def measure(
    layer: LayerPlan, dtype: torch.dtype, device: torch.device, backends: list[str], rounds: int = ROUNDS
) -> dict[str, float]:
    """Time a layer on random data of its planned shapes: each backend, and the faster dense layout.

    Returns:
        Median microseconds by backend name, "dense" among them.
    """
    geometry = layer.topology.geometry
    generator = torch.Generator().manual_seed(0)
    kh, kw = geometry.kernel
    weight = torch.randn(geometry.out_channels, geometry.in_channels, kh, kw, generator=generator)
    x = torch.randn(
        geometry.batch, geometry.in_channels, geometry.height, geometry.width, generator=generator
    )
    bias = torch.randn(geometry.out_channels, generator=generator)
    weight, x, bias = (tensor.to(device, dtype) for tensor in (weight, x, bias))
    functions = {f"dense {layout}": call for layout, call in _dense_calls(geometry, x, weight, bias).items()}
    for name in backends:
        functions[name] = _sparse_call(layer, name, x, weight, bias)
    found = time_paired(functions, rounds=rounds, warmup=2, device=device)
    times = {name: found[name].median_us for name in backends}
    times["dense"] = min(t.median_us for name, t in found.items() if name.startswith("dense "))
    return times


def _dense_calls(
    geometry: ConvGeometry, x: Tensor, weight: Tensor, bias: Tensor
) -> dict[str, Callable[[], Tensor]]:
    top, bottom, left, right = geometry.padding
    calls: dict[str, Callable[[], Tensor]] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        a, w = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
        if (top, left) == (bottom, right):
            border = (top, left)
        else:
            a, border = F.pad(a, (left, right, top, bottom)).contiguous(memory_format=layout), (0, 0)

        def call(a: Tensor = a, w: Tensor = w, border: tuple[int, int] = border) -> Tensor:
            return F.conv2d(a, w, bias, geometry.stride, border, geometry.dilation).relu_()

        calls[str(layout)] = call
    return calls


def _sparse_call(
    layer: LayerPlan, backend: str, x: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], Tensor]:
    geometry = layer.topology.geometry
    packed = pack(layer, weight, x.dtype, x.device, backend)
    layout = "channels_last" if x.device.type == "cuda" else "contiguous"
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        return torch.ops.lhc.grouped_conv2d(
            x, packed.weight, packed.tables, bias, None, None, geometry.out_channels, geometry.kernel,
            geometry.stride, geometry.padding, geometry.dilation, "relu", "none", layout, backend, [],
        )  # fmt: skip

    return call
