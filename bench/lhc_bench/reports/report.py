"""What came out of training: runs read, counted, priced and timed; a page, pictures and a JSON of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lhc_bench.files import made_folder, write_text
from lhc_bench.measure.rows import environment
from lhc_bench.pictures import canvas
from lhc_bench.pictures.topology_map import draw_topology
from lhc_bench.reports.experiment_pictures import (
    COSTS,
    SPEEDS,
    accuracy_figure,
    layers_figure,
    shapes_figure,
    training_figure,
)
from lhc_bench.reports.experiment_rows import Experiment, describe, experiments, with_measured
from lhc_bench.reports.page import Picture, Section, page
from lhc_bench.reports.runs import read_run

Progress = Callable[[str], None]
PAGE_OF_LAYERS = 16
OWN_PICTURE = re.compile(
    r"\d\d+_(training|layers|shapes|topology(_\d+)?)\.png|accuracy_(density|cost|speedup).*\.png"
)
MAX_BATCH = 4096  # counting runs each network once on so many images


@dataclass(frozen=True)
class Report:
    """What a report holds.

    Attributes:
        experiments: runs grouped by their settings.
        env: where it was made; see `rows.environment`.
        batch: images of a predicted or measured call.
        rounds: interleaved rounds of a timing; 0 where nothing was measured.
    """

    experiments: tuple[Experiment, ...]
    env: dict[str, Any]
    batch: int
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "env": self.env,
            "batch": self.batch,
            "rounds": self.rounds,
            "experiments": [experiment.to_dict() for experiment in self.experiments],
        }


def make_report(
    folders: Sequence[str | Path],
    out_dir: str | Path,
    *,
    measure: bool = False,
    device: str = "cpu",
    batch: int = 64,
    rounds: int = 20,
    progress: Progress = lambda stage: None,
) -> Report:
    """Write report.html (self-contained), report.json and PNGs on finished runs.

    All runs are read and checked before anything is made or timed. Predicted times come from the cost models
    of the CPU and of the GPU, for the converted convolutions; measured ones are of the whole network, by
    ``accelerate(tune="cached")`` against the fastest dense form of the run's dense twin, in float32 on a CPU
    and float16 on a GPU.

    Args:
        folders: of runs, as `lhc_triton.training.train` left them.
        out_dir: folder for the results; made where it does not exist.
        measure: whether to time the networks here.
        device: "cpu" or "cuda": where to time them.
        batch: images of a predicted or measured call.
        rounds: interleaved rounds of each timing.
        progress: called with the name of each step as it begins.

    Raises:
        ValueError: no run, or the same one twice; a damaged file in a run; a batch outside [1, 4096];
            a number of rounds below 1; a device that is not there.
        OSError: a file of a run is missing; the folder cannot be written.
    """
    if not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"batch is {batch}; it must be from 1 to {MAX_BATCH}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not one of cpu, cuda")
    if measure and device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not there; measure on 'cpu', or not at all")
    if not folders:
        raise ValueError("no run to report on; give folders that `train` or `ablate` wrote")
    runs = [read_run(folder) for folder in folders]
    rows = []
    for run in runs:
        progress(f"count {run.name}")
        rows.append(describe(run, batch))
    found = experiments(rows)
    out = made_folder(out_dir)
    if measure:
        for number, row in enumerate(rows):
            progress(f"measure {row.run.name}")
            rows[number] = with_measured(row, batch, device, rounds)
        found = experiments(rows)
    report = Report(found, environment(device if measure else "cpu"), batch, rounds if measure else 0)
    progress("draw the pictures")
    sections = [_overview(report, out)]
    sections += [_section(number, found, out) for number, found in enumerate(report.experiments, start=1)]
    _remove_stale(out, {picture.path for section in sections for picture in section.pictures})
    write_text(out / "report.json", json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
    write_text(out / "report.html", page(report.experiments, report.env, batch, report.rounds, sections))
    return report


def _remove_stale(out: Path, written: AbstractSet[Path]) -> None:
    """Remove the pictures of an earlier report on more experiments, or on larger ones."""
    for path in out.glob("*.png"):
        if path not in written and OWN_PICTURE.fullmatch(path.name):
            path.unlink()


def _overview(report: Report, out: Path) -> Section:
    """Draw what compares the experiments, three pictures per data set."""
    by_data: dict[str, list[Experiment]] = {}
    for experiment in report.experiments:
        by_data.setdefault(experiment.first.run.config.data, []).append(experiment)
    pictures = []
    for data, found in by_data.items():
        speeds = [name for name in SPEEDS if all(experiment.values(name) for experiment in found)]
        costs = [name for name in COSTS if all(experiment.values(name) for experiment in found)]
        for kind, against in (("density", ["density"]), ("cost", costs), ("speedup", speeds)):
            path = out / f"accuracy_{kind}{'' if len(by_data) == 1 else f'_{data}'}.png"
            canvas.save(accuracy_figure(found, against), path)
            pictures.append(Picture(path, f"{data}: test accuracy against {kind}"))
    return Section("Accuracy against density, cost and speed", None, tuple(pictures))


def _section(number: int, experiment: Experiment, out: Path) -> Section:
    """Draw what belongs to one experiment."""
    first = experiment.first
    pictures = []
    figures = {"training": training_figure, "layers": layers_figure, "shapes": shapes_figure}
    for name, figure in figures.items():
        path = canvas.save(figure(experiment), out / f"{number:02}_{name}.png")
        pictures.append(Picture(path, f"{experiment.label}: {name}"))
    total = len(first.topologies)
    for start in range(0, total, PAGE_OF_LAYERS):
        layers = first.topologies[start : start + PAGE_OF_LAYERS]
        title = f"Topology: {experiment.label}, seed {first.run.config.seed}"
        name = "topology"
        if total > PAGE_OF_LAYERS:
            title += f", layers {start + 1} to {start + len(layers)} of {total}"
            name += f"_{start // PAGE_OF_LAYERS + 1}"
        path = draw_topology(layers, out / f"{number:02}_{name}.png", title, first.run.density_target)
        pictures.append(Picture(path, f"{experiment.label}: topology of the layers"))
    return Section(f"{number}. {experiment.label}", experiment, tuple(pictures))
