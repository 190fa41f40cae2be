"""Who runs a layer: the cost model's choice, a stored measurement, or a new one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from lhc_triton.errors import one_line
from lhc_triton.planning.backends import BACKENDS, for_auto
from lhc_triton.planning.cost import CostModel, itemsize_of
from lhc_triton.planning.planner import price_tiles
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.cold_timing import time_cold
from lhc_triton.runtime.choosing.launch_configs import deterministic, launch_key, look_up
from lhc_triton.runtime.choosing.layer_tuner import tune_layer
from lhc_triton.runtime.choosing.timing import time_paired
from lhc_triton.runtime.choosing.timing_store import TimingStore, layer_key
from lhc_triton.runtime.choosing.workload import Workload
from lhc_triton.runtime.op.backends import unavailable
from lhc_triton.tf32 import tf32_allowed

CLEARLY = 1.03
"""How many times as fast as dense a sparse backend must be measured: nearer times are noise."""

ROUNDS = 9
BUDGET_S = 0.3
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Tune = Literal["off", "cached", "full"]
TUNES: tuple[str, ...] = get_args(Tune)


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
    measured_us: Mapping[str, float] = field(default_factory=dict)

    @property
    def time_us(self) -> float | None:
        """The measured time of the backend, or None."""
        return self.measured_us.get(self.backend)


def auto_backend(dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return the sparse backend that "auto" sets against dense on this device; None if there is none."""
    names = [backend.name for backend in for_auto(torch.device(device).type)]
    return next((name for name in names if unavailable(name, dtype, device) is None), None)


