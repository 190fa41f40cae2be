"""What a report says of each run, and of the runs of one experiment together: counts, predictions, times."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import lhc_triton as lhc
from lhc_bench.measure.peers import network_peers, reset_compiler
from lhc_bench.pictures.topology_map import SHAPES_SHOWN
from lhc_bench.reports.runs import Run
from lhc_triton.conversion import lhc_layers
from lhc_triton.models.architecture import Architecture, OwnArchitecture
from lhc_triton.models.pretrained import load_network
from lhc_triton.planning import plan_topologies
from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.extract import read_model
from lhc_triton.planning.schema import LayerTopology
from lhc_triton.runtime.choosing.timing import time_paired
from lhc_triton.tf32 import tf32_allowed
from lhc_triton.topology import shape_counts
from lhc_triton.training.identity import TOPOLOGY_ONLY
from lhc_triton.training.networks import maker, network_name

DTYPES = {"cpu": "float32", "cuda": "float16"}
"""The compute type that times are predicted and measured in, by device kind."""


@dataclass(frozen=True)
class Timed:
    """Dense and sparse time on one device, predicted or measured.

    Attributes:
        device: "cpu" or "cuda".
        dtype: compute type.
        batch: images of a call.
        dense_us, lhc_us: microseconds of a call.
        source: the cost model's, or the dense peer that was the fastest.
        skipped: the reason for each dense peer that did not run.
    """

    device: str
    dtype: str
    batch: int
    dense_us: float
    lhc_us: float
    source: str
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """How many times as fast as dense."""
        return self.dense_us / self.lhc_us


@dataclass(frozen=True)
class RunRow:
    """One run in a report.

    Attributes:
        run: what was read.
        weights, live_weights, macs, live_macs: of the whole network for one image, dense layers included.
        density, mac_density: live share of the converted convolutions' weights and MACs.
        patterns, groups: distinct patterns, summed over the converted layers, and their filter groups.
        training_images: how many, where the weights' notes say it.
        predicted: the cost model's time of the converted convolutions, by device kind.
        measured: time of the whole network against its best dense peer; None if not measured.
        topologies: of the converted layers.
    """

    run: Run
    weights: int
    live_weights: int
    macs: int
    live_macs: int
    density: float
    mac_density: float
    patterns: int
    groups: int
    training_images: int | None
    predicted: Mapping[str, Timed]
    measured: Timed | None
    topologies: tuple[LayerTopology, ...]

    @property
    def values(self) -> dict[str, float | None]:
        """The numbers that are averaged over seeds; None where the run does not have one.

        Reductions are of the converted convolutions, as in a run's result.json, or of the whole network.
        """
        dense, mine = self.run.dense_accuracy, self.run.lhc_accuracy
        return {
            "dense_accuracy": dense,
            "lhc_accuracy": mine,
            "gain": None if dense is None else mine - dense,
            "weight_reduction": 1 / self.density,
            "mac_reduction": 1 / self.mac_density,
            "network_weight_reduction": self.weights / self.live_weights,
            "network_mac_reduction": self.macs / self.live_macs,
            "density": self.density,
            "mac_density": self.mac_density,
            "patterns": float(self.patterns),
            "live_weights": float(self.live_weights),
            "live_macs": float(self.live_macs),
            **{f"predicted_{device}": timed.speedup for device, timed in self.predicted.items()},
            "measured": None if self.measured is None else self.measured.speedup,
            "time_us": None if self.measured is None else self.measured.lhc_us,
        }

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON can hold it, with a row per layer."""
        return {
            "run": self.run.name,
            "seed": self.run.config.seed,
            "command": self.run.command,
            "density_reached": self.run.density_reached,
            "training_seconds": self.run.seconds,
            **self.values,
            "weights": self.weights,
            "live_weights": self.live_weights,
            "macs": self.macs,
            "live_macs": self.live_macs,
            "groups": self.groups,
            "training_images": self.training_images,
            "predicted": {device: asdict(timed) for device, timed in self.predicted.items()},
            "measured_us": None if self.measured is None else asdict(self.measured),
            "notes": list(self.run.notes),
            "layers": [_layer(topology) for topology in self.topologies],
        }


def _layer(topology: LayerTopology) -> dict[str, Any]:
    """One converted layer as JSON can hold it, with the counts of its most frequent kernel shapes."""
    counts = shape_counts(torch.from_numpy(topology.block_mask()))
    return {
        "layer": topology.name,
        "density": topology.density,
        "weights": topology.geometry.weights,
        "live_weights": topology.live_weights,
        "live_macs": topology.live_macs // topology.geometry.batch,
        "groups": topology.groups,
        "patterns": len(topology.patterns),
        "kernels": sum(counts.values()),
        "shapes": dict(list(counts.items())[:SHAPES_SHOWN]),
    }


