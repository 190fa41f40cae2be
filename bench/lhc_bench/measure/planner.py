"""How good the planner is, and how fast: predicted times of its tiles beside those of other ways to tile."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from lhc_bench.files import check_writable
from lhc_bench.measure.planner_problems import IN_BLOCK, TOPOLOGIES, PlannerCase, planner_cases
from lhc_bench.measure.planner_rivals import EXHAUSTIVE, METHODS, PLANNER, applies
from lhc_bench.measure.rows import check_fields, environment, read_document, read_rows, write_document
from lhc_bench.measure.setting import Progress, Request
from lhc_triton.planning.cost import COST_MODELS, CostModel, itemsize_of
from lhc_triton.planning.planner import choose_tiles
from lhc_triton.planning.schema import LayerPlan, LayerTopology
from lhc_triton.runtime.choosing.timing import geometric_mean

SUITE = "planner"
DENSITIES = (0.05, 0.1, 0.2, 0.5)
DTYPES = {"cpu": "float32", "cuda": "float16"}
BRIEF_MS, REPEATS = 200.0, 3  # the planner's work, and what is shorter, is repeated; the median is kept
WIDE, NETWORK = 2048, "resnet50-imagenet"
AIMS_MS = {f"a layer of {WIDE:,} filters": 2000.0, "ResNet50, all layers behind the first": 1000.0}
_POSITIVE = (
    "batch", "in_channels", "out_channels", "height", "width", "density", "in_block", "out_block", "groups",
    "patterns", "tiles", "predicted_us", "predicted_dense_us", "predicted_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class PlannerRow:
    """The tiles that one method forms for a layer, or for the layers of a network, and what they cost.

    Attributes:
        case: what was planned, for example "vgg16-imagenet/conv3_2".
        model, layer: its parts; the layer of a whole network is "all".
        device: the device kind that is planned for, "cpu" or "cuda".
        cost_model: the backend whose cost model predicts.
        dtype: compute type.
        batch, in_channels, out_channels, height, width: N, I, O, H, W of the input; a network's first layer's
            inputs and last layer's filters.
        kernel, stride: of the square convolution; 0 for a whole network.
        topology: one of `planner_problems.TOPOLOGIES`.
        density: live share of the weights that was reached.
        in_block, out_block: input channels and filters that share one mask bit.
        groups, patterns: filter groups, and distinct patterns among them; a network's sums.
        method: one of `planner_rivals.METHODS`.
        tile_width: filters that a tile has room for; 0 for a network, whose layers have their own.
        tiles: how many.
        waste: share of the tiles' multiply-accumulates that unions add.
        predicted_us: the cost model's time of these tiles. Nothing is run.
        predicted_dense_us: the same of the dense convolution.
        predicted_ratio: predicted_us over that of the method with the least, under the same mask.
        planning_ms: measured time of forming and pricing the tiles, one thread of Python.
        seed: of the mask.
    """

    case: str
    model: str
    layer: str
    device: str
    cost_model: str
    dtype: str
    batch: int
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    height: int
    width: int
    topology: str
    density: float
    in_block: int
    out_block: int
    groups: int
    patterns: int
    method: str
    tile_width: int
    tiles: int
    waste: float
    predicted_us: float
    predicted_dense_us: float
    predicted_ratio: float
    planning_ms: float
    seed: int

    def __post_init__(self) -> None:
        check_fields(self, _POSITIVE)
        if self.predicted_ratio < 1:
            raise ValueError(f"predicted_ratio is {self.predicted_ratio}, expected 1 or more")


@dataclass(frozen=True)
class PlannerResults:
    """What results.json holds.

    Attributes:
        env: where it was planned; see `environment`. "cost_models" says where each model's numbers come from.
        rows: see `PlannerRow`.
        summary: see `summarise_planner`.
    """

    env: dict[str, Any]
    rows: tuple[PlannerRow, ...]
    summary: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form: {"env", "rows", "summary"}."""
        return {"env": self.env, "rows": [asdict(row) for row in self.rows], "summary": self.summary}


