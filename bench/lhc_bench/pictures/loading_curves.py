"""Images a second against worker threads, beside what decoding alone would allow."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from lhc_bench.measure.loading import DECODE, LoadingResults, LoadingRow
from lhc_bench.measure.rows import origin
from lhc_bench.pictures import canvas
from lhc_bench.pictures.demo_bars import DENSE, SPARSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TALL, ACROSS, LEFT = 3.3, 6.2, 0.75  # inches
_LOOKS = {"train": (SPARSE, "o"), "evaluation": ("#e69f00", "s")}
_NAMES = {
    "train": "training: random crops, flips",
    "evaluation": "evaluation: middle crops",
}


def loading_figure(results: LoadingResults) -> Figure:
    """Draw the rate of each kind of batch against the workers, with the rate that decoding alone sets."""
    width = LEFT + ACROSS + 0.25
    caption = [part for line in _caption(results) for part in textwrap.wrap(line, int(width * 18))]
    legend_top = 0.25 + canvas.CAPTION_LINE * len(caption) + 2 * canvas.LEGEND_LINE
    bottom = legend_top + 0.55
    figure = canvas.frame(
        width, bottom + TALL + 0.5, "How fast batches of image files are delivered", caption
    )
    axis = canvas.panel(figure, LEFT, bottom, ACROSS, TALL)
    _lines(axis, results)
    canvas.legend(figure, axis, legend_top, columns=2)
    return figure


def _lines(axis: Axes, results: LoadingResults) -> None:
    decode = next(row for row in results.rows if row.kind == DECODE)
    curves = {kind: [row for row in results.rows if row.kind == kind] for kind in _LOOKS}
    counts = sorted({row.workers for mine in curves.values() for row in mine} or {0})
    place = {count: index for index, count in enumerate(counts)}
    cpus = results.env["cpus"]
    ideal = [decode.images_per_s * min(max(count, 1), cpus) for count in counts]
    axis.plot(
        range(len(counts)), ideal, color=DENSE, linestyle="--", linewidth=1.5,
        label=f"ideal: Pillow's bare decoding, {decode.images_per_s:,.0f} a thread",
    )  # fmt: skip
    for kind, mine in curves.items():
        if mine:
            _curve(axis, kind, sorted(mine, key=lambda row: row.workers), place)
    for count in counts:
        _numbers(
            axis, place[count], [row for mine in curves.values() for row in mine if row.workers == count]
        )
    highest = max([*ideal, *(row.p80_images_per_s for mine in curves.values() for row in mine)])
    axis.set_ylim(0, highest * 1.12)
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    axis.set_xlim(-0.3, len(counts) - 0.7)
    axis.set_xlabel("worker threads (0: decoded when asked for)", fontsize=9)
    axis.set_ylabel("images per second", fontsize=9)
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    axis.set_axisbelow(True)
    canvas.clean(axis)


def _curve(axis: Axes, kind: str, rows: list[LoadingRow], place: dict[int, int]) -> None:
    color, marker = _LOOKS[kind]
    rates = [row.images_per_s for row in rows]
    spread = [
        [row.images_per_s - row.p20_images_per_s for row in rows],
        [row.p80_images_per_s - row.images_per_s for row in rows],
    ]
    at = [place[row.workers] for row in rows]
    axis.errorbar(
        at, rates, yerr=spread, color=color, marker=marker, markersize=5, capsize=3, elinewidth=1,
        label=_NAMES[kind],
    )  # fmt: skip


def _numbers(axis: Axes, place: int, rows: list[LoadingRow]) -> None:
    """Write the rates of one number of workers: the curves often lie together, so the lower's below."""
    for rank, row in enumerate(sorted(rows, key=lambda row: -row.images_per_s)):
        axis.annotate(
            f"{row.images_per_s:,.0f}", (place, row.images_per_s), xytext=(0, -9 if rank else 9),
            textcoords="offset points", ha="center", va="top" if rank else "bottom", fontsize=8,
            color=_LOOKS[row.kind][0], bbox=canvas.OVER_LINE, zorder=4,
        )  # fmt: skip


def _caption(results: LoadingResults) -> list[str]:
    env = results.env
    first = [str(env.get("device", "unknown device")), f"{env['cpus']} CPU{'s' if env['cpus'] > 1 else ''}"]
    decode = next(row for row in results.rows if row.kind == DECODE)
    pictures = env.get("pictures")
    size = f" of {pictures['mean_bytes'] / 1000:.0f} kB" if isinstance(pictures, dict) else ""
    first.append(f"{decode.images} JPEGs{size}, {decode.width}x{decode.height}, in the page cache")
    if env.get("rounds"):
        first.append(f"medians of up to {env['rounds']} interleaved rounds, bars from 20 to 80 %")
    lines = [", ".join(first)]
    memory = next((row for row in results.rows if row.kind == "memory"), None)
    if memory is not None:
        lines.append(
            f"Images in memory ({memory.width}x{memory.height}, shifts and flips) need no workers: "
            f"{memory.images_per_s:,.0f} a second"
        )
    return [*lines, *origin(env)]
