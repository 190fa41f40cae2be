"""The layers that ``lhc-triton tune`` tunes: a network's, or those of the benchmarks under random masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lhc_bench.measure.cases import LayerCase, batch_of, eligible_cases
from lhc_bench.measure.masks import random_mask
from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.planner import plan_layer
from lhc_triton.planning.schema import ConvGeometry, LayerPlan, LayerTopology, Tile
from lhc_triton.runtime.choosing.tuning_jobs import Job

TUNING_SUITES = ("standard",)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DENSITIES = (0.1, 0.2, 0.5)
TILE_WIDTHS = (128, 64, 16)
IN_BLOCK, OUT_BLOCK = 32, 16


def compute_type(name: str) -> torch.dtype:
    """Return the dtype of a name; ValueError for one that Triton's kernels are not tuned for."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not known to the tuner; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def network_jobs(plan: Plan) -> tuple[Job, ...]:
    """Return the jobs of a planned network, with the choice against dense; ValueError where there is none."""
    if not plan.layers:
        raise ValueError("no layer of the network has a learned or sparse topology: there is nothing to tune")
    dtype = compute_type(plan.dtype)
    return tuple(Job(layer, dtype, choose=True) for layer in plan.layers)


def suite_jobs(name: str, dtype: torch.dtype, batch: int | None = None) -> tuple[Job, ...]:
    """Return the jobs of a suite, those that most networks gain from first, so that a budget may cut it.

    Args:
        name: one of `TUNING_SUITES`.
        dtype: of the activations.
        batch: images; by default those of the GPU benchmarks, 64 (ImageNet) and 256 (CIFAR).

    Returns:
        For each density, the 3x3 layers of VGG16 and the ResNets, the commonest first, as the planner tiles
        them in whole networks (blocks of 32x16), and with patterns shared by exactly 128, 64 and 16 filters.

    Raises:
        ValueError: the suite is not known, or the batch is below 1.
    """
    if name not in TUNING_SUITES:
        raise ValueError(f"suite {name!r} is not known; choose one of {', '.join(TUNING_SUITES)}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    return tuple(Job(layer, dtype) for layer in _layers(dtype, batch))


def _layers(dtype: torch.dtype, batch: int | None) -> Iterator[LayerPlan]:
    counts: dict[ConvGeometry, int] = {}
    names: dict[ConvGeometry, str] = {}
    for case in eligible_cases():
        geometry = case.geometry(batch or batch_of(case.model, "cuda"))
        counts[geometry] = counts.get(geometry, 0) + case.count
        names.setdefault(geometry, case.name)
    cases = [(names[geometry], geometry) for geometry in sorted(counts, key=lambda g: -counts[g])]
    cost, compute = CostModel.for_device("cuda"), str(dtype).removeprefix("torch.")
    for density in DENSITIES:
        for name, geometry in cases:
            topology = _topology(name, geometry, density, OUT_BLOCK)
            yield plan_layer(topology, cost, backend="triton", dtype=compute)
        for width in TILE_WIDTHS:
            for name, geometry in cases:
                if width <= geometry.out_channels:
                    yield shared_plan(name, geometry, density, width)


def _topology(
    name: str, geometry: ConvGeometry, density: float, out_block: int, in_block: int = IN_BLOCK
) -> LayerTopology:
    channels = (geometry.out_channels, geometry.in_channels)
    mask = random_mask(*channels, geometry.kernel, density, in_block, out_block)
    return LayerTopology.from_mask(name, geometry, in_block, out_block, mask)


def shared_plan(name: str, geometry: ConvGeometry, density: float, width: int) -> LayerPlan:
    """Plan a layer whose patterns are shared by ``width`` filters each: every group is a tile of its own."""
    return tiles_of_groups(_topology(name, geometry, density, width))


def tiles_of_groups(topology: LayerTopology, backend: str = "triton") -> LayerPlan:
    """Plan a layer without any union: each group of filters is a tile of its own, the longest first."""
    tiles = [Tile((group,), topology.pattern_of(group)) for group in range(topology.groups)]
    longest_first = tuple(sorted(tiles, key=lambda tile: -len(tile.entries)))
    width = topology.out_block
    return LayerPlan(topology, longest_first, width, backend, f"patterns shared by {width} filters")


def measured_jobs(
    cases: Sequence[LayerCase],
    blocks: Sequence[tuple[int, int]],
    densities: Sequence[float],
    device: str,
    dtype: torch.dtype,
) -> tuple[Job, ...]:
    """Return a job for each layer that a suite of these cases measures, as planned and without a union."""
    cost, compute = CostModel.for_device(device, "triton"), str(dtype).removeprefix("torch.")
    jobs = []
    for density in densities:
        for case in cases:
            geometry = case.geometry(batch_of(case.model, device))
            for in_block, out_block in blocks:
                topology = _topology(case.name, geometry, density, out_block, in_block)
                jobs.append(Job(tiles_of_groups(topology), dtype))
                jobs.append(Job(plan_layer(topology, cost, backend="triton", dtype=compute), dtype))
    return tuple(jobs)