def run_planner(
    out_dir: str | Path,
    progress: Progress = lambda done, total, label: None,
    seed: int = 0,
    densities: Sequence[float] | None = None,
    only: str = "",
    batch: int | None = None,
) -> dict[str, Any]:
    """Plan layers and networks by every method for every device, and write results.json and results.csv.

    Args:
        out_dir: folder for the results; made where it does not exist.
        progress: called with (plans made, all of them, the one that begins).
        seed: of the masks.
        densities: wanted live shares; by default `DENSITIES`.
        only: plan the cases whose names contain this.
        batch: images of a call; by default 1 on a CPU and 64 on a GPU.

    Returns:
        What results.json holds: {"env", "rows", "summary"}; see `PlannerResults`.

    Raises:
        ValueError: no case with that name, a batch below 1, a negative seed, or a density outside (0, 1];
            nothing is written then.
        OSError: if the folder cannot be written.
    """
    known, wanted = planner_cases(), tuple(DENSITIES if densities is None else densities)
    cases = [case for case in known if only in case.name]
    if not cases:
        names = "; ".join(case.name for case in known)
        raise ValueError(f"no case of suite {SUITE!r} has {only!r} in its name; the cases are {names}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if not wanted or not all(0 < density <= 1 for density in wanted):
        raise ValueError(f"densities are {wanted}; give at least one, each in (0, 1]")
    out = Path(out_dir)
    check_writable(out)

    total = len(cases) * len(wanted) * len(TOPOLOGIES) * len(COST_MODELS)
    rows: list[PlannerRow] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    done = 0
    for case in cases:
        for cost in COST_MODELS.values():
            for density in wanted:
                for kind in TOPOLOGIES:
                    progress(done, total, f"{case.name} for {cost.sparse_backend}, {kind}, {density:g}")
                    topologies = case.topologies(kind, density, cost.device, seed, batch)
                    rows += _rows(case, kind, cost, topologies, seed, left_out)
                    done += 1
    progress(total, total, "done")
    env = environment(
        suite=SUITE,
        seed=seed,
        densities=list(wanted),
        cost_models={name: cost.source for name, cost in COST_MODELS.items()},
        notes=[f"{', '.join(dict.fromkeys(where))}: {what}" for what, where in left_out.items()],
    )
    results = PlannerResults(env, tuple(rows), summarise_planner(rows)).to_dict()
    write_document(out, results, [item.name for item in fields(PlannerRow)])
    return results


@dataclass(frozen=True)
class PlannerSuite:
    """The suite "planner", as the other suites are; see `run_planner`."""

    device: str = "cpu"

    def run(self, request: Request) -> dict[str, Any]:
        """Plan, and write; see `run_planner`."""
        return run_planner(
            request.out, request.progress, request.seed, request.densities, request.only, request.batch
        )


def _rows(
    case: PlannerCase,
    kind: str,
    cost: CostModel,
    topologies: Sequence[LayerTopology],
    seed: int,
    left_out: dict[str, list[str]],
) -> list[PlannerRow]:
    """Plan a case by every method that can."""
    dtype = DTYPES[cost.device]
    itemsize = itemsize_of(dtype)
    plans, planning_ms = {}, {}
    for method in METHODS:
        if all(applies(method, topology) for topology in topologies):
            plans[method], planning_ms[method] = _plan(method, topologies, cost, itemsize)
        elif method != EXHAUSTIVE:
            left_out[f"{method!r} would take too long, and is left out"].append(case.name)
    predicted = {
        method: sum(plan.predicted_us[cost.sparse_backend] for plan in found)
        for method, found in plans.items()
    }
    first, geometry, whole = case.layers[0], topologies[0].geometry, case.layer == "all"
    shared: dict[str, Any] = {
        "case": case.name,
        "model": case.model,
        "layer": case.layer,
        "device": cost.device,
        "cost_model": cost.sparse_backend,
        "dtype": dtype,
        "batch": geometry.batch,
        "in_channels": first.in_channels,
        "out_channels": case.layers[-1].out_channels,
        "kernel": 0 if whole else first.kernel,
        "stride": 0 if whole else first.stride,
        "height": first.height,
        "width": first.width,
        "topology": kind,
        "density": sum(t.live_weights for t in topologies) / sum(t.geometry.weights for t in topologies),
        "in_block": IN_BLOCK,
        "out_block": case.out_block,
        "groups": sum(t.groups for t in topologies),
        "patterns": sum(len(t.patterns) for t in topologies),
        "predicted_dense_us": sum(cost.dense_us(t.geometry, itemsize) for t in topologies),
        "seed": seed,
    }
    live_macs = sum(topology.live_macs for topology in topologies)
    return [
        PlannerRow(
            **shared,
            method=method,
            tile_width=0 if whole else found[0].tile_width,
            tiles=sum(len(plan.tiles) for plan in found),
            waste=1 - live_macs / sum(plan.planned_macs for plan in found),
            predicted_us=predicted[method],
            predicted_ratio=predicted[method] / min(predicted.values()),
            planning_ms=planning_ms[method],
        )
        for method, found in plans.items()
    ]


def _plan(
    method: str, topologies: Sequence[LayerTopology], cost: CostModel, itemsize: int
) -> tuple[list[LayerPlan], float]:
    """Tile every layer by a method, and return the plans with the time that took."""
    times: list[float] = []
    while not times or (len(times) < REPEATS and (method == PLANNER or times[0] < BRIEF_MS)):
        start = time.perf_counter()
        tiled = [choose_tiles(topology, cost, itemsize, METHODS[method]) for topology in topologies]
        times.append((time.perf_counter() - start) * 1e3)
    plans = [
        LayerPlan(topology, tiles, width, cost.sparse_backend, method, {cost.sparse_backend: predicted_us})
        for topology, (width, tiles, predicted_us) in zip(topologies, tiled, strict=True)
    ]
    return plans, statistics.median(times)


def summarise_planner(rows: Sequence[PlannerRow]) -> dict[str, Any]:
    """Sum rows up.

    Returns:
        {"methods", "optimum", "aims"}. "methods": for each cost model and method the geometric means of the
        predicted ratio by topology and their worst, with the case, and the planning time's median and most.
        "optimum": the planner's predicted time over the best partition's, where that was found; None without.
        "aims": the longest planning time of what an aim speaks of, and whether that is below its limit.
    """
    return {"methods": _methods(rows), "optimum": _optimum(rows), "aims": _aims(rows)}


def _methods(rows: Sequence[PlannerRow]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[PlannerRow]] = defaultdict(list)
    for row in rows:
        groups[row.device, row.cost_model, row.method].append(row)
    found = []
    for (device, cost_model, method), mine in groups.items():
        worst = max(mine, key=lambda row: row.predicted_ratio)
        ratios = {
            kind: geometric_mean([row.predicted_ratio for row in mine if row.topology == kind])
            for kind in dict.fromkeys(row.topology for row in mine)
        }
        found.append(
            {
                "device": device,
                "cost_model": cost_model,
                "method": method,
                "cases": len(mine),
                "predicted_ratio": ratios,
                "worst_ratio": worst.predicted_ratio,
                "worst_case": f"{worst.case}, {worst.topology}, {worst.density:.2g}",
                "planning_ms": statistics.median(row.planning_ms for row in mine),
                "most_planning_ms": max(row.planning_ms for row in mine),
            }
        )
    return found


def _optimum(rows: Sequence[PlannerRow]) -> dict[str, Any] | None:
    # Under one mask, the row of the optimum stands behind that of the planner.
    pairs = [
        (row.predicted_us / best.predicted_us, row)
        for row, best in pairwise(rows)
        if (row.method, best.method) == (PLANNER, EXHAUSTIVE)
    ]
    if not pairs:
        return None
    worst, row = max(pairs, key=lambda pair: pair[0])
    return {
        "cases": len(pairs),
        "predicted_ratio": geometric_mean([ratio for ratio, _ in pairs]),
        "worst_ratio": worst,
        "worst_case": f"{row.case} for {row.cost_model}, {row.topology}, {row.density:.2g}",
    }


def _aims(rows: Sequence[PlannerRow]) -> list[dict[str, Any]]:
    planned = [row for row in rows if row.method == PLANNER]
    concerned = (
        [row for row in planned if row.kernel and row.out_channels == WIDE],
        [row for row in planned if not row.kernel and row.model == NETWORK],
    )
    found = []
    for (aim, limit_ms), mine in zip(AIMS_MS.items(), concerned, strict=True):
        if mine:
            worst = max(mine, key=lambda row: row.planning_ms)
            found.append(
                {
                    "aim": aim,
                    "limit_ms": limit_ms,
                    "planning_ms": worst.planning_ms,
                    "case": f"{worst.case} for {worst.cost_model}, {worst.topology}, {worst.density:.2g}",
                    "met": worst.planning_ms < limit_ms,
                }
            )
    return found


def read_planner(path: str | Path) -> PlannerResults:
    """Read and check a results.json of this suite.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: one line that names the file and what is wrong with it.
    """
    return read_document(path, _checked)


def _checked(found: dict[str, Any]) -> PlannerResults:
    rows = read_rows(PlannerRow, found["rows"])
    if not any(row.method == PLANNER for row in rows):
        raise ValueError(f"it needs a row of the method {PLANNER!r}, which the others are compared with")
    return PlannerResults(found["env"], rows, found["summary"])
