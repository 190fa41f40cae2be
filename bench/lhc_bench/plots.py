"""Pictures of a results file: speed-up against density, and the layers one by one. Never from a live run."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_picture import DENSE, IDEAL, SPARSE
from .files import replace_whole
from .rows import Results, Row, describe, nearest_density, read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The demo's colour of a sparse network, then colours of the Okabe-Ito palette that colour-blind eyes tell
# apart from it and from each other; markers differ as well.
COLORS = (SPARSE, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
MARKERS = "osD^vX"
GREY = "#555555"
LAYER_DENSITY = 0.1
DPI = 200
CAPTION_LINE = 0.15  # inches, as all sizes here
LEGEND_LINE = 0.19
ONE_PANEL = 8  # up to so many cases share one panel; more get a panel per network
BAR = 0.17
OVER_LINE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}

Series = tuple[str, int, int]  # backend, in_block, out_block


def draw(results_path: str | Path, out_dir: str | Path, svg: bool = False) -> list[Path]:
    """Draw a results.json: speedup.png and layers.png.

    Args:
        results_path: what `run_suite` wrote.
        out_dir: folder for the pictures; made where it does not exist.
        svg: write each picture as SVG as well.

    Returns:
        The paths of the pictures.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds no row. Nothing is made then.
        OSError: if the folder cannot be written.
    """
    results = read_results(results_path)
    if not results.rows:
        raise ValueError(f"{results_path} holds no rows: there is nothing to draw")
    out = Path(out_dir)
    paths = []
    for name, figure in (("speedup", _speedup_figure(results)), ("layers", _layers_figure(results))):
        for kind in ("png", "svg") if svg else ("png",):
            paths.append(_save(figure, out / f"{name}.{kind}", kind))
    return paths


def _save(figure: Figure, path: Path, kind: str) -> Path:
    # Without the date, the same results give the same file.
    metadata = {"Date": None} if kind == "svg" else None
    return replace_whole(path, lambda beside: figure.savefig(beside, dpi=DPI, format=kind, metadata=metadata))


def _caption(results: Results, width: float) -> list[str]:
    """Break the caption into lines for a figure of this width in inches."""
    lines = describe(results.env, results.rows)
    return [part for line in lines for part in textwrap.wrap(line, int(width * 18))]


def _figure(width: float, height: float, title: str, caption: Sequence[str]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(0.12 / width, 1 - 0.24 / height, title, fontsize=12, fontweight="bold", va="center")
    for index, line in enumerate(reversed(caption)):
        at = 0.12 + CAPTION_LINE * index
        figure.text(0.12 / width, at / height, line, fontsize=7.5, color=GREY, va="center")
    return figure


def _legend(figure: Figure, axis: Axes, top: float, columns: int) -> None:
    """Put the axis's legend with its upper edge ``top`` inches above the figure's lower one."""
    width, height = figure.get_size_inches()
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.12 / width, top / height),
        borderaxespad=0,
        borderpad=0,
        ncols=columns,
        fontsize=8.5,
        frameon=False,
    )


def _all_series(rows: Sequence[Row]) -> list[Series]:
    return sorted({(row.backend, row.in_block, row.out_block) for row in rows})


def _of(rows: Sequence[Row], series: Series) -> list[Row]:
    return [row for row in rows if (row.backend, row.in_block, row.out_block) == series]


def _label(series: Series) -> str:
    backend, in_block, out_block = series
    return f"{backend}, blocks {in_block}x{out_block}"


def _geomean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _under(rows: Sequence[Row], densities: Sequence[float]) -> dict[float, list[Row]]:
    """Sort rows under the wanted densities, rising."""
    found: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        found[nearest_density(row.density, densities)].append(row)
    return dict(sorted(found.items()))


def _speedup_figure(results: Results) -> Figure:
    rows, densities, all_series = results.rows, results.densities, _all_series(results.rows)
    cases = len({row.case for row in rows})
    title = f"Speed-up against the best dense form, {cases} {'case' if cases == 1 else 'cases'}"
    if cases > 1:
        title += ": geometric mean, min to max"
    width, caption = 7.2, _caption(results, 7.2)
    legend_lines = math.ceil((3 + len(all_series)) / 2)
    legend_top = 0.25 + CAPTION_LINE * len(caption) + LEGEND_LINE * legend_lines
    bottom, tall = legend_top + 0.55, 3.1
    height = bottom + tall + 0.5
    figure = _figure(width, height, title, caption)
    axis = figure.add_axes((0.66 / width, bottom / height, 1 - 0.84 / width, tall / height))

    by_density = _under(rows, densities)
    shown = list(by_density)
    axis.axhline(1, color=DENSE, linewidth=1.4, label="best dense, 1x")
    axis.plot(shown, [1 / d for d in shown], color=IDEAL, linestyle="--", label="1 / density")
    roofs = [_geomean([row.baseline_us / row.floor_us for row in found]) for found in by_density.values()]
    axis.plot(shown, roofs, color=GREY, linestyle=":", label="roof: measured peak rates of this machine")
    means: dict[float, list[tuple[float, str]]] = defaultdict(list)
    band = 0.16 if len(all_series) <= 2 else 0.08
    for index, series in enumerate(all_series):
        color = COLORS[index % len(COLORS)]
        found = {d: [r.speedup for r in at] for d, at in _under(_of(rows, series), densities).items()}
        curve = [_geomean(speedups) for speedups in found.values()]
        lows, highs = [min(s) for s in found.values()], [max(s) for s in found.values()]
        axis.fill_between(list(found), lows, highs, color=color, alpha=band, linewidth=0)
        axis.plot(
            list(found),
            curve,
            color=color,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            label=_label(series),
        )
        for density, mean in zip(found, curve, strict=True):
            means[density].append((mean, color))
    for density, found_means in means.items():
        _annotate(axis, density, sorted(found_means))
    _log_axes(axis, shown, [row.speedup for row in rows], roofs)
    axis.set_xlabel("density: live share of the weights", fontsize=9)
    axis.set_ylabel("times the speed of the best dense form", fontsize=9)
    _clean(axis)
    _legend(figure, axis, legend_top, columns=2)
    return figure


def _annotate(axis: Axes, density: float, means: Sequence[tuple[float, str]]) -> None:
    """Write the largest value above its point and the smallest below: those in between would collide."""
    ends = [(means[-1], 8)] if len(means) == 1 else [(means[-1], 8), (means[0], -14)]
    for (mean, color), offset in ends:
        axis.annotate(
            f"{mean:.2f}x", (density, mean), xytext=(0, offset), textcoords="offset points",
            ha="center", fontsize=8, color=color, fontweight="bold", bbox=OVER_LINE, zorder=5,
        )  # fmt: skip


def _log_axes(
    axis: Axes, densities: Sequence[float], speedups: Sequence[float], roofs: Sequence[float]
) -> None:
    """Scale both axes by powers of two, with labels at the densities that were measured."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(densities)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low = min(1.0, *speedups)
    high = max(1.0, 1 / min(densities), *speedups, *roofs)
    powers = range(math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 2)
    axis.yaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(NullLocator())
    axis.set_xlim(min(densities) / 1.15, max(densities) * 1.15)
    axis.set_ylim(low / 1.35, high * 1.25)
    axis.grid(color="#e3e3e3", linewidth=0.6)
    axis.set_axisbelow(True)


