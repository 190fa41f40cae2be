"""Curves over the density: speed-up against the best dense form, and the share of the machine's peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lhc_bench.measure.rows import Results, Row
from lhc_bench.pictures import canvas
from lhc_bench.pictures.demo_bars import DENSE, IDEAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TALL = 3.1
SAME, ROOM = 3.0, 21.0  # points of the page: markers as good as one, and what a number beside one needs
Value = Callable[[Row], float]


def speedup_figure(results: Results) -> Figure:
    """Draw the speed-up of every backend, a panel per block size."""
    rows = results.rows
    speedups, roofs = [row.speedup for row in rows], [row.baseline_us / row.floor_us for row in rows]
    figure, axes, put_legend = _panels(results, "Speed-up against the best dense form", 3)
    for axis, block in zip(axes, canvas.blocks_of(rows), strict=True):
        mine = canvas.under_block(rows, block)
        by_density = canvas.under_densities(mine, results.densities)
        shown = list(by_density)
        low, high = min(1.0, *speedups), max(1.0, 1 / min(shown), *speedups, *roofs)
        powers = range(math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 2)
        _densities(axis, shown)
        axis.set_yscale("log")
        canvas.log_ticks(axis.yaxis, [2.0**power for power in powers], "{:g}x")
        axis.set_ylim(low / 1.35, high * 1.25)
        axis.axhline(1, color=DENSE, linewidth=1.4, label="best dense, 1x")
        axis.plot(shown, [1 / d for d in shown], color=IDEAL, linestyle="--", label="1 / density")
        means = [canvas.geomean([row.baseline_us / row.floor_us for row in at]) for at in by_density.values()]
        axis.plot(shown, means, color=canvas.GREY, linestyle=":", label="roof: rates of this machine")
        _curves(axis, mine, results.densities, lambda row: row.speedup, "{:.2f}x")
    axes[0].set_ylabel("times the speed of the best dense form", fontsize=9)
    put_legend()
    return figure


def peak_figure(results: Results) -> Figure:
    """Draw the share of a large matrix product's rate that live multiply-accumulates reach."""
    rows = results.rows
    most = max(max(_share(row), _dense_share(row)) for row in rows)
    figure, axes, put_legend = _panels(results, "Achieved rate, as a share of a large matrix product's", 1)
    for axis, block in zip(axes, canvas.blocks_of(rows), strict=True):
        mine = canvas.under_block(rows, block)
        by_density = canvas.under_densities(mine, results.densities)
        dense = [canvas.geomean([_dense_share(row) for row in at]) for at in by_density.values()]
        _densities(axis, list(by_density))
        axis.set_ylim(0, most * 1.08)
        axis.plot(list(by_density), dense, color=DENSE, linewidth=1.6, label="best dense, all MACs")
        _curves(axis, mine, results.densities, _share, "{:.0f} %")
    axes[0].set_ylabel("% of the matrix product's MAC/s", fontsize=9)
    put_legend()
    return figure


def _densities(axis: Axes, shown: Sequence[float]) -> None:
    """Scale the x axis by powers, with ticks at the densities that were measured."""
    axis.set_xscale("log")
    canvas.log_ticks(axis.xaxis, shown)
    axis.set_xlim(min(shown) / 1.2, max(shown) * 1.2)


def _share(row: Row) -> float:
    return 100 * (row.peak_share or 0)


def _dense_share(row: Row) -> float:
    """Return the percentage of the peak that the dense form reaches on the same case."""
    return _share(row) * row.time_us / row.density / row.baseline_us


