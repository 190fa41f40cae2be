"""The pictures of a report: accuracy against density and speed for all experiments, and each one's own."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lhc_bench.pictures import canvas
from lhc_bench.pictures.demo_bars import DENSE, IDEAL, SPARSE
from lhc_bench.pictures.topology_map import DEAD, LIVE
from lhc_bench.reports.experiment_rows import Experiment, RunRow, dense_twins
from lhc_triton.topology import shape_counts
from lhc_triton.training.recipe import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (SPARSE, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#d55e00", "#7f3c8d")
MARKERS, DENSE_MARKERS = "osD^v", "*XP8"
DENSITY_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SPEED_TICKS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
CLOSE_SPEED_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
SPEEDS = {
    "measured": "measured, whole network",
    "predicted_cpu": "predicted for the CPU, converted layers",
    "predicted_cuda": "modelled for an H100, converted layers",
}
COSTS = {
    "live_weights": "weights that are left, in thousands",
    "live_macs": "MACs that are left for one image, in millions",
    "time_us": "measured time, in ms",
}
COST_UNITS = {"live_weights": 1e3, "live_macs": 1e6, "time_us": 1e3}
SPEED_AXIS = "times as fast as dense"
LINE = 0.235  # inches for a layer
SHAPES_SHOWN = 14
LEGEND_WIDTH = 58  # characters of a legend's column, which is as wide as a panel
BIGGEST_GLYPH = 0.42
SHOWN_SHARE = 0.5  # percent; less rounds to nothing


def accuracy_figure(found: Sequence[Experiment], against: Sequence[str]) -> Figure:
    """Draw test accuracy against the density, against what the whole network costs, or against speed-ups.

    Args:
        found: experiments on one data set.
        against: names of `RunRow.values` for the x axes, a panel each: "density" alone, keys of COSTS, or
            keys of SPEEDS.
    """
    density, costs = list(against) == ["density"], set(against) <= COSTS.keys()
    wide, tall, gap = (6.4 if density else 4.3), 3.6, 0.3
    width = 0.85 + (wide + gap) * len(against)
    entries = [*([1] * len(dense_twins(found))), *(1 + _wrapped(one.label).count("\n") for one in found)]
    columns = len(against)
    # As matplotlib spreads entries over columns.
    legend_lines = max(int(part.sum()) for part in np.array_split(entries, columns))
    bottom = 0.75 + canvas.LEGEND_LINE * legend_lines
    what = "density" if density else "what the whole network costs" if costs else "speed-up"
    title = f"Accuracy against {what}"
    caption = ["Large: mean over the seeds, bars one standard deviation; small: each run."]
    if not density:
        caption[0] += f" Line: nothing is both {'cheaper' if costs else 'faster'} and more accurate."
    figure = canvas.frame(width, bottom + tall + (0.5 if density else 0.7), title, caption)
    axes: list[Axes] = []
    for index, name in enumerate(against):
        axis = canvas.panel(figure, 0.7 + (wide + gap) * index, bottom, wide, tall)
        _scatter(axis, found, name)
        if not density:
            axis.set_title({**SPEEDS, **COSTS}[name], fontsize=9, loc="left", pad=4)
        if index:
            axis.sharey(axes[0])
            axis.tick_params(labelleft=False)
        axes.append(axis)
    axes[0].set_ylabel("test accuracy, %", fontsize=9)
    canvas.legend(figure, axes[0], 0.27 + canvas.LEGEND_LINE * legend_lines, columns)
    return figure


def _scatter(axis: Axes, found: Sequence[Experiment], name: str) -> None:
    density, unit = name == "density", COST_UNITS.get(name, 1.0)
    xs, means = [], []
    for number, (label, twin) in enumerate(dense_twins(found).items()):
        costs = {"live_weights": twin.weights, "live_macs": twin.macs, "time_us": twin.time_us}
        cost = costs.get(name, 1.0)
        if cost is None:  # a twin's time that was not measured
            continue
        x = cost / unit
        xs.append(x)
        means.append((x, 100 * twin.accuracy))
        axis.plot([x], [100 * twin.accuracy], color=DENSE, marker=DENSE_MARKERS[number % 4], markersize=10,
                  linestyle="none", label=label, zorder=3)  # fmt: skip
        axis.axhline(100 * twin.accuracy, color=DENSE, linewidth=1, linestyle=":", zorder=0)
    for number, experiment in enumerate(found):
        # Forty pairs before one comes again; neighbours differ in both, so that one shows behind the other.
        color = COLORS[number % len(COLORS)]
        marker = MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
        values = [value / unit for value in experiment.values(name)]
        x, y = statistics.fmean(values), experiment.mean("lhc_accuracy")
        assert y is not None
        xs += values
        means.append((x, 100 * y))
        if len(experiment.rows) > 1:
            accuracies = [100 * value for value in experiment.values("lhc_accuracy")]
            axis.scatter(values, accuracies, s=9, color=color, alpha=0.6, linewidths=0)
        axis.errorbar(
            [x], [100 * y], xerr=(experiment.spread(name) or 0) / unit,
            yerr=100 * (experiment.spread("lhc_accuracy") or 0),
            color=color, marker=marker, markersize=7, alpha=0.8, linestyle="none", elinewidth=1,
            label=_wrapped(experiment.label),
        )  # fmt: skip
    if name in COSTS:
        front = [(-x, y) for x, y in pareto([(-x, y) for x, y in means])]
        axis.step(*zip(*front[::-1], strict=True), where="post", color=IDEAL, linewidth=1, zorder=1)
    elif not density:
        axis.step(*zip(*pareto(means), strict=True), where="pre", color=IDEAL, linewidth=1, zorder=1)
    axis.set_xscale("log")
    speeds = CLOSE_SPEED_TICKS if max(xs) < 2 * min(xs) else SPEED_TICKS
    ticks = DENSITY_TICKS if density else _cost_ticks(xs) if name in COSTS else speeds
    canvas.log_ticks(axis.xaxis, ticks, "{:g}" if density or name in COSTS else "{:g}x")
    axis.set_xlim(min(xs) / 1.2, max(xs) * 1.2)
    axis.margins(y=0.12)
    words = {"density": "density: live share of the converted weights", **dict.fromkeys(SPEEDS, SPEED_AXIS)}
    axis.set_xlabel(words.get(name, ""), fontsize=9)
    axis.grid(color="#e3e3e3", linewidth=0.6)
    axis.set_axisbelow(True)
    canvas.clean(axis)


def _wrapped(label: str) -> str:
    return textwrap.fill(label, LEGEND_WIDTH)


def _cost_ticks(xs: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, as far as they lie about the values."""
    powers = range(math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs))) + 1)
    return [digit * 10.0**power for power in powers for digit in (1, 2, 5)]


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, by the first one; larger is better."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def layers_figure(experiment: Experiment) -> Figure:
    """Draw density, share of the live MACs and distinct patterns of every converted layer."""
    from matplotlib.ticker import MaxNLocator

    topologies = experiment.first.topologies
    height = LINE * len(topologies)
    figure = canvas.frame(10.5, height + 1.3, f"Layer by layer: {experiment.label}", [_seeds(experiment)])
    names = [topology.name for topology in topologies]
    columns = {
        "live share of the weights": [_densities(row) for row in experiment.rows],
        "share of the live MACs": [_mac_shares(row) for row in experiment.rows],
        "distinct patterns per filter group": [_pattern_shares(row) for row in experiment.rows],
    }
    for index, (title, runs) in enumerate(columns.items()):
        axis = canvas.panel(figure, 1.75 + 2.9 * index, 0.55, 2.5, height)
        places = range(len(names))
        axis.barh(places, [statistics.fmean(values) for values in zip(*runs, strict=True)], height=0.72,
                  color=SPARSE, alpha=0.75)  # fmt: skip
        for values in runs if len(runs) > 1 else ():
            axis.scatter(values, places, s=8, color="black", linewidths=0, zorder=3)
        target = experiment.first.run.density_target
        if index == 0 and target is not None:
            axis.axvline(target, color=IDEAL, linewidth=1, linestyle="--")
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_yticks(places, names if index == 0 else [], fontsize=8)
        axis.set_xlim(0, min(1.0, 1.12 * max(map(max, runs))) if index < 2 else 1.02)
        axis.set_title(title, fontsize=9, loc="left", pad=4)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        canvas.clean(axis)
        axis.tick_params(axis="y", length=0)
    return figure


