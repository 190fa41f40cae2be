"""Bars: the speed-up of every layer or network at one density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lhc_bench.measure.rows import Results, Row, nearest_density
from lhc_bench.pictures import canvas
from lhc_bench.pictures.demo_bars import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSITY = 0.1
ONE_PANEL = 8  # up to so many cases share one panel; more get a panel per network
BAR = 0.17
Series = tuple[str, canvas.Block]


def layers_figure(results: Results) -> Figure:
    """Draw a line per case and a bar per backend and block size, at the density nearest to 0.1.

    With several block sizes, "auto" and the block-sparse product are left to the curves.
    """
    found = canvas.under_densities(results.rows, results.densities)
    density = nearest_density(DENSITY, list(found))
    rows = found[density]
    if len(canvas.blocks_of(rows)) > 1:
        rows = [row for row in rows if row.backend not in ("auto", "bsr")] or rows
    series = [
        (backend, block)
        for backend in canvas.backends_of(rows)
        for block in canvas.blocks_of([row for row in rows if row.backend == backend])
    ]
    cases = list({canvas.point(row): row for row in rows}.values())
    panels: dict[str, list[Row]] = {}
    for row in cases:
        panels.setdefault("" if len(cases) <= ONE_PANEL else row.model, []).append(row)
    columns = 1 if len(panels) == 1 else 2
    lines = math.ceil(len(panels) / columns)
    grouped = [list(panels.values())[line * columns : (line + 1) * columns] for line in range(lines)]
    unit = BAR * (len(series) + 0.9)
    heights = [max(map(len, panel_row)) * unit for panel_row in grouped]

    shared = columns == 2
    width, left = (10.6, 1.55) if shared else (7.4, 2.3)
    caption = canvas.caption_lines(results, width)
    legend_columns = 5 if shared else 3
    legend_tall = canvas.LEGEND_LINE * math.ceil((len(series) + 1) / legend_columns)
    head, between = 0.58 + legend_tall + (0.25 if shared else 0.05), 0.62
    height = head + sum(heights) + between * lines + canvas.CAPTION_LINE * len(caption)
    figure = canvas.frame(width, height, f"Speed-up at density {density:g}; lines span p20 to p80", caption)
    longest = max(1.0, *(max(row.speedup, row.baseline_us / row.p20_us) for row in rows))
    top = height - head
    for line, panel_row in enumerate(grouped):
        for column, members in enumerate(panel_row):
            tall = len(members) * unit
            at = left + column * width / columns
            axis = canvas.panel(figure, at, top - tall, width / columns - left - 0.35, tall)
            _draw_bars(axis, members, rows, series, shared)
            axis.set_xlim(0, longest * 1.16)
            if line * columns + column + columns >= len(panels):
                axis.set_xlabel("times the speed of the best dense form", fontsize=8.5)
        top -= heights[line] + between
    canvas.legend(figure, _fullest(figure), height - 0.44, columns=legend_columns)
    return figure


def _fullest(figure: Figure) -> Axes:
    """Return the axes that show most series: not every case has all of them."""
    return max(figure.axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))


def _draw_bars(
    axis: Axes, members: Sequence[Row], rows: Sequence[Row], series: Sequence[Series], shared: bool
) -> None:
    """One line per case, a bar per series. ``shared``: the panel's title names the network."""
    thick = 1 / (len(series) + 0.9)
    for index, (backend, block) in enumerate(series):
        mine = {
            canvas.point(row): row
            for row in rows
            if row.backend == backend and (row.in_block, row.out_block) == block
        }
        color, label = canvas.look(backend)[0], _label(backend, block, series)
        shade = _shade(block, series, backend)
        for place, case in enumerate(members):
            row = mine.get(canvas.point(case))
            if row is None:
                continue
            at = place + (index - (len(series) - 1) / 2) * thick
            axis.barh([at], [row.speedup], height=thick * 0.9, color=color, alpha=shade, label=label)
            label = "_nolegend_"
            # The span is the backend's own scatter; the baseline's median is one number.
            low, high = row.baseline_us / row.p80_us, row.baseline_us / row.p20_us
            axis.hlines([at], low, high, color="black", linewidth=0.9)
            text_at = max(row.speedup, high)
            axis.annotate(
                f"{row.speedup:.2f}", (text_at, at), xytext=(3, 0), textcoords="offset points", ha="left",
                va="center", fontsize=7.5, bbox={**canvas.OVER_LINE, "pad": 0.2}, zorder=4,
            )  # fmt: skip
    axis.axvline(1, color=DENSE, linewidth=1.4, label="best dense, 1x", zorder=3)
    axis.set_yticks(range(len(members)), [_case_label(row, shared) for row in members], fontsize=8)
    axis.set_ylim(len(members) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    if shared:
        axis.set_title(members[0].model, fontsize=9.5, fontweight="bold", loc="left", pad=4)
    canvas.clean(axis)


def _label(backend: str, block: canvas.Block, series: Sequence[Series]) -> str:
    name = canvas.NAMES.get(backend, backend)
    several = sum(other == backend for other, _ in series) > 1
    return f"{name}, {block[0]}x{block[1]}" if several else name


def _shade(block: canvas.Block, series: Sequence[Series], backend: str) -> float:
    """Return the opacity of a backend's bars: the wider the blocks, the fuller the colour."""
    blocks = [found for other, found in series if other == backend]
    return 0.4 + 0.6 * (blocks.index(block) + 1) / len(blocks) if len(blocks) > 1 else 1.0


def _case_label(row: Row, shared: bool) -> str:
    if row.kernel == 0:
        part = "" if row.layer == "all" else f" {row.layer}"
        return f"{row.model}{part}\n{row.height}², batch {row.batch}"
    shape = f"{row.in_channels}→{row.out_channels}, {row.height}²{f', /{row.stride}' * (row.stride > 1)}"
    return f"{row.layer}\n{shape}" if shared else f"{row.model} {row.layer}\n{shape}"
