"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from .schema import LayerPlan
from .totals import Totals

HEADER = (
    "layer",
    "shape",
    "density",
    "patterns",
    "tiles",
    "width",
    "waste",
    "dense us",
    "sparse us",
    "backend",
)


def explain_plan(
    layers: Sequence[LayerPlan],
    totals: Totals,
    skipped: Sequence[tuple[str, str]],
    device: str,
    dtype: str,
) -> str:
    """Return a table of how every layer will run, totals, and what stays dense and why.

    "patterns" are the distinct ones over the filter groups; "waste" is the share of the tiles'
    multiply-accumulates that unions add; times are the cost model's.
    """
    rows = [HEADER, *(_cells(layer) for layer in layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    reasons = ["why", *(layer.reason for layer in layers)]
    lines = []
    for row, reason in zip(rows, reasons, strict=True):
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right, _printable(reason)]).rstrip())
    if not layers:
        lines = [f"no layer is planned ({_printable(device)}, {dtype})"]
    else:
        lines += ["", *_total_lines(totals, device, dtype)]
    lines += [f"left as it is: {_printable(name)} ({_printable(reason)})" for name, reason in skipped]
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Return a text fit for one line of a terminal: a plan may come from a file, with any name in it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    topology, geometry = layer.topology, layer.topology.geometry
    kernel = "x".join(str(k) for k in geometry.kernel)
    image = f"{geometry.batch}x{geometry.height}x{geometry.width}"
    planned = layer.planned_macs
    waste = (planned - topology.live_macs) / planned if planned else 0.0
    sparse = [us for name, us in layer.predicted_us.items() if name != "dense"]
    return (
        _printable(layer.name),
        f"{geometry.in_channels}->{geometry.out_channels} {kernel} @ {image}",
        f"{topology.density:.3f}",
        f"{len(topology.patterns)}/{topology.groups}",
        str(len(layer.tiles)),
        str(layer.tile_width),
        f"{waste:.0%}",
        f"{layer.predicted_us['dense']:.0f}" if "dense" in layer.predicted_us else "-",
        f"{sparse[0]:.0f}" if sparse else "-",
        layer.backend,
    )


def _total_lines(totals: Totals, device: str, dtype: str) -> list[str]:
    lines = [
        f"{totals.layers} layers planned for {_printable(device)} in {dtype}, {totals.sparse_layers} sparse",
        f"live MACs    {totals.macs:>16,} -> {totals.live_macs:,} ({_ratio(totals.macs, totals.live_macs)})",
        f"live weights {totals.weights:>16,} -> {totals.live_weights:,} "
        f"({_ratio(totals.weights, totals.live_weights)})",
    ]
    if totals.planned_us:
        lines.append(
            f"predicted us {totals.dense_us:>16,.0f} -> {totals.planned_us:,.0f} "
            f"({totals.dense_us / totals.planned_us:.1f}x faster, these layers alone)"
        )
    return lines


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.1f}x fewer" if after else "none left"
