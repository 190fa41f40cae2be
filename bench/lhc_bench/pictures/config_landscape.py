"""The landscape of launch configs: which blocks are fast, drawn from the records of the tuner's store."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lhc_bench.files import write_figure
from lhc_triton.files import parse_json
from lhc_triton.runtime.choosing.launch_configs import config_of, key_parts
from lhc_triton.runtime.choosing.timing import geometric_mean
from lhc_triton.runtime.choosing.timing_store import Measured, TimingStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORST = 2.0
"""The slow-down at which the colours end."""

MAX_WIDTHS = 4
CELL, GAP, LEFT, RIGHT, TOP, BOTTOM = 0.62, 0.28, 1.05, 1.1, 1.0, 0.85  # inches
GREY = "#555555"
Cell = tuple[int, int, int, int]  # tile width, stages, block_m, block_n


@dataclass(frozen=True)
class Landscape:
    """What the layers of one device and dtype say about the configs.

    Attributes:
        device, dtype, kernels, triton: what the records are of.
        layers: tuned layers, by tile width.
        slowdown: for each cell, the geometric mean over its layers of the cell's least time over the layer's.
        wins: for each cell, the layers whose fastest config is in it.
        failed: cells of which no config worked.
        configs, failures: how many records there are, and how many of them failed.
    """

    device: str
    dtype: str
    kernels: str
    triton: str
    layers: Mapping[int, int]
    slowdown: Mapping[Cell, float]
    wins: Mapping[Cell, int]
    failed: frozenset[Cell]
    configs: int
    failures: int


def is_store(path: Path) -> bool:
    """Return whether a JSON file looks like a store of measurements; False if it cannot be read."""
    try:
        document = parse_json(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "records" in document


def landscapes(store: TimingStore) -> list[Landscape]:
    """Read the landscapes off a store, one for each device, kernels, Triton and dtype, in that order.

    Raises:
        ValueError, OSError: as TimingStore.read_checked.
    """
    groups: dict[tuple[str, ...], list[tuple[int, Mapping[str, Measured]]]] = defaultdict(list)
    for key, records in store.read_checked().items():
        parts = key_parts(key)
        if parts is not None and parts.tile_width:
            groups[parts[:4]].append((parts.tile_width, records))
    found = [_landscape(group, layers) for group, layers in sorted(groups.items())]
    return [landscape for landscape in found if landscape.slowdown]


def _landscape(group: tuple[str, ...], layers: Sequence[tuple[int, Mapping[str, Measured]]]) -> Landscape:
    ratios: dict[Cell, list[float]] = defaultdict(list)
    wins: dict[Cell, int] = defaultdict(int)
    widths: dict[int, int] = defaultdict(int)
    seen: set[Cell] = set()
    configs = failures = 0
    for width, records in layers:
        least: dict[Cell, float] = {}
        for name, record in records.items():
            config = config_of(name)
            if config is None:
                continue
            configs += 1
            cell = (width, config.num_stages, config.block_m, config.block_n)
            seen.add(cell)
            if isinstance(record, str):
                failures += 1
            else:
                least[cell] = min(record, least.get(cell, math.inf))
        if least:
            widths[width] += 1
            best = min(least, key=lambda cell: (least[cell], cell))
            wins[best] += 1
            for cell, time in least.items():
                ratios[cell].append(time / least[best])
    means = {cell: geometric_mean(r) for cell, r in ratios.items()}
    device, kernels, triton, dtype = group
    failed = frozenset(seen - set(means))
    return Landscape(device, dtype, kernels, triton, widths, means, wins, failed, configs, failures)


def draw_landscapes(store_path: str | Path, out_dir: str | Path) -> list[Path]:
    """Draw a store's landscapes: a row of panels for each tile width, a panel for each number of stages.

    Args:
        store_path: the file that `lhc-triton tune` wrote.
        out_dir: folder for the pictures; made where it does not exist.

    Returns:
        The paths of the pictures, landscape-<device>-<dtype>.png.

    Raises:
        ValueError: the store holds no measured config, or cannot be read. Nothing is made then.
        OSError: if the folder cannot be written.
    """
    try:
        found = landscapes(TimingStore(store_path))
    except ValueError as error:
        raise ValueError(f"{store_path} is not a store of `lhc-triton tune`: {error}") from None
    if not found:
        raise ValueError(f"{store_path} holds no measured config: run lhc-triton tune")
    paths: dict[Path, Landscape] = {}
    for landscape in found:
        slug = re.sub("[^a-z0-9]+", "-", f"{landscape.device} {landscape.dtype}".lower()).strip("-")
        path = Path(out_dir) / f"landscape-{slug}.png"
        # Of several versions of the kernels, the one that most is known about.
        if path not in paths or landscape.configs >= paths[path].configs:
            paths[path] = landscape
    for path, landscape in paths.items():
        write_figure(path, draw_landscape(landscape), dpi=200, format="png")
    return list(paths)


def draw_landscape(landscape: Landscape) -> Figure:
    """Return the figure of one landscape."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = set(landscape.slowdown) | landscape.failed
    by_layers = sorted(landscape.layers, key=lambda width: -landscape.layers[width])
    widths = sorted(by_layers[:MAX_WIDTHS])
    stages, ms, ns = (sorted({cell[axis] for cell in cells if cell[0] in widths}) for axis in (1, 2, 3))
    wide, tall = CELL * len(ns), CELL * len(ms)
    width = max(7.2, LEFT + RIGHT + len(stages) * (wide + GAP))
    height = TOP + BOTTOM + len(widths) * (tall + GAP)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    _write_texts(figure, landscape, len(by_layers) - len(widths))
    for row, tile_width in enumerate(widths):
        bottom = height - TOP - (row + 1) * tall - row * GAP
        for column, depth in enumerate(stages):
            left = LEFT + column * (wide + GAP)
            axis = figure.add_axes((left / width, bottom / height, wide / width, tall / height))
            _draw_panel(axis, landscape, tile_width, depth, ms, ns)
            axis.tick_params(labelleft=column == 0, labelbottom=row == len(widths) - 1)
            if row == 0:
                axis.set_title(f"{depth} stages", fontsize=9)
            if column == 0:
                layers = landscape.layers[tile_width]
                label = f"tiles of {tile_width}\n{layers} {'layer' if layers == 1 else 'layers'}"
                axis.set_ylabel(f"{label}\n\nBLOCK_M", fontsize=8)
            if row == len(widths) - 1:
                axis.set_xlabel("BLOCK_N", fontsize=8)
    _draw_scale(figure, (width - RIGHT + 0.3) / width, BOTTOM / height, 1 - (TOP + BOTTOM) / height)
    return figure