def _panels(results: Results, title: str, extra: int) -> tuple[Figure, list[Axes], Callable[[], None]]:
    """Make a figure with a panel per block size, and what puts the legend: all series and ``extra`` more."""
    blocks, backends = canvas.blocks_of(results.rows), canvas.backends_of(results.rows)
    cases = len({canvas.point(row) for row in results.rows})
    if cases > 1:
        title += f"\ngeometric mean over {cases} cases, bands from the least to the most"
    across = 6.4 if len(blocks) == 1 else 3.5
    width = 0.78 + (across + 0.2) * len(blocks)
    columns = 2 if len(blocks) == 1 else 4
    caption = canvas.caption_lines(results, width)
    legend_top = (
        0.25
        + canvas.CAPTION_LINE * len(caption)
        + canvas.LEGEND_LINE * math.ceil((extra + len(backends)) / columns)
    )
    bottom = legend_top + 0.55
    height = bottom + TALL + (0.85 if cases > 1 else 0.6)
    figure = canvas.frame(width, height, title.partition("\n")[0], caption)
    if cases > 1:
        at = 1 - 0.47 / height
        figure.text(canvas.MARGIN / width, at, title.partition("\n")[2], fontsize=9, color=canvas.GREY)
    axes = []
    for index, (in_block, out_block) in enumerate(blocks):
        axis = canvas.panel(figure, 0.68 + (across + 0.2) * index, bottom, across, TALL)
        axis.set_title(
            f"masks of {in_block} channels x {out_block} filters", fontsize=8.5, loc="right", pad=3
        )
        axis.set_xlabel("density: live share of the weights", fontsize=9)
        axis.grid(color="#e3e3e3", linewidth=0.6)
        axis.set_axisbelow(True)
        canvas.clean(axis)
        if index:
            axis.tick_params(labelleft=False)
        axes.append(axis)
    return figure, axes, partial(canvas.legend, figure, axes[0], legend_top, columns)


def _curves(axis: Axes, rows: Sequence[Row], densities: Sequence[float], value: Value, text: str) -> None:
    """Draw a line per backend, and its range where it is one of ours."""
    ours: dict[float, list[tuple[float, str]]] = {}
    drawn: dict[float, list[float]] = {}
    for backend in canvas.backends_of(rows):
        color, marker = canvas.look(backend)
        mine = [row for row in rows if row.backend == backend]
        found = {d: [value(r) for r in at] for d, at in canvas.under_densities(mine, densities).items()}
        curve = [canvas.geomean(values) for values in found.values()]
        rival = backend in canvas.NAMES
        if not rival:
            lows, highs = [min(v) for v in found.values()], [max(v) for v in found.values()]
            axis.fill_between(list(found), lows, highs, color=color, alpha=0.14, linewidth=0)
        axis.plot(
            list(found), curve, color=color, marker=marker, markersize=5,
            linestyle="-." if rival else "-", linewidth=1.2 if rival else 1.8,
            label=canvas.NAMES.get(backend, backend),
        )  # fmt: skip
        for density, mean in zip(found, curve, strict=True):
            drawn.setdefault(density, []).append(mean)
            if not rival:
                ours.setdefault(density, []).append((mean, color))

    for density, means in ours.items():
        lowest, *_, highest = sorted([*means, *means])
        apart = _height(axis, density, highest[0]) - _height(axis, density, lowest[0])
        free = len(means) == 1 or apart >= 2 * ROOM
        _annotate(axis, density, highest, drawn[density], text, up=True, free=free)
        if len(means) > 1:
            _annotate(axis, density, lowest, drawn[density], text, up=False, free=free)


def _height(axis: Axes, density: float, value: float) -> float:
    """Return where a value is drawn, in points of the page."""
    return float(axis.transData.transform((density, value))[1]) * 72 / axis.figure.dpi


def _annotate(
    axis: Axes,
    density: float,
    mean: tuple[float, str],
    drawn: Sequence[float],
    text: str,
    up: bool,
    free: bool,
) -> None:
    """Write a value beside its point, on the side asked for where there is room.

    Else on the other side, if it is free of our own numbers, or beyond the points that are in the way.
    """
    value, color = mean
    gaps = [_height(axis, density, other) - _height(axis, density, value) for other in drawn]
    above = min((gap for gap in gaps if gap > SAME), default=math.inf)
    below = min((-gap for gap in gaps if gap < -SAME), default=math.inf)
    if up and (above >= ROOM or not (free and below >= ROOM)):
        offset = 8.0 + max(gap for gap in gaps if gap < ROOM)
    elif up or below >= ROOM or not (free and above >= ROOM):
        offset = -14.0 + min(gap for gap in gaps if gap > -ROOM)
    else:
        offset = 8.0
    axis.annotate(
        text.format(value), (density, value), xytext=(0, offset), textcoords="offset points",
        ha="center", fontsize=8, color=color, fontweight="bold", bbox=canvas.OVER_LINE, zorder=5,
    )  # fmt: skip
