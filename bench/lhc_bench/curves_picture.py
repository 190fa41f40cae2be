"""Curves over the density: speed-up against the best dense form, and the share of the machine's peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from . import picture
from .demo_picture import DENSE, IDEAL
from .rows import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TALL = 3.1
CLOSE = 1.6  # two points within this ratio leave no room for a number between them
Value = Callable[[Row], float]


def speedup_figure(results: Results) -> Figure:
    """Draw the speed-up of every backend, a panel per block size."""
    rows = results.rows
    roofs = [row.baseline_us / row.floor_us for row in rows]
    figure, axes, put_legend = _panels(results, "Speed-up against the best dense form", 3)
    for axis, block in zip(axes, picture.blocks_of(rows), strict=True):
        mine = picture.under_block(rows, block)
        by_density = picture.under_densities(mine, results.densities)
        shown = list(by_density)
        axis.axhline(1, color=DENSE, linewidth=1.4, label="best dense, 1x")
        axis.plot(shown, [1 / d for d in shown], color=IDEAL, linestyle="--", label="1 / density")
        means = [
            picture.geomean([row.baseline_us / row.floor_us for row in at]) for at in by_density.values()
        ]
        axis.plot(shown, means, color=picture.GREY, linestyle=":", label="roof: rates of this machine")
        _curves(axis, mine, results.densities, lambda row: row.speedup, "{:.2f}x")
        axis.set_xscale("log")
        axis.set_yscale("log")
        picture.log_ticks(axis.xaxis, shown)
        speedups = [row.speedup for row in rows]
        low, high = min(1.0, *speedups), max(1.0, 1 / min(shown), *speedups, *roofs)
        powers = range(math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 2)
        picture.log_ticks(axis.yaxis, [2.0**power for power in powers], "{:g}x")
        axis.set_xlim(min(shown) / 1.2, max(shown) * 1.2)
        axis.set_ylim(low / 1.35, high * 1.25)
    axes[0].set_ylabel("times the speed of the best dense form", fontsize=9)
    put_legend()
    return figure


def peak_figure(results: Results) -> Figure:
    """Draw the share of a large matrix product's rate that live multiply-accumulates reach."""
    rows = [row for row in results.rows if row.peak_share]
    figure, axes, put_legend = _panels(results, "Achieved rate, as a share of a large matrix product's", 1)
    most = 0.0
    for axis, block in zip(axes, picture.blocks_of(results.rows), strict=True):
        mine = picture.under_block(rows, block)
        by_density = picture.under_densities(mine, results.densities)
        dense = [picture.geomean([_dense_share(row) for row in at]) for at in by_density.values()]
        axis.plot(list(by_density), dense, color=DENSE, linewidth=1.6, label="best dense, all MACs")
        _curves(axis, mine, results.densities, lambda row: 100 * (row.peak_share or 0), "{:.0f} %")
        axis.set_xscale("log")
        picture.log_ticks(axis.xaxis, list(by_density))
        axis.set_xlim(min(by_density) / 1.2, max(by_density) * 1.2)
        most = max(most, *dense, *(100 * (row.peak_share or 0) for row in mine))
    for axis in axes:
        axis.set_ylim(0, most * 1.08)
    axes[0].set_ylabel("% of the matrix product's MAC/s", fontsize=9)
    put_legend()
    return figure


def _dense_share(row: Row) -> float:
    """Return the percentage of the peak that the dense form reaches on the same case."""
    macs = (row.peak_share or 0) * row.time_us / row.density
    return 100 * macs / row.baseline_us


def _panels(results: Results, title: str, extra: int) -> tuple[Figure, list[Axes], Callable[[], None]]:
    """Make a figure with a panel per block size, and what puts the legend: all series and ``extra`` more."""
    blocks, backends = picture.blocks_of(results.rows), picture.backends_of(results.rows)
    cases = len({picture.point(row) for row in results.rows})
    if cases > 1:
        title += f"\ngeometric mean over {cases} cases, bands from the least to the most"
    across = 6.4 if len(blocks) == 1 else 3.5
    width = 0.78 + (across + 0.2) * len(blocks)
    columns = 2 if len(blocks) == 1 else 4
    caption = picture.caption_lines(results, width)
    legend_top = (
        0.25
        + picture.CAPTION_LINE * len(caption)
        + picture.LEGEND_LINE * math.ceil((extra + len(backends)) / columns)
    )
    bottom = legend_top + 0.55
    height = bottom + TALL + (0.85 if cases > 1 else 0.6)
    figure = picture.frame(width, height, title.partition("\n")[0], caption)
    if cases > 1:
        at = 1 - 0.47 / height
        figure.text(picture.MARGIN / width, at, title.partition("\n")[2], fontsize=9, color=picture.GREY)
    axes = []
    for index, (in_block, out_block) in enumerate(blocks):
        axis = picture.panel(figure, 0.68 + (across + 0.2) * index, bottom, across, TALL)
        axis.set_title(
            f"masks of {in_block} channels x {out_block} filters", fontsize=8.5, loc="right", pad=3
        )
        axis.set_xlabel("density: live share of the weights", fontsize=9)
        axis.grid(color="#e3e3e3", linewidth=0.6)
        axis.set_axisbelow(True)
        picture.clean(axis)
        if index:
            axis.tick_params(labelleft=False)
        axes.append(axis)
    return figure, axes, partial(picture.legend, figure, axes[0], legend_top, columns)


def _curves(axis: Axes, rows: Sequence[Row], densities: Sequence[float], value: Value, text: str) -> None:
    """Draw a line per backend, and its range where it is one of ours."""
    ours: dict[float, list[tuple[float, str]]] = {}
    drawn: dict[float, list[float]] = {}
    for backend in picture.backends_of(rows):
        color, marker = picture.look(backend)
        mine = [row for row in rows if row.backend == backend]
        found = {d: [value(r) for r in at] for d, at in picture.under_densities(mine, densities).items()}
        curve = [picture.geomean(values) for values in found.values()]
        rival = backend in picture.NAMES
        if not rival:
            lows, highs = [min(v) for v in found.values()], [max(v) for v in found.values()]
            axis.fill_between(list(found), lows, highs, color=color, alpha=0.14, linewidth=0)
        axis.plot(
            list(found), curve, color=color, marker=marker, markersize=5,
            linestyle="-." if rival else "-", linewidth=1.2 if rival else 1.8,
            label=picture.NAMES.get(backend, backend),
        )  # fmt: skip
        for density, mean in zip(found, curve, strict=True):
            drawn.setdefault(density, []).append(mean)
            if not rival:
                ours.setdefault(density, []).append((mean, color))
    for density, means in ours.items():
        _annotate(axis, density, sorted(means), drawn[density], text)


def _annotate(
    axis: Axes, density: float, means: Sequence[tuple[float, str]], drawn: Sequence[float], text: str
) -> None:
    """Write the largest value above its point and the smallest below: those in between would collide.

    Where another point is drawn close by, the value stands beyond it.
    """
    highest, lowest = means[-1][0], means[0][0]
    above = max(value for value in drawn if value <= CLOSE * highest)
    below = min(value for value in drawn if value >= lowest / CLOSE)
    ends = [(means[-1], above, 8)] if len(means) == 1 else [(means[-1], above, 8), (means[0], below, -14)]
    for (mean, color), at, offset in ends:
        axis.annotate(
            text.format(mean), (density, at), xytext=(0, offset), textcoords="offset points",
            ha="center", fontsize=8, color=color, fontweight="bold", bbox=picture.OVER_LINE, zorder=5,
        )  # fmt: skip