def _draw_panel(
    axis: Axes, landscape: Landscape, width: int, stages: int, ms: Sequence[int], ns: Sequence[int]
) -> None:
    from matplotlib.patches import Rectangle

    colors = _colors()
    for y, block_m in enumerate(ms):
        for x, block_n in enumerate(ns):
            cell = (width, stages, block_m, block_n)
            slowdown = landscape.slowdown.get(cell)
            face = "#f2f2f2" if slowdown is None else colors(_shade(slowdown))
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5))
            if slowdown is None:
                text = "failed" if cell in landscape.failed else ""
                axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6, color=GREY)
                continue
            ink = "white" if _shade(slowdown) < 0.45 else "black"
            wins = landscape.wins.get(cell, 0)
            weight = "bold" if wins else "normal"
            at = y + (0.38 if wins else 0.5)
            axis.text(
                x + 0.5, at, f"{slowdown:.2f}x", ha="center", va="center", fontsize=7.5, color=ink,
                fontweight=weight,
            )  # fmt: skip
            if wins:
                axis.text(
                    x + 0.5, y + 0.72, f"fastest: {wins}", ha="center", va="center", fontsize=5.5, color=ink
                )
    axis.set_xlim(0, len(ns))
    axis.set_ylim(len(ms), 0)
    axis.set_xticks([x + 0.5 for x in range(len(ns))], [str(n) for n in ns])
    axis.set_yticks([y + 0.5 for y in range(len(ms))], [str(m) for m in ms])
    axis.tick_params(length=0, labelsize=8)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _write_texts(figure: Figure, landscape: Landscape, hidden: int) -> None:
    width, height = figure.get_size_inches()
    title = f"Launch configs on {landscape.device}, {landscape.dtype}: time over each layer's fastest"
    figure.text(0.12 / width, 1 - 0.24 / height, title, fontsize=11, fontweight="bold", va="center")
    subtitle = "geometric mean over the layers that tried a block, each with its best warps and steps; "
    subtitle += "fastest: layers that no other block serves better; empty: not tried"
    figure.text(0.12 / width, 1 - 0.48 / height, subtitle, fontsize=8, color=GREY, va="center")
    layers = sum(landscape.layers.values())
    caption = f"{layers} layers, {landscape.configs} configs measured, {landscape.failures} of them failed; "
    caption += f"{landscape.kernels}, {landscape.triton}; cold L2, CUDA graphs, medians"
    if hidden:
        caption += f"; {hidden} rarer tile widths left out"
    figure.text(0.12 / width, 0.16 / height, caption, fontsize=7, color=GREY, va="center")


def _draw_scale(figure: Figure, left: float, bottom: float, tall: float) -> None:
    """Draw the colour scale: logarithmic, 1 to WORST."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axis = figure.add_axes((left, bottom, 0.16 / figure.get_size_inches()[0], tall))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), _colors()), cax=axis)
    marks = [1.0, 1.1, 1.25, 1.5, WORST]
    bar.set_ticks([_shade(mark) for mark in marks], labels=[f"{mark:g}x" for mark in marks])
    axis.invert_yaxis()
    axis.tick_params(labelsize=7.5, length=2)
    bar.outline.set_visible(False)


def _shade(slowdown: float) -> float:
    return min(1.0, math.log(slowdown) / math.log(WORST))


def _colors() -> Any:
    import matplotlib

    return matplotlib.colormaps["YlGnBu_r"]
