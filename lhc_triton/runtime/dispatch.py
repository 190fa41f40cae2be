"""Who runs a layer: the cost model's choice, a stored measurement, or a new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import lhc_triton.runtime.ops  # noqa: F401  (registers torch.ops.lhc)
from lhc_triton.planning.plan import ConvGeometry, LayerPlan
from lhc_triton.runtime.backends import BACKENDS, FLOATS, unavailable
from lhc_triton.runtime.epilogue import LAYOUTS, MEMORY_FORMATS
from lhc_triton.runtime.packing import pack
from lhc_triton.runtime.store import TimingStore, layer_key
from lhc_triton.runtime.timing import time_paired

AUTO_BACKENDS = {"cpu": ("torch",), "cuda": ("triton",)}
"""The sparse backends that "auto" considers on each device kind."""

ROUNDS = 9
BUDGET_S = 0.3
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


def backend_status(device: torch.device | str) -> list[dict[str, str]]:
    """Tell, for people, what each backend does on a device.

    Returns:
        One {"backend", "state"} per backend, "dense" first.
    """
    device = torch.device(device)
    auto = AUTO_BACKENDS.get(device.type, ())
    rows = [{"backend": "dense", "state": 'available; "auto" takes it where no sparse backend is faster'}]
    for name in (*BACKENDS, "native"):
        reasons = {dtype: unavailable(name, dtype, device) for dtype in FLOATS}
        able = [str(dtype).removeprefix("torch.") for dtype, reason in reasons.items() if reason is None]
        if not able:
            state = next(iter(reasons.values())) or ""
        elif name in auto:
            state = f'available for {", ".join(able)}; "auto" takes it where it is faster than dense'
        else:
            state = f"available for {', '.join(able)}; only on request"
        rows.append({"backend": name, "state": state})
    return rows


def choose_backend(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device | str,
    tune: str = "cached",
    store: TimingStore | None = None,
    candidates: Sequence[str] | None = None,
) -> Decision:
    """Choose between dense and the sparse backends; a sparse one only where it is faster than dense.

    Args:
        layer: the plan; its backend and reason are the cost model's choice.
        dtype: of the activations.
        device: of the activations.
        tune: "off" takes the plan's choice; "cached" a stored measurement where there is one; "full"
            measures what is not stored, on random data of the planned shapes, and stores it.
        store: measured times; default the user's.
        candidates: backends to choose from, "dense" always among them; default those of "auto" on the device.

    Raises:
        ValueError: for an unknown ``tune``.
    """
    if tune not in TUNES:
        raise ValueError(f"tune is {tune!r}; supported are {', '.join(TUNES)}")
    device = torch.device(device)
    if candidates is None:
        candidates = AUTO_BACKENDS.get(device.type, ())
    reasons = {name: supports(name, layer, dtype, device) for name in candidates if name != "dense"}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        return Decision("dense", next(iter(reasons.values()), None) or "no sparse backend for the device", {})
    times = {} if tune == "off" else _times(layer, dtype, device, able, tune, store or TimingStore())
    if times:
        fastest = min(able, key=lambda name: times[name])
        ratio = times["dense"] / times[fastest]
        # Equal times go to dense: it has the simpler code behind it.
        best = fastest if ratio > 1 else "dense"
        return Decision(best, f"measured: {fastest} has {ratio:.2f}x the speed of dense", times)
    if supports(layer.backend, layer, dtype, device) is None:
        return Decision(layer.backend, layer.reason, {})
    return Decision("dense", supports(layer.backend, layer, dtype, device) or "", {})


def _times(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device,
    backends: list[str],
    tune: str,
    store: TimingStore,
) -> dict[str, float]:
    """Return the time of each backend and of dense: stored, or measured if asked for, or nothing."""
    key = layer_key(layer, dtype, device)
    stored = store.get(key)
    wanted = (*backends, "dense")
    if all(name in stored for name in wanted):
        return {name: stored[name] for name in wanted}
    if tune != "full":
        return {}
    # All of them anew, and not only what is missing: only times of one run compare fairly.
    times = measure(layer, dtype, device, backends)
    try:
        store.put(key, times)
    except OSError as error:
        warnings.warn(f"measured times are not kept: {error}", stacklevel=3)
    return times


def measure(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device | str,
    backends: Sequence[str],
    rounds: int = ROUNDS,
    budget_s: float | None = BUDGET_S,
) -> dict[str, float]:
    """Time a layer with bias and ReLU on random data of its planned shapes.

    Each backend and the dense convolution run in both memory formats, interleaved; the faster one counts.

    Args:
        layer: the plan.
        dtype: of the activations.
        device: where to measure.
        backends: sparse backends to time beside dense.
        rounds: samples of each.
        budget_s: seconds after which no further round begins; see ``timing.time_paired``.

    Returns:
        Median microseconds by backend name, "dense" among them.
    """
    geometry, device = layer.topology.geometry, torch.device(device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    weight = random(geometry.out_channels, geometry.in_channels, *geometry.kernel)
    x = random(geometry.batch, geometry.in_channels, geometry.height, geometry.width)
    bias = random(geometry.out_channels)
    layouts = ("channels_last",) if device.type == "cuda" else LAYOUTS
    functions = {}
    for layout in layouts:
        functions["dense", layout] = _dense_call(geometry, layout, x, weight, bias)
        for name in backends:
            functions[name, layout] = _sparse_call(layer, name, layout, x, weight, bias)
    calls = {" ".join(key): call for key, call in functions.items()}
    found = time_paired(calls, rounds=rounds, warmup=2, device=device, budget_s=budget_s)
    return {
        name: min(found[f"{name} {layout}"].median_us for layout in layouts) for name in (*backends, "dense")
    }


def _dense_call(
    geometry: ConvGeometry, layout: str, x: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], Tensor]:
    memory_format = MEMORY_FORMATS[layout]
    top, bottom, left, right = geometry.padding
    border = (top, left)
    if (top, left) != (bottom, right):
        x, border = F.pad(x, (left, right, top, bottom)), (0, 0)
    x, weight = x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)
    return lambda: F.conv2d(x, weight, bias, geometry.stride, border, geometry.dilation).relu_()


def _sparse_call(
    layer: LayerPlan, backend: str, layout: str, x: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], Tensor]:
    geometry = layer.topology.geometry
    packed = pack(layer, weight, x.dtype, x.device, backend)
    x = x.contiguous(memory_format=MEMORY_FORMATS[layout])
    return lambda: torch.ops.lhc.grouped_conv2d(
        x, packed.weight, packed.tables, bias, None, None, geometry.out_channels, geometry.kernel,
        geometry.stride, geometry.padding, geometry.dilation, "relu", "none", layout, backend, [],
    )  # fmt: skip