def _densities(row: RunRow) -> list[float]:
    return [topology.density for topology in row.topologies]


def _mac_shares(row: RunRow) -> list[float]:
    total = sum(topology.live_macs for topology in row.topologies)
    return [topology.live_macs / total for topology in row.topologies]


def _pattern_shares(row: RunRow) -> list[float]:
    return [len(topology.patterns) / topology.groups for topology in row.topologies]


def shapes_figure(experiment: Experiment) -> Figure:
    """Draw how often each kernel shape occurs in every layer, in percent; the most frequent shapes only."""
    from matplotlib.colors import ListedColormap

    counts = [_shape_counts(experiment.rows, place) for place in range(len(experiment.first.topologies))]
    # By shares, so that wide layers with their many kernels do not decide alone which shapes are shown.
    weight: Counter[str] = Counter()
    for layer in counts:
        weight.update({key: count / layer.total() for key, count in layer.items()})
    columns = sorted(weight, key=lambda key: (-weight[key], key))[:SHAPES_SHOWN]
    shares = np.array([[100 * layer[key] / layer.total() for key in columns] for layer in counts])
    others = np.maximum(100 - shares.sum(axis=1, keepdims=True), 0)
    if others.max() >= SHOWN_SHARE:
        shares = np.hstack([shares, others])
    height, unit = LINE * len(counts), 0.55
    caption = "Shapes: live taps of a kernel, per pair of filter group and input block. " + _seeds(experiment)
    width = max(2.0 + unit * shares.shape[1], 7.5)
    title = f"Kernel shapes, % of each layer: {experiment.label}"
    figure = canvas.frame(width, height + 1.4, title, [caption])
    axis = canvas.panel(figure, 1.75, 0.35, unit * shares.shape[1], height)
    darkest = max(60.0, shares.max())
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
    for (line, column), share in np.ndenumerate(shares):
        if share >= SHOWN_SHARE:
            axis.text(column, line, f"{share:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if share > 0.6 * darkest else "black")  # fmt: skip
    names = [topology.name for topology in experiment.first.topologies]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xticks([])
    axis.tick_params(length=0)
    for index, name in enumerate(columns):
        taps = np.array([list(map(int, line)) for line in name.split("/")])
        kh, kw = taps.shape
        cell = BIGGEST_GLYPH / max(kh, kw, 3)
        left = 1.75 + unit * index + (unit - cell * kw) / 2
        glyph = canvas.panel(figure, left, height + 0.42, cell * kw, cell * kh)
        glyph.pcolormesh(
            taps[::-1], cmap=ListedColormap([DEAD, LIVE]), vmin=0, vmax=1, edgecolors="white", linewidth=0.8,
        )  # fmt: skip
        glyph.set_axis_off()
    if shares.shape[1] > len(columns):
        axis.text(len(columns), -0.75, "others", ha="center", va="bottom", fontsize=8)
    return figure


def _shape_counts(rows: Sequence[RunRow], place: int) -> Counter[str]:
    """How often each kernel shape occurs in one layer, over all runs."""
    found: Counter[str] = Counter()
    for row in rows:
        found.update(shape_counts(torch.from_numpy(row.topologies[place].block_mask())))
    return found


def training_figure(experiment: Experiment) -> Figure:
    """Draw validation accuracy and density over the epochs, and where it was kept the masks' correlation."""
    from matplotlib.ticker import MaxNLocator

    runs = [row.run for row in experiment.rows]
    learned = runs[0].config.topology == "learned"
    panels = 3 if learned and all(run.layers for run in runs) else 2
    caption = _seeds(experiment)
    if any(run.dense_accuracy is not None and not _epochs(run.epochs, "dense") for run in runs):
        caption += " A dense twin was taken over from a run that is not beside: no curve."
    title = f"Training: {experiment.label}"
    figure = canvas.frame(0.2 + 3.85 * panels, 3.75, title, [caption])
    axes = [canvas.panel(figure, 0.6 + 3.85 * index, 0.75, 3.2, 2.3) for index in range(panels)]
    for number, run in enumerate(runs):
        legend = number == 0
        _curve(axes[0], run.epochs, ("dense",), "val_accuracy", DENSE, "dense twin" if legend else None, 100)
        mine = ("coarse", "fine")
        _curve(axes[0], run.epochs, mine, "val_accuracy", SPARSE, "LHC" if legend else None, 100)
        _curve(axes[1], run.epochs, mine, "density", SPARSE, "weights" if legend else None)
        _curve(axes[1], run.epochs, mine, "mac_density", COLORS[1], "MACs" if legend else None)
        if panels == 3:
            _draw_correlation(axes[2], run.layers, legend)
    config = runs[0].config
    if config.target is not None:
        label = f"target for {config.penalty}"
        axes[1].axhline(config.target, color=IDEAL, linewidth=1, linestyle="--", label=label)
    titles = ("validation accuracy, %", "live share", "correlation of the masks, epoch to epoch")
    dense, coarse, fine = (max(_epochs(run.epochs, stage) for run in runs) for stage in STAGES)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_xlim(-0.5, max(coarse + fine, dense) - 0.5)
        axis.axvline(coarse - 0.5, color=canvas.GREY, linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=9, loc="left", pad=4)
        axis.set_xlabel("epoch; dotted: the fine stage begins", fontsize=8)
        axis.legend(fontsize=8, framealpha=0.9, edgecolor="none")
        axis.grid(color="#e3e3e3", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        canvas.clean(axis)
    axes[1].set_ylim(0, None)
    return figure


def _curve(
    axis: Axes,
    rows: Iterable[Mapping[str, Any]],
    stages: Sequence[str],
    name: str,
    color: str,
    label: str | None,
    factor: float = 1,
) -> None:
    """Draw one column of a run over the epochs of stages, one after the other."""
    values = [factor * row[name] for stage in stages for row in rows if row["stage"] == stage]
    if values:
        axis.plot(range(len(values)), values, color=color, linewidth=1.4, alpha=0.85, label=label)


def _draw_correlation(axis: Axes, rows: Sequence[Mapping[str, Any]], legend: bool) -> None:
    layers: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["stage"] == "coarse":
            layers.setdefault(row["layer"], {})[row["epoch"]] = row["correlation"]
    for number, values in enumerate(layers.values()):
        label = "each layer" if legend and number == 0 else None
        axis.plot(list(values), list(values.values()), color=DENSE, linewidth=0.7, alpha=0.7, label=label)
    epochs = sorted({epoch for values in layers.values() for epoch in values})
    means = [statistics.fmean(v[epoch] for v in layers.values() if epoch in v) for epoch in epochs]
    axis.plot(epochs, means, color=SPARSE, linewidth=1.8, label="mean" if legend else None)


def _epochs(rows: Iterable[Mapping[str, Any]], stage: str) -> int:
    return sum(row["stage"] == stage for row in rows)


def _seeds(experiment: Experiment) -> str:
    seeds = [str(row.run.config.seed) for row in experiment.rows]
    if len(seeds) == 1:
        return f"One run, seed {seeds[0]}."
    return f"{len(seeds)} runs, seeds {', '.join(seeds)}."
