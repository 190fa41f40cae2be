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
    cifar10: Annotated[
        Path | None,
        typer.Option(help="Folder or archive of CIFAR-10: VGG16 on it, in place of Fashion-MNIST's network."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the whole promise on a shipped network: accuracy, weights, MACs and time beside a dense twin."""
    from lhc_bench.reports.demo import run_demo

    with stages() as progress:
        report = run_demo(out, batch=batch, rounds=rounds, progress=progress, cifar10=cifar10)
    if as_json:
        print_json(report)
        return
    show_demo(report)
    typer.echo(f"{report['device']}, {report['threads']} threads. Written to {out}: report.json and pictures")
