"""Bars: how long the same masked network takes in every engine, a panel per network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lhc_bench.measure.engines import ENGINES, OURS
from lhc_bench.measure.rows import Results, Row
from lhc_bench.pictures import canvas
from lhc_bench.pictures.demo_bars import DENSE, SPARSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS, BAR, LEFT, BETWEEN = 3.4, 0.3, 1.6, 0.82  # inches
COLUMNS = 2
TEXT_ROOM = 1.52  # of the longest bar: what follows it
_NAMES = {
    "deepsparse": ("DeepSparse", "#56b4e9"),
    "openvino": ("OpenVINO", "#e69f00"),
    "onnxruntime": ("ONNX Runtime", "#cc79a7"),
}


def has_engines(results: Results) -> bool:
    """Return whether other engines were measured, beside ours."""
    backends = {row.backend for row in results.rows}
    return OURS in backends and bool(backends & set(ENGINES))


def engines_figure(results: Results) -> Figure:
    """Draw a panel per network: our time, every engine's and the best dense form's, in milliseconds."""
    rows = [row for row in results.rows if row.backend == OURS or row.backend in ENGINES]
    ours = [row for row in rows if row.backend == OURS]
    panels = [[mine, *(row for row in rows if _same(row, mine) and row is not mine)] for mine in ours]
    lines = math.ceil(len(panels) / COLUMNS)
    columns = min(COLUMNS, len(panels))
    width = (LEFT + ACROSS) * columns + 0.15
    heights = [
        BAR * (1 + max(map(len, panels[line * columns : (line + 1) * columns]))) for line in range(lines)
    ]
    caption = canvas.caption_lines(results, width)
    head, foot = 0.82, 0.2 + canvas.CAPTION_LINE * len(caption)
    height = head + sum(heights) + BETWEEN * (lines - 1) + 0.5 + foot
    density = f"{sum(row.density for row in ours) / len(ours):.2g}"
    title = f"Time of the same network at density {density} in every engine, shorter is better"
    figure = canvas.frame(width, height, title, caption)
    top = height - head
    for place, members in enumerate(panels):
        line, column = divmod(place, columns)
        axis = canvas.panel(
            figure, LEFT + column * (LEFT + ACROSS), top - heights[line], ACROSS, heights[line]
        )
        _bars(axis, members, results.env.get("engines"))
        if column == columns - 1:
            top -= heights[line] + BETWEEN
    return figure


def _same(row: Row, other: Row) -> bool:
    return (canvas.point(row), row.density) == (canvas.point(other), other.density)


def _bars(axis: Axes, members: list[Row], versions: object) -> None:
    mine = members[0]
    bars = [("this package", SPARSE, mine.time_us, mine.p20_us, mine.p80_us)]
    for engine, (name, color) in _NAMES.items():
        for row in members:
            if row.backend == engine:
                version = versions.get(engine) if isinstance(versions, dict) else None
                label = name if version in (None, "unknown") else f"{name}\n{version}"
                bars.append((label, color, row.time_us, row.p20_us, row.p80_us))
    bars.append((f"torch, dense:\n{mine.baseline}", DENSE, mine.baseline_us, math.nan, math.nan))
    for place, (_, color, time_us, p20_us, p80_us) in enumerate(bars):
        axis.barh([place], [time_us / 1e3], height=0.72, color=color)
        axis.hlines([place], p20_us / 1e3, p80_us / 1e3, color="black", linewidth=0.9)
        times = "" if place == 0 else f"   {time_us / mine.time_us:.1f}x ours"
        axis.annotate(
            f"{_milliseconds(time_us)}{times}",
            (max(time_us, 0 if math.isnan(p80_us) else p80_us) / 1e3, place),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
            fontweight="bold" if place == 0 else "normal",
        )  # fmt: skip
    longest = max(max(time_us, 0 if math.isnan(high) else high) for _, _, time_us, _, high in bars)
    axis.set_xlim(0, longest / 1e3 * TEXT_ROOM)
    axis.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.set_xlabel("time of a batch, ms", fontsize=8.5, labelpad=2)
    axis.set_title(_network(mine), fontsize=9.5, fontweight="bold", loc="left", pad=4)
    canvas.clean(axis)
    axis.tick_params(axis="y", length=0)


def _milliseconds(time_us: float) -> str:
    return f"{time_us / 1e3:.3g} ms" if time_us < 99_500 else f"{time_us / 1e3:.0f} ms"


def _network(row: Row) -> str:
    part = "" if row.layer == "all" else f" {row.layer}"
    return f"{row.model.partition('-')[0]}{part}, {row.height}x{row.width} pixels, batch {row.batch}"