def _layers_figure(results: Results) -> Figure:
    found = _under(results.rows, results.densities)
    density = nearest_density(LAYER_DENSITY, list(found))
    rows = found[density]
    series = _all_series(rows)
    cases = list({row.case: row for row in rows}.values())
    panels: dict[str, list[Row]] = {}
    for row in cases:
        panels.setdefault("" if len(cases) <= ONE_PANEL else row.model, []).append(row)
    columns = 1 if len(panels) == 1 else 2
    lines = math.ceil(len(panels) / columns)
    grouped = [list(panels.values())[line * columns : (line + 1) * columns] for line in range(lines)]
    unit = BAR * (len(series) + 0.9)
    heights = [max(map(len, panel_row)) * unit for panel_row in grouped]

    shared = columns == 2
    width, left = (10.6, 1.55) if shared else (7.2, 2.1)
    caption = _caption(results, width)
    head, between = (1.02 if shared else 0.78), 0.62
    height = head + sum(heights) + between * lines + CAPTION_LINE * len(caption)
    figure = _figure(width, height, f"Speed-up at density {density:g}; lines span p20 to p80", caption)
    longest = max(1.0, *(max(row.speedup, row.baseline_us / row.p20_us) for row in rows))
    top = height - head
    for line, panel_row in enumerate(grouped):
        for column, members in enumerate(panel_row):
            tall = len(members) * unit
            box = (left + column * width / columns, top - tall, width / columns - left - 0.35, tall)
            axis = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            _draw_bars(axis, members, rows, series, shared)
            axis.set_xlim(0, longest * 1.16)
            if line * columns + column + columns >= len(panels):
                axis.set_xlabel("times the speed of the best dense form", fontsize=8.5)
        top -= heights[line] + between
    _legend(figure, figure.axes[0], height - 0.44, columns=len(series) + 1)
    return figure


def _draw_bars(
    axis: Axes, members: Sequence[Row], rows: Sequence[Row], series: Sequence[Series], shared: bool
) -> None:
    """One line per case, a bar per series. ``shared``: the panel's title names the network."""
    thick = 1 / (len(series) + 0.9)
    for index, key in enumerate(series):
        mine = {row.case: row for row in _of(rows, key)}
        color = COLORS[index % len(COLORS)]
        label = _label(key)
        for place, case in enumerate(members):
            if case.case not in mine:
                continue
            row = mine[case.case]
            at = place + (index - (len(series) - 1) / 2) * thick
            axis.barh([at], [row.speedup], height=thick * 0.9, color=color, label=label)
            label = "_nolegend_"
            # The span is the backend's own scatter; the baseline's median is one number.
            low, high = row.baseline_us / row.p80_us, row.baseline_us / row.p20_us
            axis.hlines([at], low, high, color="black", linewidth=0.9)
            text_at = max(row.speedup, high)
            axis.text(text_at, at, f" {row.speedup:.2f}", ha="left", va="center", fontsize=7.5)
    axis.axvline(1, color=DENSE, linewidth=1.4, label="best dense, 1x", zorder=3)
    axis.set_yticks(range(len(members)), [_case_label(row, shared) for row in members], fontsize=8)
    axis.set_ylim(len(members) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    if shared:
        axis.set_title(members[0].model, fontsize=9.5, fontweight="bold", loc="left", pad=4)
    _clean(axis)


def _case_label(row: Row, shared: bool) -> str:
    if row.kernel == 0:
        return row.model
    shape = f"{row.in_channels}→{row.out_channels}, {row.height}²{f', /{row.stride}' * (row.stride > 1)}"
    return f"{row.layer}\n{shape}" if shared else f"{row.model} {row.layer}\n{shape}"


def _clean(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=8)
