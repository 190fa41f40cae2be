"""A plan as a table for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .schema import LayerPlan
from .totals import Totals

HEADER = ("layer", "density", "patterns", "tiles", "waste", "choice, us", "runner-up, us")
LONGEST_NAME = 20  # so that a line fits 80 columns; of a longer name its end is shown


def explain_plan(
    layers: Sequence[LayerPlan],
    totals: Totals,
    skipped: Sequence[tuple[str, str]],
    device: str,
    dtype: str,
) -> str:
    """Return a table of how every layer will run, totals, and what stays dense and why; 80 columns wide.

    "patterns" are the distinct ones over the filter groups; "tiles" how many there are, and filters that each
    has room for; "waste" is the share of the tiles' multiply-accumulates that unions add. "choice" is who
    runs the layer, "runner-up" the best of the others, with the cost model's times. Below each layer stand
    its sizes and the reason.
    """
    rows = [HEADER, *(_cells(layer) for layer in layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = []
    for index, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if index:
            layer = layers[index - 1]
            name = f"{_printable(layer.name)}: " if len(layer.name) > LONGEST_NAME else ""
            text = f"{name}{_sizes(layer)}: {_printable(layer.reason)}"
            lines += textwrap.wrap(text, 80, initial_indent="    ", subsequent_indent="    ")
    if not layers:
        lines = [f"no layer is planned ({_printable(device)}, {dtype})"]
    else:
        lines = ["Times are predicted, not measured.", *lines, "", *_total_lines(totals, device, dtype)]
    for name, reason in skipped:
        text = f"left as it is: {_printable(name)} ({_printable(reason)})"
        lines += textwrap.wrap(text, 80, subsequent_indent="    ")
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Return a text fit for one line of a terminal: a plan may come from a file, with any name in it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    topology = layer.topology
    planned = layer.planned_macs
    waste = (planned - topology.live_macs) / planned if planned else 0.0
    name = _printable(layer.name)
    others = {other: us for other, us in layer.predicted_us.items() if other != layer.backend}
    second = min(others, key=lambda other: others[other], default=None)
    return (
        name if len(name) <= LONGEST_NAME else f"..{name[2 - LONGEST_NAME :]}",
        f"{topology.density:.3f}",
        f"{len(topology.patterns)}/{topology.groups}",
        f"{len(layer.tiles)}x{layer.tile_width}",
        f"{waste:.0%}",
        _timed(layer.backend, layer.predicted_us.get(layer.backend)),
        "-" if second is None else _timed(second, others[second]),
    )


def _timed(backend: str, us: float | None) -> str:
    return f"{backend} {'-' if us is None else f'{us:.0f}'}"


def _sizes(layer: LayerPlan) -> str:
    geometry = layer.topology.geometry
    kernel = "x".join(str(k) for k in geometry.kernel)
    image = f"{geometry.batch}x{geometry.height}x{geometry.width}"
    return f"{geometry.in_channels}->{geometry.out_channels} {kernel} @ {image}"


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
