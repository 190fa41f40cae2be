"""The demo's picture: what sparsity saved in work, and in time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lhc_bench.files import write_figure

DENSE = "#9aa5ab"
SPARSE = "#0b6e99"
IDEAL = "#c8553d"


def draw_speedup(report: Mapping[str, Any], path: Path) -> Path:
    """Draw the demo's report: times of whole networks, each layer's speed-up beside its MAC reduction.

    Args:
        report: what `run_demo` returns.
        path: the PNG to write; its folder must exist. Written beside, then renamed.

    Returns:
        ``path``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.6))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.55])
    figure.subplots_adjust(left=0.13, right=0.985, top=0.80, bottom=0.19, wspace=0.22)
    _draw_networks(left, report)
    _draw_layers(right, report)
    headline = f"Whole network: {report['speedup']:.2f}x the speed of the best dense, accuracy "
    headline += f"{100 * report['lhc_accuracy']:.2f} % against {100 * report['dense_accuracy']:.2f} %"
    figure.text(0.015, 0.94, headline, fontsize=13, fontweight="bold", va="center")
    caption = f"{report['device']}, {report['threads']} threads, {report['dtype']}, batch {report['batch']}; "
    caption += f"medians of {report['rounds']} interleaved rounds, lines span p20 to p80"
    figure.text(0.015, 0.03, caption, fontsize=8, color="#555555")
    return write_figure(path, figure, dpi=200, format="png")


def _draw_networks(axis: Any, report: Mapping[str, Any]) -> None:
    names = list(report["times_us"])
    for row, name in enumerate(names):
        times = {key: value / 1000 for key, value in report["times_us"][name].items()}
        axis.barh([row], [times["median"]], height=0.6, color=SPARSE if name == "lhc" else DENSE)
        axis.hlines([row], times["p20"], times["p80"], color="black", linewidth=1.2)
        label_at = max(times["median"], times["p80"])
        axis.text(label_at, row, f"  {times['median']:.2f} ms", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    longest = max(max(t["median"], t["p80"]) for t in report["times_us"].values()) / 1000
    axis.set_xlim(0, longest * 1.3)
    axis.set_xlabel("time of one batch, ms")
    axis.set_title("whole networks", fontsize=10, fontweight="bold")
    _clean(axis)


def _draw_layers(axis: Any, report: Mapping[str, Any]) -> None:
    layers = report["layers"]
    measured = [layer["dense_us"] / layer["lhc_us"] for layer in layers]
    saved = [layer["macs"] / layer["live_macs"] for layer in layers]
    small = 8 if len(layers) <= 8 else 7
    for index, (layer, speedup, ideal) in enumerate(zip(layers, measured, saved, strict=True)):
        axis.bar([index - 0.2], [ideal], width=0.38, color="white", edgecolor=IDEAL, linewidth=1.2)
        axis.text(index - 0.2, ideal, f"{ideal:.1f}", ha="center", va="bottom", fontsize=small, color=IDEAL)
        color = DENSE if layer["backend"] == "dense" else SPARSE
        axis.bar([index + 0.2], [speedup], width=0.38, color=color)
        axis.text(index + 0.2, speedup, f"{speedup:.1f}", ha="center", va="bottom", fontsize=small)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    names = [layer["layer"] for layer in layers]
    owners = {name.rpartition(".")[0] for name in names}
    if len(owners) == 1 and "" not in owners:  # said once: there is no room beneath every bar
        names = [name.rpartition(".")[2] for name in names]
        axis.set_xlabel(f"{owners.pop()}.*")
    ticks = [f"{name}\n{layer['backend']}" for name, layer in zip(names, layers, strict=True)]
    axis.set_xticks(range(len(layers)), ticks, fontsize=8)
    axis.set_ylim(0, max(*saved, *measured) * 1.15)
    axis.set_ylabel("times less than dense")
    axis.set_title(
        "each converted layer: MACs saved (outlined), time saved (filled)", fontsize=10, fontweight="bold"
    )
    _clean(axis)


def _clean(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