@dataclass(frozen=True)
class Experiment:
    """The runs of one setting, which differ in their seeds.

    Attributes:
        label: in which settings it differs from the others of the report.
        rows: one per run, by seed.
    """

    label: str
    rows: tuple[RunRow, ...]

    @property
    def first(self) -> RunRow:
        """The run that stands for the others where one is drawn."""
        return self.rows[0]

    def values(self, name: str) -> list[float]:
        """One number of every run that has it; see `RunRow.values`."""
        found = [row.values.get(name) for row in self.rows]
        return [value for value in found if value is not None]

    def mean(self, name: str) -> float | None:
        """The mean over the runs, or None if none has the number."""
        found = self.values(name)
        return statistics.fmean(found) if found else None

    def spread(self, name: str) -> float | None:
        """The sample standard deviation over the runs, or None with fewer than two."""
        found = self.values(name)
        return statistics.stdev(found) if len(found) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The experiment as JSON can hold it."""
        names = list(self.first.values)
        return {
            "label": self.label,
            "settings": self.first.run.setting,
            "mean": {name: self.mean(name) for name in names},
            "spread": {name: self.spread(name) for name in names},
            "runs": [row.to_dict() for row in self.rows],
        }


def experiments(rows: Sequence[RunRow]) -> tuple[Experiment, ...]:
    """Group runs by their settings, in the order in which these first come; seeds rise within a group.

    Raises:
        ValueError: two runs have the same settings and the same seed.
    """
    grouped: dict[str, list[RunRow]] = {}
    for row, label in zip(rows, labels([row.run for row in rows]), strict=True):
        grouped.setdefault(label, []).append(row)
    found = []
    for label, members in grouped.items():
        members.sort(key=lambda row: row.run.config.seed)
        for one, other in pairwise(members):
            if one.run.config.seed == other.run.config.seed:
                raise ValueError(
                    f"{one.run.folder} and {other.run.folder} are runs of the same settings and seed; "
                    "give one of them"
                )
        found.append(Experiment(label, tuple(members)))
    return tuple(found)


def labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by the settings in which they differ; equal names mean equal settings.

    A value that more than half of the runs have is left out, unless nothing would be left to say; and so is
    a setting that means nothing beside the others.
    """
    settings = [run.meaning for run in runs]
    return [text or network_name(run.config) for text, run in zip(_differences(settings), runs, strict=True)]


