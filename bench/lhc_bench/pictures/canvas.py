"""What the pictures of results share: the frame with title and caption, series and their looks."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lhc_bench.files import write_figure
from lhc_bench.measure.rivals import MASK_FREE
from lhc_bench.measure.rows import Results, Row, describe, nearest_density
from lhc_bench.pictures.demo_bars import SPARSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The demo's colour for our kernels, then colours of the Okabe-Ito palette that colour-blind eyes tell apart
# from it and from each other; markers differ as well.
LOOKS = {
    "native": (SPARSE, "o"),
    "triton": (SPARSE, "o"),
    "torch": ("#e69f00", "s"),
    "auto": ("#009e73", "D"),
    "narrow": ("#cc79a7", "^"),
    "int8": ("#7f3c8d", "P"),
    "bsr": ("#56b4e9", "v"),
    "2:4": ("#000000", "X"),
    "triton grid": (SPARSE, "o"),
    "triton persistent": ("#e69f00", "s"),
    "triton box": ("#009e73", "D"),
    "triton split": ("#cc79a7", "^"),
}
OTHER_LOOK = ("#8c564b", "p")
NAMES = {
    "auto": "auto: what dispatch takes",
    "narrow": "dense, narrower, same MACs",
    "int8": "int8, against dense float32",
    "bsr": "im2col + block-sparse matmul",
    "2:4": "im2col + 2:4 matmul",
}
ORDER = tuple(LOOKS)
GREY = "#555555"
DPI = 200
CAPTION_LINE = 0.15  # inches, as all sizes here
LEGEND_LINE = 0.19
MARGIN = 0.12
OVER_LINE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}

Block = tuple[int, int]
Point = tuple[str, int, int | None]  # case, batch, threads


def point(row: Row) -> Point:
    """Return what was measured, apart from density, mask and backend."""
    return row.case, row.batch, row.threads


def look(backend: str) -> tuple[str, str]:
    """Return colour and marker of a backend or rival."""
    return LOOKS.get(backend, OTHER_LOOK)


def backends_of(rows: Sequence[Row]) -> list[str]:
    """Return the backends and rivals that have rows, our kernels first."""
    found = {row.backend for row in rows}
    return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def blocks_of(rows: Sequence[Row]) -> list[Block]:
    """Return the block sizes of the masks, rising."""
    return sorted({(row.in_block, row.out_block) for row in rows})


def under_block(rows: Sequence[Row], block: Block) -> list[Row]:
    """Return the rows of a block size, and those that do not depend on it."""
    return [row for row in rows if (row.in_block, row.out_block) == block or row.backend in MASK_FREE]


def under_densities(rows: Sequence[Row], densities: Sequence[float]) -> dict[float, list[Row]]:
    """Sort rows under the wanted densities, rising."""
    found: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        found[nearest_density(row.density, densities)].append(row)
    return dict(sorted(found.items()))


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    return write_figure(path, figure, dpi=DPI, format="png")


def caption_lines(results: Results, width: float) -> list[str]:
    """Break the caption into lines for a figure of this width in inches."""
    lines = describe(results.env, results.rows)
    return [part for line in lines for part in textwrap.wrap(line, int(width * 18))]


def frame(width: float, height: float, title: str, caption: Sequence[str]) -> Figure:
    """Make a figure of this size in inches with a title on top and a caption at the bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    write_title(figure, title, MARGIN / width, 1 - 0.24 / height, 12)
    for index, line in enumerate(reversed(caption)):
        at = MARGIN + CAPTION_LINE * index
        figure.text(MARGIN / width, at / height, line, fontsize=7.5, color=GREY, va="center")
    return figure


def write_title(figure: Figure, title: str, left: float, middle: float, size: float) -> None:
    """Write a title in ``size`` points, or smaller where it would run over the right edge.

    Args:
        figure: where to write.
        title: one line.
        left: where it begins, as a share of the figure's width.
        middle: of its height, as a share of the figure's height.
        size: in points.
    """
    text = figure.text(left, middle, title, fontsize=size, fontweight="bold", va="center")
    room = (1 - left) * figure.bbox.width - MARGIN * figure.dpi
    text.set_fontsize(size * min(1.0, room / text.get_window_extent().width))


def panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place given in inches."""
    across, up = figure.get_size_inches()
    axis: Axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    return axis


def legend(figure: Figure, axis: Axes, top: float, columns: int) -> None:
    """Put the axis's legend with its upper edge ``top`` inches above the figure's lower one."""
    width, height = figure.get_size_inches()
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(MARGIN / width, top / height),
        borderaxespad=0,
        borderpad=0,
        ncols=columns,
        fontsize=8.5,
        frameon=False,
    )


def clean(axis: Any) -> None:
    """Remove the frame's upper and right line and make the tick labels small."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=8)


def log_ticks(axis: Any, values: Sequence[float], text: str = "{:g}") -> None:
    """Put ticks at these values only, on a logarithmic ``axes.xaxis`` or ``axes.yaxis``."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text.format(value)))
    axis.set_minor_locator(NullLocator())
