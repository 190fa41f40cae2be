"""The planner beside other ways to form tiles: predicted times over the best, and how long planning takes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lhc_bench.measure.planner import PlannerResults, PlannerRow
from lhc_bench.measure.planner_rivals import METHODS
from lhc_bench.measure.rows import origin
from lhc_bench.pictures import canvas
from lhc_bench.pictures.demo_bars import DENSE, SPARSE
from lhc_triton.runtime.choosing.timing import geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS, TALL, LEFT, GAP = 7.6, 1.65, 0.75, 0.5  # inches
HIGHEST = 2.6  # of the ratios' axis; taller bars are cut, and say their value
COLOURS = {"correlated": SPARSE, "independent": "#e69f00", "few patterns": "#009e73"}


def planner_figure(results: PlannerResults) -> Figure:
    """Draw a panel of predicted ratios for each cost model, and one of planning times."""
    models = list(dict.fromkeys(row.cost_model for row in results.rows))
    methods = [name for name in METHODS if any(row.method == name for row in results.rows)]
    width = LEFT + ACROSS + 0.25
    caption = [part for line in _caption(results) for part in textwrap.wrap(line, int(width * 18))]
    legend_top = 0.25 + canvas.CAPTION_LINE * len(caption) + canvas.LEGEND_LINE
    bottom = legend_top + 0.45
    height = bottom + (len(models) + 1) * (TALL + GAP) + 0.35
    figure = canvas.frame(width, height, "Ways to form tiles: predicted times, and planning times", caption)
    times = canvas.panel(figure, LEFT, bottom, ACROSS, TALL)
    _planning(times, results.rows, methods)
    for index, model in enumerate(models):
        place = bottom + (len(models) - index) * (TALL + GAP)
        axis = canvas.panel(figure, LEFT, place, ACROSS, TALL)
        _ratios(axis, [row for row in results.rows if row.cost_model == model], methods)
        source = results.env.get("cost_models", {}).get(model, "")
        axis.set_title(
            f"{model}: {source}" if source else model, fontsize=8.5, fontweight="bold", loc="left", pad=5
        )
    canvas.legend(figure, axis, legend_top, columns=len(COLOURS))
    return figure


def _ratios(axis: Axes, rows: Sequence[PlannerRow], methods: Sequence[str]) -> None:
    thick = 0.8 / len(COLOURS)
    for place, (kind, colour) in enumerate(COLOURS.items()):
        for index, method in enumerate(methods):
            found = [row.predicted_ratio for row in rows if (row.method, row.topology) == (method, kind)]
            if not found:
                continue
            at, ratio = index + (place - (len(COLOURS) - 1) / 2) * thick, geometric_mean(found)
            axis.bar(
                [at], [min(ratio, HIGHEST) - 1], bottom=1, width=thick * 0.92, color=colour,
                label=kind if index == 0 else None,
            )  # fmt: skip
            axis.annotate(
                f"{ratio:.3f}" if ratio < 1.1 else f"{ratio:.2f}", (at, min(ratio, HIGHEST)), xytext=(0, 2),
                textcoords="offset points", ha="center", va="bottom", fontsize=6.5, rotation=90,
            )  # fmt: skip
    axis.set_ylim(1, HIGHEST + 0.55)
    axis.set_ylabel("predicted time\nover the best", fontsize=8)
    _methods(axis, methods)


def _planning(axis: Axes, rows: Sequence[PlannerRow], methods: Sequence[str]) -> None:
    for index, method in enumerate(methods):
        times = sorted(max(row.planning_ms, 0.01) for row in rows if row.method == method)
        middle = times[len(times) // 2]
        axis.vlines([index], times[0], times[-1], color=DENSE, linewidth=2)
        axis.plot([index], [middle], "o", color=SPARSE, markersize=6)
        axis.annotate(
            f"{middle:.1f}, at most {times[-1]:,.0f}", (index, times[-1]), xytext=(0, 4),
            textcoords="offset points", ha="center", fontsize=7,
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylim(axis.get_ylim()[0], axis.get_ylim()[1] * 4)
    axis.set_ylabel("planning, ms\n(measured)", fontsize=8)
    axis.set_title("median, least and most over all cases", fontsize=8.5, loc="left", pad=5)
    _methods(axis, methods)


def _methods(axis: Axes, methods: Sequence[str]) -> None:
    axis.set_xticks(range(len(methods)), methods, fontsize=8)
    axis.set_xlim(-0.6, len(methods) - 0.4)
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    axis.set_axisbelow(True)
    canvas.clean(axis)
    axis.tick_params(axis="x", length=0)


def _caption(results: PlannerResults) -> list[str]:
    densities = sorted(results.env.get("densities", []))
    cases = len({row.case for row in results.rows})
    spread = f", densities {', '.join(f'{density:g}' for density in densities)}" if densities else ""
    lines = [
        f"{cases} layers and networks{spread}, blocks of 32 channels x 16 filters or 1; geometric means",
        "Predicted by the cost models, not measured; the optimum (exhaustive) for up to 10 filter groups",
        f"Planned on {results.env.get('device', 'an unknown device')}",
    ]
    return [*lines, *origin(results.env)]