def passed_over(dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Say why "auto" does without the device's fastest sparse backend; None if it has it here.

    None, too, where that backend does not serve the type at all: nothing is amiss then.
    """
    best = next(iter(for_auto(torch.device(device).type)), None)
    if best is None or str(dtype).removeprefix("torch.") not in best.dtypes:
        return None
    return unavailable(best.name, dtype, device)


def supports(backend: str, layer: LayerPlan, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Say why a backend cannot run a layer in this type on this device; None if it can ("dense" always)."""
    return None if backend == "dense" else unavailable(backend, dtype, device)


def backend_status(device: torch.device | str) -> list[dict[str, str]]:
    """Tell, for people, what each backend does on a device.

    Returns:
        One {"backend", "state"} per backend, "dense" first.
    """
    device = torch.device(device)
    rows = [{"backend": "dense", "state": 'available; "auto" takes it where no sparse backend is faster'}]
    for name in BACKENDS:
        reasons = {dtype: unavailable(name, dtype, device) for dtype in FLOATS}
        able = [str(dtype).removeprefix("torch.") for dtype, reason in reasons.items() if reason is None]
        if not able:
            state = next(iter(reasons.values())) or ""
        elif name in {auto_backend(dtype, device) for dtype in FLOATS}:
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
            measures what is not stored, on random data of the planned shapes, and stores it; the launch
            configs of Triton's kernels are tuned before. LHC_TRITON_DETERMINISTIC=1 makes it "off".
        store: measured times; default the user's.
        candidates: backends to choose from, "dense" always among them; by default that of ``auto_backend``.

    Raises:
        ValueError: for an unknown ``tune``.
    """
    if tune not in TUNES:
        raise ValueError(f"tune is {tune!r}; supported are {', '.join(TUNES)}")
    device = torch.device(device)
    if deterministic():
        tune = "off"
    if candidates is None:
        taken = auto_backend(dtype, device)
        candidates = [b.name for b in for_auto(device.type)] if taken is None else [taken]
    reasons = {name: supports(name, layer, dtype, device) for name in candidates if name != "dense"}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        return Decision("dense", next(iter(reasons.values()), None) or "no sparse backend for the device")
    times = {} if tune == "off" else _times(layer, dtype, device, able, tune, store or TimingStore())
    if times:
        fastest = min(able, key=lambda name: times[name])
        ratio = times["dense"] / times[fastest]
        best = fastest if ratio > CLEARLY else "dense"
        return Decision(best, f"measured: {fastest} has {ratio:.2f}x the speed of dense", times)
    if supports(layer.backend, layer, dtype, device) is not None:
        # Planned for a backend that is not to be had here: the same tiles, priced for the one that is.
        itemsize = itemsize_of(str(dtype).removeprefix("torch."))
        cost = CostModel.for_device(device.type, able[0], tf32_allowed())
        layer = price_tiles(layer.topology, layer.tiles, layer.tile_width, cost, itemsize)
    return Decision(layer.backend, layer.reason)


def decide(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device,
    tune: str = "cached",
    requested: str = "auto",
) -> Decision:
    """Choose who runs a planned layer; ValueError where a forced backend cannot."""
    if requested == "auto":
        return choose_backend(layer, dtype, device, tune)
    reason = supports(requested, layer, dtype, device)
    if reason is not None:
        raise ValueError(f"layer {layer.name!r} cannot run on the forced backend {requested!r}: {reason}")
    if tune == "full" and requested != "dense" and BACKENDS[requested].has_configs:
        launch_config(layer, dtype, device, tune)  # stores what the layer will look up
    return Decision(requested, "forced")


def known_times(
    layers: Sequence[LayerPlan],
    dtype: torch.dtype,
    device: torch.device | str,
    store: TimingStore | None = None,
) -> dict[str, dict[str, float]]:
    """Return the stored times in us by layer and backend, "dense" among them. Nothing is built or measured.

    Args:
        layers: planned ones, with their names.
        dtype: of the activations.
        device: of the activations; a GPU has to be there.
        store: measured times; default the user's.
    """
    device, store = torch.device(device), store or TimingStore()
    records, found = store.read(), {}
    for layer in layers:
        times: dict[str, float] = {}
        for backend in for_auto(device.type):
            key = layer_key(layer, dtype, device)
            if backend.has_configs:
                key = f"{key} | {launch_key(launch_config(layer, dtype, device, store=store))}"
            times |= {n: us for n, us in records.get(key, {}).items() if isinstance(us, int | float)}
        found[layer.name] = times
    return found


def _times(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device,
    backends: list[str],
    tune: str,
    store: TimingStore,
) -> dict[str, float]:
    """Return the time of each backend and of dense: stored, or measured if asked for, or nothing."""
    key, configs = layer_key(layer, dtype, device), {}
    for name in backends:
        if BACKENDS[name].has_configs:
            configs[name] = launch_config(layer, dtype, device, tune, store)
            key = f"{key} | {launch_key(configs[name])}"
    stored = store.get(key)
    wanted = (*backends, "dense")
    found = {name: stored.get(name) for name in wanted}
    times = {name: time for name, time in found.items() if isinstance(time, int | float)}
    if len(times) == len(wanted) or tune != "full":
        return times if len(times) == len(wanted) else {}
    # All of them anew, and not only what is missing: only times of one run compare fairly.
    try:
        times = measure(layer, dtype, device, backends, configs)
        store.put(key, times)
    except RuntimeError as error:
        # The plan's choice stands; accelerate runs the layer, and puts back what does not work.
        warnings.warn(f"layer {layer.name!r} is not timed: {one_line(error)}", stacklevel=3)
        return {}
    except OSError as error:
        warnings.warn(f"measured times are not kept: {error}", stacklevel=3)
    return times


def launch_config(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device,
    tune: str = "cached",
    store: TimingStore | None = None,
) -> tuple[int, ...]:
    """Return the Triton kernels' launch config at a layer's planned sizes; tune="full" tunes it first."""
    store = store or TimingStore()
    if tune == "full" and device.type == "cuda":
        try:
            tune_layer(layer, dtype, device, store)
        except OSError as error:
            warnings.warn(f"tuned configs are not kept: {error}", stacklevel=3)
    geometry = layer.topology.geometry
    size = (geometry.out_height, geometry.out_width)
    return look_up(layer, dtype, device, geometry.out_pixels, size, tune=tune, store=store).config


def measure(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device | str,
    backends: Sequence[str],
    configs: Mapping[str, Sequence[int]] | None = None,
    rounds: int = ROUNDS,
    budget_s: float | None = BUDGET_S,
) -> dict[str, float]:
    """Time a layer with bias and ReLU on random data of its planned shapes.

    The backends and the dense convolution run interleaved; on a GPU in CUDA graphs, with a cold L2 cache.

    Args:
        layer: the plan.
        dtype: of the activations.
        device: where to measure.
        backends: sparse backends to time beside dense.
        configs: launch config by backend; a backend without one takes its own.
        rounds: samples of each.
        budget_s: seconds after which no further round begins; see ``timing.time_paired``.

    Returns:
        Median microseconds by backend name, "dense" among them.
    """
    device = torch.device(device)
    work = Workload(layer, dtype, device)
    calls = {name: work.sparse(name, (configs or {}).get(name, ())) for name in backends}
    calls["dense"] = work.dense()
    if device.type == "cuda":
        return time_cold(calls, device, rounds)
    timings = time_paired(calls, rounds=rounds, warmup=2, device=device, budget_s=budget_s)
    return {name: timing.median_us for name, timing in timings.items()}
