"""Pictures of a results file, never of a live run: curves over density, bars by layer or engine, and more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lhc_bench.measure import loading, planner
from lhc_bench.measure.rows import read_results, suite_of
from lhc_bench.pictures.canvas import save
from lhc_bench.pictures.density_curves import peak_figure, speedup_figure
from lhc_bench.pictures.engine_bars import engines_figure, has_engines
from lhc_bench.pictures.loading_curves import loading_figure
from lhc_bench.pictures.planner_bars import planner_figure
from lhc_bench.pictures.scaling_curves import scales, scaling_figure
from lhc_bench.pictures.speedup_bars import layers_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results_path: str | Path, out_dir: str | Path) -> list[Path]:
    """Draw a results.json.

    Args:
        results_path: what a suite wrote.
        out_dir: folder for the pictures; made where it does not exist.

    Returns:
        The paths of the pictures: speedup.png and layers.png; peak.png (the share of the machine's peak)
        where single layers were measured; for several batches or thread counts scaling.png alone;
        engines.png alone where other engines were measured; loading.png and planner.png for the suites of
        those names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds no row. Nothing is made then.
        OSError: if the folder cannot be written.
    """
    out = Path(out_dir)
    paths = []
    for name, figure in _figures(results_path).items():
        paths.append(save(figure(), out / f"{name}.png"))
    return paths


def _figures(path: str | Path) -> dict[str, Callable[[], Figure]]:
    suite = suite_of(path)
    if suite == loading.SUITE:
        return {"loading": partial(loading_figure, loading.read_loading(path))}
    if suite == planner.SUITE:
        return {"planner": partial(planner_figure, planner.read_planner(path))}
    results = read_results(path)
    if not results.rows:
        raise ValueError(f"{path} holds no rows: there is nothing to draw")
    if has_engines(results):
        return {"engines": partial(engines_figure, results)}
    if scales(results):
        return {"scaling": partial(scaling_figure, results)}
    figures = {"speedup": partial(speedup_figure, results), "layers": partial(layers_figure, results)}
    # In a whole network, the share of the weights that live is not that of the MACs.
    if all(row.peak_share and row.kernel for row in results.rows):
        figures["peak"] = partial(peak_figure, results)
    return {**figures}
