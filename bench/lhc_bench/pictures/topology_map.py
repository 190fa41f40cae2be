"""The picture of what a network learned: density, live taps, patterns and kernel shapes of every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lhc_bench.files import replace_whole
from lhc_bench.pictures.canvas import write_title
from lhc_triton.planning.schema import LayerTopology

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIVE = "#0b6e99"
DEAD = "#eef2f4"
TARGET = "#c8553d"
OVER_LINE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
SHAPES_SHOWN = 6
DPI = 200


def kernel_shapes(topology: LayerTopology) -> list[tuple[np.ndarray, float]]:
    """Kernel shapes of a layer, most frequent first.

    Args:
        topology: the layer. A *shape* is the set of live taps of one (filter group, input block) pair.

    Returns:
        Pairs of a boolean [kh, kw] array and its share of all pairs, in (0, 1]; equal shares keep the
        order of the taps, so the result is deterministic.
    """
    mask = topology.block_mask()
    kernels = mask.reshape(-1, *topology.geometry.kernel)
    counts = Counter(kernel.tobytes() for kernel in kernels)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shape = topology.geometry.kernel
    return [(np.frombuffer(key, dtype=bool).reshape(shape), n / len(kernels)) for key, n in ranked]


def topology_statistics(topologies: Sequence[LayerTopology]) -> list[dict[str, Any]]:
    """The numbers behind the picture, one JSON-ready row per layer."""
    rows = []
    for topology in topologies:
        geometry = topology.geometry
        rows.append(
            {
                "layer": topology.name,
                "in_channels": geometry.in_channels,
                "out_channels": geometry.out_channels,
                "kernel": list(geometry.kernel),
                "density": topology.density,
                "weights": geometry.weights,
                "live_weights": topology.live_weights,
                "macs": geometry.macs,
                "live_macs": topology.live_macs,
                "groups": topology.groups,
                "patterns": len(topology.patterns),
                "tap_density": topology.block_mask().mean(axis=(0, 1)).tolist(),
                "shapes": [
                    {"taps": shape.astype(int).tolist(), "share": share}
                    for shape, share in kernel_shapes(topology)[:SHAPES_SHOWN]
                ],
            }
        )
    return rows


def draw_topology(
    topologies: Sequence[LayerTopology], path: Path, title: str, target: float | None = None
) -> Path:
    """Draw one row per layer and write a PNG.

    Args:
        topologies: the layers, in the network's order; at least one.
        path: the PNG to write; its folder must exist. Written beside, then renamed.
        title: first line of the picture.
        target: the density the network was trained for; drawn as a line where given.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is no layer to draw.
    """
    if not topologies:
        raise ValueError("no layer to draw: the network has no convolution with a learned or sparse topology")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(topologies)
    height = 1.0 * rows + 1.7
    figure = Figure(figsize=(11.5, height), layout=None)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows,
        4,
        width_ratios=[2.0, 0.9, 5.2, 4.2],
        left=0.155,
        right=0.985,
        top=1 - 1.05 / height,
        bottom=0.5 / height,
        hspace=0.42,
        wspace=0.13,
    )
    mixed = len({(topology.in_block, topology.out_block) for topology in topologies}) > 1
    widest = max(max(topology.density for topology in topologies) * 1.45, (target or 0) * 1.45)
    for row, topology in enumerate(topologies):
        axes = [figure.add_subplot(grid[row, column]) for column in range(4)]
        _draw_density(axes[0], topology, widest, target, mixed, last=row == rows - 1)
        _draw_taps(axes[1], topology)
        _draw_patterns(axes[2], topology, mixed, last=row == rows - 1)
        _draw_shapes(axes[3], topology)
        if row == 0:
            headings = ["density", "live taps, %", "patterns", "most frequent kernel shapes"]
            for axis, heading in zip(axes, headings, strict=True):
                box = axis.get_position()
                figure.text(
                    (box.x0 + box.x1) / 2,
                    1 - 0.78 / height,
                    heading,
                    ha="center",
                    va="center",
                    fontsize=10,
                    fontweight="bold",
                )
    write_title(figure, title, 0.015, 1 - 0.36 / height, 13)
    return replace_whole(path, lambda beside: figure.savefig(beside, dpi=DPI, format="png"))


def _draw_density(
    axis: Axes, topology: LayerTopology, widest: float, target: float | None, mixed: bool, last: bool
) -> None:
    geometry = topology.geometry
    axis.barh([0], [topology.density], height=0.5, color=LIVE)
    axis.text(
        topology.density + widest * 0.02,
        0,
        f"{topology.density:.3f}",
        va="center",
        fontsize=9,
        bbox=OVER_LINE,
    )
    if target is not None:
        axis.axvline(target, color=TARGET, linewidth=1, linestyle="--", zorder=0)
    axis.set_xlim(0, widest)
    axis.set_ylim(-0.5, 0.5)
    axis.set_yticks([0])
    kernel = "x".join(map(str, geometry.kernel))
    label = f"{topology.name}\n{geometry.in_channels} → {geometry.out_channels}, {kernel}"
    if mixed:
        label += f"\nblocks {topology.in_block} x {topology.out_block}"
    axis.set_yticklabels([label], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8, labelbottom=last)
    axis.xaxis.set_major_locator(_at_most(4))
    if last and target is not None:
        axis.set_xlabel(f"share of weights alive; dashed: target {target:g}", fontsize=8)
    elif last:
        axis.set_xlabel("share of weights alive", fontsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _draw_taps(axis: Axes, topology: LayerTopology) -> None:
    density = topology.block_mask().mean(axis=(0, 1))
    axis.imshow(density, cmap="Blues", vmin=0, vmax=max(float(density.max()), 1e-9) * 1.25)
    axis.set_xticks([])
    axis.set_yticks([])
    for (r, s), value in np.ndenumerate(density):
        label = f"{100 * value:.0f}"
        shade = "white" if value > 0.75 * density.max() else "black"
        axis.text(s, r, label, ha="center", va="center", fontsize=6.5, color=shade)


def _draw_patterns(axis: Axes, topology: LayerTopology, mixed: bool, last: bool) -> None:
    from matplotlib.colors import ListedColormap

    kh, kw = topology.geometry.kernel
    mask = topology.block_mask().reshape(topology.groups, -1)
    colors = ListedColormap([DEAD, LIVE])
    axis.imshow(mask, cmap=colors, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    for block in range(1, topology.in_blocks):
        axis.axvline(block * kh * kw - 0.5, color="white", linewidth=1.2)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_ylabel(f"{topology.groups}", fontsize=8, rotation=0, ha="right", va="center", labelpad=3)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if last:
        channels, filters = ("", "") if mixed else (f"{topology.in_block} ", f"{topology.out_block} ")
        text = f"columns: taps of each block of {channels}channels; rows: groups of {filters}filters"
        axis.set_xlabel(text, fontsize=8)


def _draw_shapes(axis: Axes, topology: LayerTopology) -> None:
    kh, kw = topology.geometry.kernel
    axis.set_xlim(0, SHAPES_SHOWN)
    axis.set_ylim(-0.42, 1)
    axis.set_axis_off()
    unit_x, unit_y = axis.bbox.width / SHAPES_SHOWN, axis.bbox.height / 1.42
    cell = min(0.78 * unit_x / kw, 0.92 * unit_y / kh)
    for position, (shape, share) in enumerate(kernel_shapes(topology)[:SHAPES_SHOWN]):
        left = position + 0.5 - cell * kw / unit_x / 2
        for (r, s), live in np.ndenumerate(shape):
            corner = (left + s * cell / unit_x, 0.96 - (r + 1) * cell / unit_y)
            axis.add_patch(_cell(corner, cell / unit_x, cell / unit_y, LIVE if live else DEAD))
        axis.text(position + 0.5, -0.2, f"{100 * share:.0f} %", ha="center", va="center", fontsize=8)


def _cell(corner: tuple[float, float], width: float, height: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=color, edgecolor="white", linewidth=0.8)


def _at_most(ticks: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(ticks)
