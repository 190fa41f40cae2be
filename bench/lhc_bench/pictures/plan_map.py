"""The picture of a plan: every layer's filters by tile against its entries, waste in another colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lhc_bench.files import write_figure
from lhc_bench.pictures.topology_map import DEAD, DPI, LIVE, TARGET
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.schema import LayerPlan

COLUMNS = 3
MOST_LAYERS = 60


def plan_matrix(layer: LayerPlan) -> np.ndarray:
    """Return what becomes of every (filter, entry) pair, int8 [O, entries].

    Filters are in the order in which the tiles compute them. 0: dead, and skipped; 1: live; 2: dead, and
    computed, since another filter of the tile has the entry.
    """
    topology = layer.topology
    rows = []
    for tile in layer.tiles:
        computed = np.zeros(topology.entries, dtype=np.int8)
        computed[list(tile.entries)] = 2
        for group in tile.groups:
            row = computed.copy()
            row[list(topology.pattern_of(group))] = 1
            rows += [row] * len(topology.group_filters(group))
    return np.stack(rows)


def draw_plan(plan: Plan, path: Path, title: str) -> Path:
    """Draw a panel for each planned layer and write a PNG.

    Args:
        plan: with at least one layer; the first 60 are drawn.
        path: the PNG to write; its folder must exist. Written beside, then renamed.
        title: first line of the picture.

    Returns:
        ``path``.

    Raises:
        ValueError: no layer is planned.
    """
    if not plan.layers:
        raise ValueError("no layer to draw: the plan has none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = plan.layers[:MOST_LAYERS]
    rows = -(-len(layers) // COLUMNS)
    height = 1.9 * rows + 1.1
    figure = Figure(figsize=(11.5, height))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows,
        COLUMNS,
        left=0.05,
        right=0.985,
        top=1 - 0.95 / height,
        bottom=0.35 / height,
        hspace=0.5,
        wspace=0.14,
    )
    colours = ListedColormap([DEAD, LIVE, TARGET])
    for index, layer in enumerate(layers):
        axis = figure.add_subplot(grid[index // COLUMNS, index % COLUMNS])
        axis.imshow(plan_matrix(layer), cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        first = 0
        for tile in layer.tiles[:-1]:
            first += sum(len(layer.topology.group_filters(group)) for group in tile.groups)
            axis.axhline(first - 0.5, color="white", linewidth=0.6)
        axis.set_title(
            f"{layer.name}: {layer.backend}, {len(layer.tiles)} tiles", fontsize=7, loc="left", pad=3
        )
        axis.set_xlabel("entries", fontsize=6, labelpad=1)
        axis.set_ylabel("filters, by tile", fontsize=6, labelpad=1)
        axis.tick_params(labelsize=5, length=2)
    figure.text(0.05, 1 - 0.3 / height, title, fontsize=11, weight="bold")
    handles = [Patch(color=colour) for colour in (LIVE, TARGET, DEAD)]
    names = ["live", "computed in vain (waste of a union)", "skipped"]
    figure.legend(handles, names, loc="upper right", ncols=3, fontsize=7, frameon=False)
    return write_figure(path, figure, dpi=DPI, format="png")
