"""A plan as a table for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from .schema import LayerPlan, OtherWork
from .totals import Totals

HEADER = ("layer", "density", "patterns", "tiles", "waste", "backend", "predicted", "measured")
LONGEST_NAME = 18  # so that a line fits 80 columns; of a longer name its end is shown
Measured = Mapping[str, Mapping[str, float]]


def explain_plan(
    layers: Sequence[LayerPlan],
    totals: Totals,
    skipped: Sequence[tuple[str, str]],
    device: str,
    dtype: str,
    others: Sequence[OtherWork] = (),
    measured: Measured | None = None,
) -> str:
    """Return a table of how every layer will run, totals, and what stays dense and why; 80 columns wide.

    "patterns" are the distinct ones over the filter groups; "tiles" how many there are, and filters that each
    has room for; "waste" is the share of the tiles' multiply-accumulates that unions add. The first line of a
    layer shows who runs it, the next one the best of the others, each with the cost model's time and, where
    ``measured`` has it by layer and backend, the measured one. Below stand the sizes, the share of the tiles
    that no filter fills (padding), and the reason.
    """
    known = measured or {}
    rows = [HEADER, *(row for layer in layers for row in _rows(layer, known.get(layer.name, {})))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]

    def aligned(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return " ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    lines = [aligned(HEADER)]
    for layer in layers:
        lines += [aligned(row) for row in _rows(layer, known.get(layer.name, {}))]
        name = f"{_printable(layer.name)}: " if len(layer.name) > LONGEST_NAME else ""
        text = f"{name}{_sizes(layer)}: {_printable(layer.reason)}"
        lines += textwrap.wrap(text, 80, initial_indent="    ", subsequent_indent="    ")
    if not layers:
        lines = [f"no layer is planned ({_printable(device)}, {dtype})"]
    else:
        what = "Times in us: predicted by the cost model; measured where that is known."
        lines = [what, *lines, "", *_total_lines(totals, device, dtype, others)]
    for name, reason in skipped:
        text = f"left as it is: {_printable(name)} ({_printable(reason)})"
        lines += textwrap.wrap(text, 80, subsequent_indent="    ")
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Return a text fit for one line of a terminal: a plan may come from a file, with any name in it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _rows(layer: LayerPlan, measured: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return the cells of the layer's choice and of its runner-up, if it has one."""
    topology = layer.topology
    planned = layer.planned_macs
    waste = (planned - topology.live_macs) / planned if planned else 0.0
    name = _printable(layer.name)
    others = {other: us for other, us in layer.predicted_us.items() if other != layer.backend}
    second = min(others, key=lambda other: others[other], default=None)
    rows: list[tuple[str, ...]] = [
        (
            name if len(name) <= LONGEST_NAME else f"..{name[2 - LONGEST_NAME :]}",
            f"{topology.density:.3f}",
            f"{len(topology.patterns)}/{topology.groups}",
            f"{len(layer.tiles)}x{layer.tile_width}",
            f"{waste:.0%}",
            *_times(layer.backend, layer.predicted_us, measured),
        )
    ]
    if second is not None:
        rows.append(("  runner-up", "", "", "", "", *_times(second, layer.predicted_us, measured)))
    return rows


def _times(
    backend: str, predicted: Mapping[str, float], measured: Mapping[str, float]
) -> tuple[str, str, str]:
    def text(us: float | None) -> str:
        return "-" if us is None else f"{us:.0f}"

    return backend, text(predicted.get(backend)), text(measured.get(backend))


def _sizes(layer: LayerPlan) -> str:
    geometry = layer.topology.geometry
    kernel = "x".join(str(k) for k in geometry.kernel)
    image = f"{geometry.batch}x{geometry.height}x{geometry.width}"
    padding = f", {layer.padding:.0%} padding" if layer.padding >= 0.005 else ""
    return f"{geometry.in_channels}->{geometry.out_channels} {kernel} @ {image}{padding}"


def _total_lines(totals: Totals, device: str, dtype: str, others: Sequence[OtherWork]) -> list[str]:
    layers = "1 layer" if totals.layers == 1 else f"{totals.layers} layers"
    lines = [
        f"{layers} planned for {_printable(device)} in {dtype}, {totals.sparse_layers} sparse",
        f"live MACs    {totals.macs:>16,} -> {totals.live_macs:,} ({_ratio(totals.macs, totals.live_macs)})",
        f"live weights {totals.weights:>16,} -> {totals.live_weights:,} "
        f"({_ratio(totals.weights, totals.live_weights)})",
    ]
    if totals.planned_us:
        lines.append(_predicted("predicted us", totals.dense_us, totals.planned_us, "these layers alone"))
    if others:
        parts = ", ".join(f"{_printable(work.kind)} {work.predicted_us:,.0f}" for work in others)
        lines += textwrap.wrap(
            f"predicted us of the rest {totals.others_us:,.0f}: {parts}", 80, subsequent_indent="    "
        )
    if totals.dense_network_us and totals.network_us:
        lines.append(_predicted("predicted us", totals.dense_network_us, totals.network_us, "whole network"))
    return lines


def _predicted(name: str, dense: float, planned: float, what: str) -> str:
    return f"{name} {dense:>16,.0f} -> {planned:,.0f} ({dense / planned:.1f}x faster, {what})"


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.1f}x fewer" if after else "none left"
