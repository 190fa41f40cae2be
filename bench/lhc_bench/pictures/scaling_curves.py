"""How time grows with the batch and shrinks with the threads, dense and sparse side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lhc_bench.measure.rows import Results, Row
from lhc_bench.pictures import canvas
from lhc_bench.pictures.demo_bars import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TALL, ACROSS = 3.0, 4.3


def scales(results: Results) -> bool:
    """Return whether a case was measured at several batches or thread counts."""
    points = {canvas.point(row) for row in results.rows}
    return len(points) > len({case for case, _, _ in points})


def scaling_figure(results: Results) -> Figure:
    """Draw the time of an image against the batch, and the gain by threads."""
    backends = canvas.backends_of(results.rows)
    width = 0.75 + ACROSS + 0.85 + ACROSS + 0.2
    caption = canvas.caption_lines(results, width)
    legend_top = 0.25 + canvas.CAPTION_LINE * len(caption) + canvas.LEGEND_LINE
    bottom = legend_top + 0.62
    figure = canvas.frame(width, bottom + TALL + 0.75, "Scaling with the batch and with threads", caption)
    left = canvas.panel(figure, 0.72, bottom, ACROSS, TALL)
    right = canvas.panel(figure, 0.72 + ACROSS + 0.85, bottom, ACROSS, TALL)
    _batches(left, results.rows, backends)
    _threads(right, results.rows, backends)
    canvas.legend(figure, left, legend_top, columns=len(backends) + 1)
    return figure


def _batches(axis: Axes, rows: Sequence[Row], backends: Sequence[str]) -> None:
    threads = max(row.threads or 1 for row in rows)
    rows = [row for row in rows if (row.threads or 1) == threads]
    cases: dict[str, set[int]] = {}
    for row in rows:
        cases.setdefault(row.case, set()).add(row.batch)
    case = max(cases, key=lambda name: len(cases[name]))
    mine = sorted((row for row in rows if row.case == case), key=lambda row: row.batch)
    dense = {row.batch: row.baseline_us / row.batch / 1000 for row in mine}
    axis.plot(list(dense), list(dense.values()), color=DENSE, marker="o", markersize=5, label="best dense")
    for backend in backends:
        color, marker = canvas.look(backend)
        curve = {row.batch: row.time_us / row.batch / 1000 for row in mine if row.backend == backend}
        axis.plot(
            list(curve), list(curve.values()), color=color, marker=marker, markersize=5,
            label=canvas.NAMES.get(backend, backend),
        )  # fmt: skip
    ours = {row.batch: row for row in mine if row.backend == backends[0]}
    for batch, row in ours.items():
        slowest = max(other.time_us for other in mine if other.batch == batch)
        axis.annotate(
            f"{row.speedup:.1f}x", (batch, slowest / batch / 1000), xytext=(0, 8),
            textcoords="offset points", ha="center", fontsize=8, fontweight="bold",
            color=canvas.look(backends[0])[0], bbox=canvas.OVER_LINE, zorder=5,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    canvas.log_ticks(axis.xaxis, sorted(cases[case]))
    axis.set_ylim(0, max(dense.values()) * 1.15)
    axis.set_xlabel("images in the batch", fontsize=9)
    axis.set_ylabel("time of one image, ms", fontsize=9)
    axis.set_title(f"{_name(case)}, {threads} threads", fontsize=9.5, fontweight="bold", loc="left", pad=6)
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    axis.set_axisbelow(True)
    canvas.clean(axis)


def _threads(axis: Axes, rows: Sequence[Row], backends: Sequence[str]) -> None:
    """Bars: how many times faster the most threads are than one."""
    groups: dict[tuple[str, int], dict[int, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row.case, row.batch), {}).setdefault(row.threads or 1, []).append(row)
    groups = {key: found for key, found in groups.items() if len(found) > 1}
    most = max((max(found) for found in groups.values()), default=1)
    names = ["best dense", *backends]
    thick = 0.8 / len(names)
    for index, name in enumerate(names):
        color = DENSE if name == "best dense" else canvas.look(name)[0]
        for place, found in enumerate(groups.values()):
            one, many = (_time(found[count], name) for count in (min(found), max(found)))
            if one is None or many is None:
                continue
            at = place + (index - (len(names) - 1) / 2) * thick
            axis.bar([at], [one / many], width=thick * 0.92, color=color)
            axis.annotate(
                f"{one / many:.2f}", (at, one / many), xytext=(0, 3), textcoords="offset points",
                ha="center", va="bottom", fontsize=8, bbox=canvas.OVER_LINE, zorder=4,
            )  # fmt: skip
    axis.axhline(most, color=canvas.GREY, linestyle=":", linewidth=1)
    labels = [f"{_name(case)}\nbatch {batch}" for case, batch in groups]
    axis.set_xticks(range(len(groups)), labels, fontsize=8)
    axis.set_xlim(-0.6, max(len(groups), 1) - 0.4)
    axis.set_ylim(0, most * 1.25)
    axis.set_ylabel("times faster than one thread", fontsize=9)
    axis.set_title(f"{most} threads against one", fontsize=9.5, fontweight="bold", loc="left", pad=6)
    canvas.clean(axis)
    axis.tick_params(axis="x", length=0)


def _time(rows: Sequence[Row], name: str) -> float | None:
    if name == "best dense":
        return rows[0].baseline_us
    return next((row.time_us for row in rows if row.backend == name), None)


def _name(case: str) -> str:
    return case.removesuffix("/all")
