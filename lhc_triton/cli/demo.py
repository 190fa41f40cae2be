"""`lhc-triton demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lhc_triton.cli.app import Json, app
from lhc_triton.cli.console import print_json, show_demo, stages


@app.command(epilog="Example: `lhc-triton demo --out out/demo`")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.json and the pictures.")] = Path("out/demo"),
    batch: Annotated[int, typer.Option(help="Images per timed call.")] = 64,
    rounds: Annotated[int, typer.Option(help="Interleaved timing rounds.")] = 20,
    as_json: Json = False,
) -> None:
    """Show the whole promise on the shipped network: accuracy, weights, MACs and time beside a dense twin."""
    from lhc_bench.reports.demo import run_demo

    with stages() as progress:
        report = run_demo(out, batch=batch, rounds=rounds, progress=progress)
    if as_json:
        print_json(report)
        return
    show_demo(report)
    typer.echo(f"{report['device']}, {report['threads']} threads. Written to {out}: report.json and pictures")
