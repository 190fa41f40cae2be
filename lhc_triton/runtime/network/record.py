"""What is told and stored of how a network was accelerated."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.network.sites import Site
from lhc_triton.tables import aligned

WIDTH = 80  # columns of a table


@dataclass(frozen=True)
class LayerRow:
    """What became of one convolution.

    Attributes:
        layer: the module's name in the accelerated network.
        backend: who runs it; "dense" for torch's own convolution.
        density: live share of the weights, 1.0 for a layer without a plan.
        patterns, tiles, tile_width: of its plan; None without one.
        macs, live_macs, planned_macs: dense, live, and actually computed multiply-accumulates on the example,
            over all calls of the layer.
        predicted_us: the cost model's time of this backend, or None.
        measured_us: its measured time where the layer was tuned, or None.
        reason: why this backend, in one phrase.
        rel_err: norm error of its output against the model's on the example; None if it was not compared.
        epilogue: what else it does, for example "bn+add+relu".
        dtype: of its weights; None in files of releases that did not tell.
    """

    layer: str
    backend: str
    density: float
    patterns: int | None
    tiles: int | None
    tile_width: int | None
    macs: int
    live_macs: int
    planned_macs: int
    predicted_us: float | None
    measured_us: float | None
    reason: str
    rel_err: float | None
    epilogue: str = "-"
    dtype: str | None = None

    @property
    def runs_sparse(self) -> bool:
        """Whether dead weights are skipped; a sparse backend may run a layer that has none."""
        return self.backend != "dense" and self.density < 1


@dataclass(frozen=True)
class Record:
    """How a network was accelerated: what ``report`` and ``explain`` tell and ``save`` stores.

    Attributes:
        model: class name of the model.
        requested: the backend that was asked for.
        traced: whether torch.fx could trace the model, so that epilogues were fused.
        sites: the calls that were replaced.
        rows: one per replaced convolution.
        inputs: (shape, dtype name) of each example input.
        output_error: norm error of the output against the model's on the example.
        notes: what else people should know, one line each.
    """

    model: str
    requested: str
    traced: bool
    sites: tuple[Site, ...]
    rows: tuple[LayerRow, ...]
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    output_error: float
    notes: tuple[str, ...] = ()


def make_row(
    site: Site,
    layer: LayerPlan | None,
    backend: str,
    reason: str,
    dense_macs: int,
    rel_err: float | None = None,
    measured_us: float | None = None,
    dtype: str | None = None,
) -> LayerRow:
    """Describe one fused module; ``dense_macs`` counts all its calls on the example."""
    if layer is None:
        return LayerRow(
            site.module,
            backend,
            1.0,
            None,
            None,
            None,
            dense_macs,
            dense_macs,
            dense_macs,
            None,
            measured_us,
            reason,
            rel_err,
            site.epilogue,
            dtype,
        )
    topology = layer.topology
    calls = dense_macs / topology.geometry.macs  # the plan may have been made for another size or batch
    live = round(topology.live_macs * calls)
    planned = dense_macs if backend == "dense" else round(layer.planned_macs * calls)
    return LayerRow(
        site.module,
        backend,
        topology.density,
        len(topology.patterns),
        len(layer.tiles),
        layer.tile_width,
        dense_macs,
        live,
        planned,
        layer.predicted_us.get(backend),
        measured_us,
        reason,
        rel_err,
        site.epilogue,
        dtype,
    )


def sum_of(values: Sequence[float | None]) -> float | None:
    """Add the times up; None unless every one is known, for a part of a sum misleads."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def si(count: float) -> str:
    """Write a count for people, as in 1.23 G."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f}"


def table_of(rows: Sequence[LayerRow]) -> list[str]:
    """Return the lines of a table 80 columns wide: a layer's numbers, then epilogue, error and reason."""

    def text(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    head = ("backend", "density", "tiles", "MACs", "predicted", "measured")
    cells = [
        (
            f"{row.backend} int8" if row.dtype == "int8" else row.backend,
            f"{row.density:.3f}",
            "-" if row.tiles is None else f"{row.tiles}x{row.tile_width}",
            si(row.planned_macs),
            text(row.predicted_us, ".0f"),
            text(row.measured_us, ".0f"),
        )
        for row in rows
    ]
    first, *numbers = aligned([head, *cells])
    room = WIDTH - 2 - len(first)
    names = [row.layer if len(row.layer) <= room else f"..{row.layer[2 - room :]}" for row in rows]
    longest = max(map(len, ("layer", *names)))
    table = [
        "Times in us, of the planned sizes; measured where a layer was tuned.",
        f"{'layer':{longest}}  {first}",
    ]
    for row, name, line in zip(rows, names, numbers, strict=True):
        facts = [
            "" if name == row.layer else row.layer,
            "" if row.epilogue == "-" else f"with {row.epilogue}",
            "" if row.patterns is None else f"patterns {row.patterns}",
            "" if row.rel_err is None else f"error {row.rel_err:.0e}",
        ]
        told = ", ".join(fact for fact in facts if fact)
        why = f"{told}: {row.reason}" if told else row.reason
        table.append(f"{name:{longest}}  {line}")
        table += textwrap.wrap(why, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return table
