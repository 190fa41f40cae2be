"""Measures the launch configs of one layer, and stores one record for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from lhc_triton.errors import one_line
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.cold_timing import ColdTimer
from lhc_triton.runtime.choosing.launch_configs import config_name, planned, precision
from lhc_triton.runtime.choosing.timing import race
from lhc_triton.runtime.choosing.timing_store import Measured, TimingStore
from lhc_triton.runtime.choosing.workload import Workload
from lhc_triton.runtime.op.accuracy import layer_tolerance, strict_error

ROUNDS = 15
MARGIN = 1.15
"""A config this much slower than the fastest after the first rounds is dropped."""

LIMIT = 12

Config = Sequence[int]
Sampler = Callable[[], float]
Keep = Callable[[dict[str, Measured]], None]


class Bench(Protocol):
    """Where the configs of one layer are tried; the tests have one with recorded times."""

    def prepare(self, config: Config) -> Sampler:
        """Compile a config, check its result, and return what takes one sample in us; raises if it fails."""

    def check(self) -> None:
        """Raise if the device itself is lost, and no further config can be tried in this process."""


Benches = Callable[[LayerPlan, torch.dtype, torch.device], Bench]


@dataclass(frozen=True)
class Tuned:
    """What tuning one layer came to.

    Attributes:
        key: where its records are in the store.
        timed: configs that were measured now.
        failed: configs that failed or gave a wrong result now.
        left: candidates without a record, because time or memory did not suffice.
    """

    key: str
    timed: int
    failed: int
    left: int


class GpuBench:
    """Runs a layer's configs on its GPU; see `Bench`.

    Args:
        layer, dtype, device: what is measured, and where.
        compiled: returns once a config is compiled; raises if it cannot be, or not well.
    """

    def __init__(
        self,
        layer: LayerPlan,
        dtype: torch.dtype,
        device: torch.device,
        compiled: Callable[[Config], None] = lambda config: None,
    ) -> None:
        self._compiled = compiled
        self._work = Workload(layer, dtype, device)
        self._expected = self._work.expected()
        self._tolerance = layer_tolerance(dtype, device)
        self._timer = ColdTimer(device)
        self._device = device

    def prepare(self, config: Config) -> Sampler:
        """See `Bench`."""
        self._compiled(config)
        call = self._work.sparse("triton", config)
        geometry = self._work.layer.topology.geometry
        # The allocator hands the same memory out again: what a kernel forgets to write would look right.
        stale = self._work.x.new_full((geometry.out_values,), math.nan)
        del stale
        with torch.inference_mode():
            y = call()
            error = strict_error(y[:1], self._expected)
            whole = bool(torch.isfinite(y).all())
        if not (error <= self._tolerance and whole):
            raise ArithmeticError(f"wrong result: norm error {error:.1e}" if whole else "wrong result: NaN")
        return self._timer.sampler(call)

    def check(self) -> None:
        """See `Bench`."""
        torch.cuda.synchronize(self._device)


def tune_layer(
    layer: LayerPlan,
    dtype: torch.dtype,
    device: torch.device,
    store: TimingStore,
    *,
    limit: int = LIMIT,
    deadline: float = math.inf,
    benches: Benches = GpuBench,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Measure the configs of a layer that have no record yet, and store their records.

    Measured is the largest batch whose output pixels fit into the bucket of the planned batch, so that times
    from several runs of one bucket compare. The candidates are sampled interleaved; one that is clearly
    slower leaves early, and one that fails or computes something else is recorded with the reason. Neither is
    tried again.

    Args:
        layer: the plan.
        dtype: of the activations.
        device: the GPU.
        store: has the records, and gets the new ones.
        limit: most candidates.
        deadline: on the clock; after it no further config is compiled, those that are ready are timed still.
        benches: makes the place where configs are tried.
        clock: seconds.

    Raises:
        RuntimeError: a CUDA graph is being captured; or the device is lost, after the config at fault has
            been recorded.
        OSError: the store cannot be written.
    """
    from lhc_kernels import candidate_configs

    refuse_in_capture()
    key, shape = planned(layer, dtype, device)
    known = store.get(key)
    todo = {
        config_name(c.to_list()): c.to_list() for c in candidate_configs(shape, limit, precision(shape.dtype))
    }
    todo = {name: config for name, config in todo.items() if name not in known}
    if not todo:
        return Tuned(key, 0, 0, 0)
    bench, keep = benches(full_bucket(layer, shape.pixels), dtype, device), partial(store.put, key)
    samplers, records = _prepare(bench, todo, lambda: clock() < deadline, keep)
    raced = race(samplers, ROUNDS, MARGIN)
    if any(isinstance(record, str) for record in raced.values()):
        _stop_if_lost(bench, keep, {n: record for n, record in raced.items() if not isinstance(record, str)})
    records |= raced
    if records:
        keep(records)
    failed = sum(isinstance(record, str) for record in records.values())
    return Tuned(key, len(records) - failed, failed, len(todo) - len(records))


def full_bucket(layer: LayerPlan, bucket: int) -> LayerPlan:
    """Return the plan for the largest batch that has no more output pixels than the bucket."""
    topology = layer.topology
    batch = bucket // (topology.geometry.out_height * topology.geometry.out_width)
    geometry = replace(topology.geometry, batch=max(1, batch))
    return replace(layer, topology=replace(topology, geometry=geometry))


def refuse_in_capture() -> None:
    """Raise RuntimeError while the current stream captures a CUDA graph: measuring would break it."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "kernels cannot be tuned inside a CUDA graph capture: run `lhc-triton tune`, or "
            'accelerate(..., tune="full"), and the network once on its input, before the capture'
        )


def _prepare(
    bench: Bench, configs: Mapping[str, Config], in_time: Callable[[], bool], keep: Keep
) -> tuple[dict[str, Sampler], dict[str, Measured]]:
    """Return the samplers of the configs that work, and the reasons of those that do not."""
    samplers: dict[str, Sampler] = {}
    failed: dict[str, Measured] = {}
    for name, config in configs.items():
        if not in_time():
            break
        try:
            samplers[name] = bench.prepare(config)
        except torch.OutOfMemoryError:
            continue  # this is about the machine as it is now, and may be otherwise another time
        except Exception as error:  # a config may fail in any way: to compile, to launch, to compute
            failed[name] = one_line(error)
            _stop_if_lost(bench, keep, failed)
    return samplers, failed


def _stop_if_lost(bench: Bench, keep: Keep, records: dict[str, Measured]) -> None:
    """Raise if the device is lost: whatever came next would fail as well, and be recorded for it."""
    try:
        bench.check()
    except Exception as error:
        keep(records)
        raise RuntimeError(
            f"the GPU is lost since a kernel config failed ({one_line(error)}); start again: "
            "what is recorded is not tried again"
        ) from error
