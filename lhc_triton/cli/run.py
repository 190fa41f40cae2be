"""Preparing a network to run: `plan`, `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lhc_triton.cli.app import SOURCE_HELP, Input, Json, Network, Weights, app
from lhc_triton.cli.console import counting, print_json
from lhc_triton.cli.networks import plan_of


@app.command(
    epilog="Examples: `lhc-triton plan lhc --batch 8 --out plan.json`, "
    "`lhc-triton plan mine.net:make --weights net.safetensors --input 1x3x224x224`"
)
def plan(
    network: Network,
    weights: Weights = None,
    input_shape: Input = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per call that the plan is for; default: 1, or the artefact's.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto, or one backend for every layer; an artefact has its own.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a picture (PNG): filters by tile against entries, and waste.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Batch the filters that share a pattern and say how every layer will run, and why."""
    from lhc_bench.files import write_text
    from lhc_bench.pictures.plan_map import draw_plan

    made = plan_of(network, batch, backend, weights=weights, input_shape=input_shape)
    if out is not None:
        write_text(out, made.to_json() + "\n")
    if picture is not None:
        draw_plan(made, picture, f"Plan of {Path(network).name}")
    typer.echo(made.to_json() if as_json else made.explain(_known_times(made)))


def _known_times(made: Any) -> dict[str, dict[str, float]]:
    """Return what earlier runs on this machine have measured of a plan's layers."""
    import torch

    from lhc_triton.runtime.choosing.dispatch import known_times

    if made.device == "cuda" and not torch.cuda.is_available():
        return {}
    return known_times(made.layers, getattr(torch, made.dtype), made.device)


@app.command(
    epilog="Examples: `lhc-triton tune lhc --batch 256`, `lhc-triton tune --suite standard --budget 500`"
)
def tune(
    network: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help=SOURCE_HELP),
    ] = None,
    weights: Weights = None,
    input_shape: Input = None,
    suite: Annotated[str | None, typer.Option(help="Instead of a network: standard.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds; what is left is resumed next time.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per call; default: 64, the suite's, or the artefact's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    store: Annotated[
        Path | None, typer.Option(help="File of measurements; default: the user's, which `accelerate` reads.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure launch configs of the GPU's kernels and remember them; torchrun shares the work out over GPUs.

    What is recorded is not measured again, so a run that was stopped goes on where it was.
    `lhc-triton plot` draws the landscape from the file.
    """
    from lhc_triton.runtime.choosing.compiled_ahead import compiled_ahead
    from lhc_triton.runtime.choosing.timing_store import TimingStore
    from lhc_triton.runtime.choosing.tuning_jobs import run_jobs, tuning_device

    device, rank, ranks = tuning_device()
    jobs = _tuning_jobs(network, suite, batch, dtype, device, weights, input_shape)
    with counting("tune" if ranks == 1 else f"tune, {rank} of {ranks}") as progress:
        records = TimingStore(store)
        with compiled_ahead(jobs, device, records, rank=rank, ranks=ranks) as benches:
            report = run_jobs(
                jobs, device, records, budget_s=budget, rank=rank, ranks=ranks, progress=progress,
                benches=benches,
            )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.explain())
    if report.problem:
        typer.echo(f"lhc-triton: {report.problem}", err=True)
        raise typer.Exit(1)


def _tuning_jobs(
    network: str | None,
    suite: str | None,
    batch: int | None,
    dtype: str,
    device: Any,
    weights: Path | None,
    input_shape: str | None,
) -> Any:
    from lhc_bench.measure.tuning_suite import compute_type, network_jobs, suite_jobs

    if (network is None) == (suite is None):
        raise ValueError("give either a network or --suite")
    compute = compute_type(dtype)
    if network is None:
        return suite_jobs(suite or "", compute, batch)
    made = plan_of(network, batch, "auto", 64, device, compute, weights=weights, input_shape=input_shape)
    return network_jobs(made)
