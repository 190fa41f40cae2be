"""Fitting a cost model to the machine at hand: probe layers, measured once and kept in the store."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.planner import plan_layer
from lhc_triton.planning.schema import ConvGeometry, LayerPlan, LayerTopology
from lhc_triton.runtime.choosing.dispatch import auto_backend
from lhc_triton.runtime.choosing.launch_configs import deterministic
from lhc_triton.runtime.choosing.timing import geometric_mean, time_paired
from lhc_triton.runtime.choosing.timing_store import TimingStore, code_version, device_name
from lhc_triton.runtime.choosing.workload import Workload
from lhc_triton.tf32 import tf32_allowed

# Channels in, filters, image side, kernel side: a wide image, a small one, and a 1x1 layer.
PROBES = ((64, 64, 56, 3), (256, 256, 14, 3), (256, 128, 28, 1))
DENSITY = 0.2
BLOCK = (32, 16)
ROUNDS = 15
BUDGET_S = 0.3  # for each probe


def cost_model(
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    tune: str = "cached",
    store: TimingStore | None = None,
) -> CostModel:
    """Return the cost model that prices a backend on this machine.

    On the CPU, whose kinds differ most, it is fitted to the machine: the first time, probe layers are
    measured for less than a second, and their times are stored.

    Args:
        backend: its name; "auto" stands for the sparse backend that would be taken here.
        dtype: of the activations.
        device: where they lie.
        tune: "off" takes the model as it ships.
        store: measured times; default the user's.

    Raises:
        ValueError: for a device kind or a dtype without a model.
    """
    if backend == "auto":
        backend = auto_backend(dtype, device) or backend
    cost = CostModel.for_device(device.type, backend, tf32_allowed())
    if device.type != "cpu" or tune == "off" or deterministic():
        return cost
    return calibrated(cost, dtype, store or TimingStore())


def calibrated(cost: CostModel, dtype: torch.dtype, store: TimingStore) -> CostModel:
    """Scale a model of the CPU by the ratio of measured to predicted times of the probe layers."""
    name = str(dtype).removeprefix("torch.")
    priced = "float32" if dtype == torch.int8 else name  # int8 is told by its factor, dense stays in float32
    cpu = torch.device("cpu")
    here, code = device_name(cpu), code_version(cpu)
    ratios: dict[str, list[float]] = {"dense": [], cost.sparse_backend: []}
    for plan in (_probe(probe, cost, priced) for probe in PROBES):
        key = f"calibration | {here} | {code} | {name} | {cost.sparse_backend} | {plan.name}"
        times = {k: us for k, us in store.get(key).items() if k in ratios and not isinstance(us, str)}
        if len(times) < len(ratios):
            times = _measured(plan, cost.sparse_backend, dtype)
            try:
                store.put(key, times)
            except OSError as error:
                warnings.warn(f"the calibration of the CPU is not kept: {error}", stacklevel=4)
        for backend, found in ratios.items():
            found.append(times[backend] / plan.predicted_us[backend])
    dense, sparse = (geometric_mean(found) for found in ratios.values())
    return cost.scaled(dense, sparse, f"calibrated on {here}")


def _probe(probe: tuple[int, int, int, int], cost: CostModel, dtype: str) -> LayerPlan:
    channels, filters, side, kernel = probe
    geometry = ConvGeometry(1, channels, filters, side, side, (kernel, kernel), padding=(kernel // 2,) * 4)
    grid = (filters // BLOCK[1], channels // BLOCK[0], kernel, kernel)
    mask = np.random.default_rng(0).random(grid) < DENSITY
    topology = LayerTopology.from_mask("x".join(map(str, probe)), geometry, *BLOCK, mask)
    return plan_layer(topology, cost, backend=cost.sparse_backend, dtype=dtype)


def _measured(plan: LayerPlan, backend: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the least time of each: what is kept must not hold a busy moment."""
    workload = Workload(plan, dtype, torch.device("cpu"))
    calls = {"dense": workload.dense(), backend: workload.sparse(backend)}
    times = time_paired(calls, rounds=ROUNDS, warmup=2, budget_s=BUDGET_S)
    return {name: min(timing.samples_us) for name, timing in times.items()}
