"""Pictures of a results file: speed-up against density, and the layers one by one. Never from a live run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .demo_picture import DENSE, IDEAL, SPARSE
from .files import replace_whole
from .rows import Results, Row, describe, nearest_density, read_results

# The first is the demo's colour of a sparse network; the others only appear beside it.
BACKEND_COLORS = (SPARSE, "#e0a030", "#5b8c5a", "#7a5195")
LAYER_DENSITY = 0.1


def draw(results_path: str | Path, out_dir: str | Path) -> list[Path]:
    """Draw a results.json: speedup.png and layers.png.

    Args:
        results_path: what `run_suite` wrote.
        out_dir: folder for the pictures; made where it does not exist.

    Returns:
        The paths of the two pictures.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds no row. Nothing is made then.
        OSError: if the folder cannot be written.
    """
    results = read_results(results_path)
    if not results.rows:
        raise ValueError(f"{results_path} holds no rows: there is nothing to draw")
    out = Path(out_dir)
    return [
        _picture(results, out / "speedup.png", (8.0, 5.2), _draw_speedup),
        _picture(results, out / "layers.png", (_layers_width(results), 6.0), _draw_layers),
    ]


def _picture(
    results: Results, path: Path, size: tuple[float, float], draw_on: Callable[[Any, Results], str]
) -> Path:
    """Let ``draw_on`` fill the axis and return a title; add title and caption, and save."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    title = draw_on(axis, results)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=12)
    figure.supxlabel(describe(results.env, results.rows), fontsize=8, color="#555555", x=0.01, ha="left")
    return replace_whole(path, lambda beside: figure.savefig(beside, dpi=160, format="png"))


def _draw_speedup(axis: Any, results: Results) -> str:
    rows, densities = results.rows, results.densities
    by_backend: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_backend[row.backend][nearest_density(row.density, densities)].append(row.speedup)
    shown = sorted({density for found in by_backend.values() for density in found})
    axis.axhline(1, color="black", linewidth=0.9, linestyle=":", label="best dense, 1x")
    axis.plot(shown, [1 / d for d in shown], color=IDEAL, linestyle="--", label="all MACs saved, 1 / density")
    for index, (backend, found) in enumerate(sorted(by_backend.items())):
        color = BACKEND_COLORS[index % len(BACKEND_COLORS)]
        at = sorted(found)
        means = [math.exp(math.fsum(map(math.log, found[d])) / len(found[d])) for d in at]
        lows, highs = [min(found[d]) for d in at], [max(found[d]) for d in at]
        axis.fill_between(
            at, lows, highs, color=color, alpha=0.18, linewidth=0, label=f"{backend}, min to max"
        )
        axis.plot(at, means, color=color, marker="o", label=f"{backend}, geometric mean")
        for density, mean in zip(at, means, strict=True):
            axis.annotate(
                f"{mean:.2f}x", (density, mean), xytext=(0, 7), textcoords="offset points",
                ha="center", fontsize=8, color=color, fontweight="bold",
            )  # fmt: skip
    _log_axes(axis, shown, [row.speedup for row in rows])
    axis.set_xlabel("density: live share of the weights")
    axis.set_ylabel("times the speed of the best dense")
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    cases = len({row.case for row in rows})
    return f"Speed-up against the best dense, {cases} {'case' if cases == 1 else 'cases'}"


def _log_axes(axis: Any, densities: Sequence[float], speedups: Sequence[float]) -> None:
    """Scale both axes by powers of two, with labels at the densities that were measured."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(densities)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = min(1.0, *speedups), max(1.0, 1 / min(densities), *speedups)
    powers = range(math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 2)
    axis.yaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}x"))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(NullLocator())
    axis.set_ylim(low / 1.25, high * 1.25)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _at_density(results: Results) -> tuple[float, list[Row]]:
    """Return the density nearest to 0.1 that has rows, and its rows."""
    densities = results.densities
    sorted_under = [(nearest_density(row.density, densities), row) for row in results.rows]
    density = nearest_density(LAYER_DENSITY, [d for d, _ in sorted_under])
    return density, [row for d, row in sorted_under if d == density]


def _series(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    return sorted({(row.backend, row.in_block, row.out_block) for row in rows})


def _layers_width(results: Results) -> float:
    rows = _at_density(results)[1]
    return max(8.0, 2.0 + 0.3 * len({row.case for row in rows}) * (1 + len(_series(rows))))


def _draw_layers(axis: Any, results: Results) -> str:
    density, rows = _at_density(results)
    cases = list(dict.fromkeys(row.case for row in rows))
    series = _series(rows)
    width = 0.8 / len(series)
    for index, key in enumerate(series):
        backend, in_block, out_block = key
        mine = {row.case: row for row in rows if (row.backend, row.in_block, row.out_block) == key}
        at = [place + (index - (len(series) - 1) / 2) * width for place in range(len(cases))]
        color = BACKEND_COLORS[index % len(BACKEND_COLORS)]
        label = f"{backend}, blocks of {in_block} channels x {out_block} filters"
        for place, case in zip(at, cases, strict=True):
            if case not in mine:
                continue
            row = mine[case]
            axis.bar([place], [row.speedup], width=width * 0.92, color=color, label=label)
            label = "_nolegend_"
            # The band is the backend's own scatter; the baseline's median is one number.
            low, high = row.baseline_us / row.p80_us, row.baseline_us / row.p20_us
            axis.vlines([place], low, high, color="black", linewidth=1)
            text_at = max(row.speedup, high)
            axis.text(place, text_at, f"{row.speedup:.2f}", ha="center", va="bottom", fontsize=8)
    axis.axhline(1, color=DENSE, linewidth=1.2, linestyle="--", label="best dense, 1x")
    names = [case.replace("/", "\n", 1) for case in cases]
    many = len(cases) > 5
    axis.set_xticks(range(len(cases)), names, fontsize=8, rotation=90 if many else 0)
    top = max(1.0, *(max(row.speedup, row.baseline_us / row.p20_us) for row in rows))
    axis.set_ylim(0, top * 1.3)
    axis.set_ylabel("times the speed of the best dense")
    axis.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    return f"Each case at density {density:g}; lines span p20 to p80"
