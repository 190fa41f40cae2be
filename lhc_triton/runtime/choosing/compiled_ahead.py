"""Configs of many layers compiled by all cores, while the GPU measures those that are ready."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

import torch

from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.launch_configs import config_name, planned, precision
from lhc_triton.runtime.choosing.layer_tuner import LIMIT, Bench, Benches, Config, GpuBench, full_bucket
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.choosing.tuning_jobs import Job, distinct

if TYPE_CHECKING:
    from lhc_kernels.prepared import Signature

JOBS_AHEAD = 8
"""Layers whose configs are compiled or wait for that; to list those of a whole suite would take a while."""

MOST_SPILLED = 256
"""Bytes of a thread on the stack from which on a config is not worth a measurement."""


@contextmanager
def compiled_ahead(
    jobs: Sequence[Job],
    device: torch.device,
    store: TimingStore,
    limit: int = LIMIT,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Benches]:
    """Have the jobs' configs compiled in their order, by worker processes.

    Args:
        jobs: as ``tuning_jobs.run_jobs`` gets them.
        device: the GPU.
        store: what has a record there is not compiled.
        limit: most candidates of a layer.
        rank: as ``run_jobs`` gets it.
        ranks: likewise; they share the cores out.

    Yields:
        What makes benches for ``run_jobs``: they wait for a config's worker before they try it. What did not
        compile, or spills more than MOST_SPILLED bytes, is recorded with the reason and not tried.
    """
    from lhc_kernels import candidate_configs
    from lhc_kernels.ahead import Compilers

    workers = max(1, len(os.sched_getaffinity(0)) // ranks)
    with Compilers(workers=workers) as compilers:
        coming = iter(distinct(jobs, device)[rank::ranks])

        def begin(count: int) -> None:
            for job in islice(coming, count):
                key, shape = planned(job.layer, job.dtype, device)
                known = store.get(key)
                layer = full_bucket(job.layer, shape.pixels)
                compilers.begin(
                    launch_signature(layer, job.dtype, device, config.to_list())
                    for config in candidate_configs(shape, limit, precision(shape.dtype))
                    if config_name(config.to_list()) not in known
                )

        begin(JOBS_AHEAD)

        def bench(layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> Bench:
            begin(1)

            def compiled(config: Config) -> None:
                found = compilers.wait(launch_signature(layer, dtype, device, config))
                if found.problem:
                    raise RuntimeError(found.problem)
                if found.stack_bytes > MOST_SPILLED:
                    raise RuntimeError(f"it spills {found.stack_bytes} bytes a thread")

            return GpuBench(layer, dtype, device, compiled)

        yield bench


def launch_signature(layer: LayerPlan, dtype: torch.dtype, device: torch.device, config: Config) -> Signature:
    """Return the signature under which `workload.Workload` launches a layer: with a bias and ReLU."""
    from lhc_kernels.launch import limits
    from lhc_kernels.prepared import Signature

    topology = layer.topology
    g = topology.geometry
    entries = sum(len(tile.entries) for tile in layer.tiles)
    tiles = len(layer.tiles)
    sizes = ((tiles + 1,), (entries + 1,), (tiles, layer.tile_width))
    return Signature(
        x=((g.batch, g.in_channels, g.height, g.width), dtype),
        weight=((entries, topology.in_block, layer.tile_width), dtype),
        tables=tuple((size, torch.int32) for size in sizes),
        bias=((g.out_channels,), dtype),
        residual=None,
        scale=None,
        out=None,
        out_channels=g.out_channels,
        kernel_size=g.kernel,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        activation="relu",
        config=tuple(config),
        limits=limits(device),
    )
