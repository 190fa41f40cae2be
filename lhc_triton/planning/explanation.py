"""A plan as a table for people."""

from __future__ import annotations

from .plan import LayerPlan, Plan

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


def explain_plan(plan: Plan) -> str:
    """Return a table of how every layer will run, totals, and what stays dense and why.

    "waste" is the share of the tiles' multiply-accumulates that unions add; times are the cost model's.
    """
    rows = [HEADER, *(_cells(layer) for layer in plan.layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    reasons = ["why", *(layer.reason for layer in plan.layers)]
    lines = []
    for row, reason in zip(rows, reasons, strict=True):
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right, reason]).rstrip())
    lines += ["", _totals(plan)]
    lines += [f"left as it is: {name} ({reason})" for name, reason in plan.skipped]
    return "\n".join(lines)


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    topology, geometry = layer.topology, layer.topology.geometry
    kernel = "x".join(str(k) for k in geometry.kernel)
    image = f"{geometry.batch}x{geometry.height}x{geometry.width}"
    planned = layer.planned_macs
    waste = (planned - topology.live_macs) / planned if planned else 0.0
    sparse = [us for name, us in layer.predicted_us.items() if name != "dense"]
    return (
        layer.name,
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


def _totals(plan: Plan) -> str:
    if not plan.layers:
        return f"no layer is planned ({plan.device}, {plan.dtype})"
    dense = sum(layer.topology.geometry.macs for layer in plan.layers)
    live = sum(layer.topology.live_macs for layer in plan.layers)
    weights = sum(layer.topology.geometry.weights for layer in plan.layers)
    kept = sum(layer.topology.live_weights for layer in plan.layers)
    sparse = sum(layer.backend != "dense" for layer in plan.layers)
    return (
        f"{len(plan.layers)} layers planned for {plan.device} in {plan.dtype}, {sparse} of them sparse; "
        f"MACs {dense:,} -> {live:,} ({_ratio(dense, live)}), weights {weights:,} -> {kept:,} "
        f"({_ratio(weights, kept)})"
    )


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.1f}x fewer" if after else "none left"