def _differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name settings as `labels` does; empty names where all are equal."""
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    counts = {
        name: Counter(_shown(setting[name]) for setting in settings if name in setting) for name in names
    }
    changed = [name for name, found in counts.items() if len(found) > 1]
    usual = {}
    for name in changed:
        value, times = counts[name].most_common(1)[0]
        if 2 * times > counts[name].total():
            usual[name] = value
    named = []
    for setting in settings:
        mine = [name for name in changed if name in setting]
        shown = [name for name in mine if _shown(setting[name]) != usual.get(name)]
        named.append(", ".join(f"{name} {_shown(setting[name])}" for name in shown or mine))
    return named


@dataclass(frozen=True)
class DenseTwin:
    """Dense networks of one setting.

    Attributes:
        accuracy: mean share of test images put into their class, over the seeds.
        weights, macs: of the whole network for one image.
        time_us: mean time of the whole network; None if not measured.
    """

    accuracy: float
    weights: int
    macs: int
    time_us: float | None


def dense_twins(found: Sequence[Experiment]) -> dict[str, DenseTwin]:
    """The dense twins, by the settings in which these differ.

    Args:
        found: experiments; those that differ in their topologies alone share a twin per seed.

    Returns:
        Twins by name: "dense twin" where there is one setting of them.
    """
    twins = [experiment for experiment in found if experiment.values("dense_accuracy")]
    if not twins:
        return {}
    settings = [
        {name: value for name, value in experiment.first.run.setting.items() if name not in TOPOLOGY_ONLY}
        for experiment in twins
    ]
    accuracies: dict[str, dict[int, float]] = {}
    times: dict[str, list[float]] = {}
    sizes = {}
    for difference, experiment in zip(_differences(settings), twins, strict=True):
        name = f"dense twin, {difference}" if difference else "dense twin"
        sizes[name] = experiment.first.weights, experiment.first.macs
        for row in experiment.rows:
            if row.run.dense_accuracy is not None:
                accuracies.setdefault(name, {})[row.run.config.seed] = row.run.dense_accuracy
                if row.measured is not None:
                    times.setdefault(name, []).append(row.measured.dense_us)
    return {
        name: DenseTwin(
            statistics.fmean(seeds.values()),
            *sizes[name],
            statistics.fmean(times[name]) if name in times else None,
        )
        for name, seeds in accuracies.items()
    }


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def describe(run: Run, batch: int) -> RunRow:
    """Load a run's networks, count the one of learned topology and price it; nothing is timed.

    Args:
        run: what was read.
        batch: images of a call that is predicted, and of one that may be timed.

    Raises:
        ValueError: weights do not fit, no layer of the network is converted, or its dense twin is another
            network.
    """
    saved = load_network(run.lhc_file, maker(run.config))
    model, sizes = saved.model, saved.architecture
    converted = lhc_layers(model)
    if not converted:
        raise ValueError(f"{run.lhc_file}: no layer of the network is converted; these are dense weights")
    if run.dense_file is not None and load_network(run.dense_file, maker(run.config)).architecture != sizes:
        raise ValueError(f"{run.dense_file}: holds another network than {run.lhc_file.name} beside it")
    counts = lhc.summary(model, (sizes.in_channels, sizes.image_size, sizes.image_size))
    reading = read_model(model, _images(sizes, batch))
    # Structured zeros of a dense layer make it no learned one.
    topologies = tuple(topology for topology in reading.topologies if topology.name in converted)
    predicted = {}
    for device, dtype in DTYPES.items():
        cost = CostModel.for_device(device, tf32=tf32_allowed())
        totals = plan_topologies(topologies, cost, dtype=dtype).totals
        assert totals.planned_us is not None
        predicted[device] = Timed(device, dtype, batch, totals.dense_us, totals.planned_us, cost.source)
    return RunRow(
        run,
        weights=counts.total.weights,
        live_weights=counts.total.live_weights,
        macs=counts.total.macs,
        live_macs=counts.total.live_macs,
        density=counts.converted.density,
        mac_density=counts.converted.live_macs / counts.converted.macs,
        patterns=counts.converted.patterns,
        groups=sum(topology.groups for topology in topologies),
        training_images=_count(saved.training.get("training_images")),
        predicted=predicted,
        measured=None,
        topologies=topologies,
    )


def with_measured(row: RunRow, batch: int, device: str, rounds: int) -> RunRow:
    """The row with the time of its network against its dense twin, see `measure`."""
    make = maker(row.run.config)
    saved = load_network(row.run.lhc_file, make)
    dense = load_network(row.run.dense_file, make).model if row.run.dense_file else None
    timed = measure(saved.model, dense, _images(saved.architecture, batch), device, rounds)
    return replace(row, measured=timed)


def _count(noted: object) -> int | None:
    """A note on how many there were, where it is a number."""
    return noted if isinstance(noted, int) and not isinstance(noted, bool) else None


def _images(sizes: Architecture | OwnArchitecture, batch: int) -> Tensor:
    shape = (batch, sizes.in_channels, sizes.image_size, sizes.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def measure(model: nn.Module, dense: nn.Module | None, images: Tensor, device: str, rounds: int) -> Timed:
    """Time a network against the fastest form of its dense twin, round by round in turn.

    Args:
        model: of learned topology.
        dense: its twin; None takes the same network with all its weights, folded.
        images: [N, C, H, W], of the CPU.
        device: "cpu" or "cuda".
        rounds: of the timing.
    """
    dtype = getattr(torch, DTYPES[device])
    x, model = images.to(device, dtype), model.to(device, dtype)
    fast = lhc.accelerate(model, x, tune="cached")
    skipped: dict[str, str] = {}
    if dense is None:
        peers: dict[str, nn.Module] = {
            "same network, dense": lhc.accelerate(model, x, backend="dense", tune="off")
        }
    else:
        # Else dynamo refuses to compile the same class again after a few runs.
        reset_compiler()
        peers, skipped = network_peers(dense.to(device, dtype), x)
    calls = {name: lambda network=network: network(x) for name, network in {**peers, "lhc": fast}.items()}
    times = {name: t.median_us for name, t in time_paired(calls, rounds=rounds, device=device).items()}
    best = min(peers, key=lambda name: times[name])
    return Timed(device, DTYPES[device], len(x), times[best], times["lhc"], best, skipped)
