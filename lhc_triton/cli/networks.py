"""The networks that commands take: see `lhc_triton.sources`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

MAX_BATCH = 4096  # planning runs the network once on so many images


def network_of(
    source: str,
    weights: Path | None = None,
    input_shape: str | None = None,
    batch: int | None = None,
    device: Any = "cpu",
    dtype: Any = None,
) -> Any:
    """Open a source; say so on stderr where its weights are random."""
    from lhc_triton.sources import open_network

    if batch is not None and not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"batch is {batch}; it must be from 1 to {MAX_BATCH}")
    network = open_network(source, weights, input_shape, batch=batch, device=device, dtype=dtype)
    if network.random:
        typer.echo(f"{source}: no --weights given: it runs with the weights that it is made with", err=True)
    return network


def plan_of(
    source: str,
    batch: int | None = None,
    backend: str = "auto",
    usual_batch: int | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    *,
    weights: Path | None = None,
    input_shape: str | None = None,
) -> Any:
    """Plan a network; an artefact brings its own plan."""
    import lhc_triton as lhc
    from lhc_triton.artifact import is_artifact

    if Path(source).is_file() and is_artifact(source):
        if batch is not None or backend != "auto" or input_shape is not None:
            raise ValueError(f"{source} brings its own plan: leave --batch, --backend and --input out")
        return lhc.load(source, device=device).plan
    wanted = batch if batch is not None or input_shape is not None else usual_batch
    network = network_of(source, weights, input_shape, wanted, device, dtype)
    return lhc.plan(network.model, network.inputs, backend=backend)  # type: ignore[arg-type]
