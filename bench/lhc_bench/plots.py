"""Pictures of a results file, never of a live run: curves over density, bars by layer, scaling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .curves_picture import peak_figure, speedup_figure
from .layers_picture import layers_figure
from .picture import save
from .rows import Results, read_results
from .scaling_picture import scales, scaling_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results_path: str | Path, out_dir: str | Path, svg: bool = False) -> list[Path]:
    """Draw a results.json.

    Args:
        results_path: what `run_suite` wrote.
        out_dir: folder for the pictures; made where it does not exist.
        svg: write each picture as SVG as well.

    Returns:
        The paths of the pictures: speedup.png and layers.png; peak.png (the share of the machine's peak)
        where single layers were measured; for several batches or thread counts scaling.png alone.

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
    for name, figure in _figures(results).items():
        for kind in ("png", "svg") if svg else ("png",):
            paths.append(save(figure(results), out / f"{name}.{kind}", kind))
    return paths


def _figures(results: Results) -> dict[str, Callable[[Results], Figure]]:
    if scales(results):
        return {"scaling": scaling_figure}
    figures: dict[str, Callable[[Results], Figure]] = {"speedup": speedup_figure, "layers": layers_figure}
    # In a whole network, the share of the weights that live is not that of the MACs.
    if all(row.peak_share and row.kernel for row in results.rows):
        figures["peak"] = peak_figure
    return figures
