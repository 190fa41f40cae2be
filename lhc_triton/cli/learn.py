"""Learning topologies: `train`, `report`, `ablate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lhc_triton.cli.app import Json, Measure, MeasuredBatch, MeasuredOn, app
from lhc_triton.cli.console import print_json, print_table, show_experiments, stages, tell_once, times


@app.command(
    epilog="Examples: `lhc-triton train --preset quick --out runs/quick`, "
    "`lhc-triton train --config my.toml --set lr=0.05 --set out_block=64`"
)
def train(
    preset: Annotated[
        str | None,
        typer.Option(help="quick (the default: minutes on two cores), shipped, paper, modern, fashion-vgg16"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Instead of a preset: a TOML file as --show-config prints it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; a run found there is resumed. Default: runs/ and its name."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting; may be given many times."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set; default: the packaged images.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(metavar="package.module:factory", help="Train one's own network.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    density: Annotated[float | None, typer.Option(help="Target share of live weights.")] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print all settings with their meaning, and do not train.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a network with learned topology and its dense twin, in two stages, resumable."""
    from lhc_triton.training import train as run_training
    from lhc_triton.training.networks import check_settings
    from lhc_triton.training.presets import choose_config

    given = {"data_folder": data, "factory": network, "seed": seed, "device": device, "density": density}
    changes = [f"{name}={value}" for name, value in given.items() if value is not None]
    name, chosen = choose_config(preset, config, [*changes, *(settings or [])])
    check_settings(chosen)
    if show_config:
        print_json(chosen.to_dict()) if as_json else typer.echo(chosen.to_toml())
        return
    out = out or Path("runs") / name
    result = run_training(chosen, out)
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process shows the result
    if as_json:
        print_json(result.to_dict())
        return
    dense = result.dense_accuracy
    print_table(
        (result.network, "dense", "LHC"),
        [
            (
                "test accuracy",
                "not trained" if dense is None else f"{100 * dense:.2f} %",
                f"{100 * result.lhc_accuracy:.2f} %",
            ),
            ("weights of the converted convolutions", "", f"{times(result.weight_reduction)} fewer"),
            ("MACs of the converted convolutions", "", f"{times(result.mac_reduction)} fewer"),
        ],
    )
    typer.echo(f"Written: {out}")


@app.command(epilog="Examples: `lhc-triton report runs/*`, `lhc-triton report runs/a runs/b --measure`")
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of `train` or `ablate`; seeds of one setting are averaged.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and the pictures.")] = Path(
        "out/report"
    ),
    measure: Measure = False,
    device: MeasuredOn = "cpu",
    batch: MeasuredBatch = 64,
    as_json: Json = False,
) -> None:
    """Report on runs: accuracy, reductions, predicted and measured time, topologies; a page and pictures."""
    from lhc_bench.reports.runs import run_folders

    found = run_folders(runs, lambda line: typer.echo(line, err=True))
    with stages() as progress:
        _report(found, out, measure, device, batch, as_json, progress)


@app.command(epilog="Example: `lhc-triton ablate blocks.toml --out out/blocks`")
def ablate(
    spec: Annotated[Path, typer.Argument(help="TOML with seeds, [base] and [[grid]]s of settings.")],
    out: Annotated[
        Path, typer.Option(help="Folder for a run each, and report/; resumed where it is.")
    ] = Path("out/ablation"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and name the runs, and do not train.")
    ] = False,
    measure: Measure = False,
    device: MeasuredOn = "cpu",
    batch: MeasuredBatch = 64,
    as_json: Json = False,
) -> None:
    """Train every setting of a grid with every seed, dense twins shared, and report on them together.

    A run that fails lets the others go on; the report is on those that finished, and the exit code is 1.
    """
    from lhc_bench.reports.ablation import check_ablation, read_ablation, run_ablation

    runs = read_ablation(spec)
    if dry_run:
        check_ablation(runs)
        names = list(runs)
        print_json({"runs": names}) if as_json else typer.echo("\n".join(names))
        return
    first = os.environ.get("RANK", "0") == "0"  # under torchrun the first process speaks and reports
    trained = run_ablation(runs, out, lambda text: typer.echo(text, err=True) if first else None, tell_once)
    if not first:
        return
    if trained.folders:
        with stages() as progress:
            _report(list(trained.folders), out / "report", measure, device, batch, as_json, progress)
    if trained.failures:
        typer.echo(f"lhc-triton: {len(trained.failures)} of {len(runs)} runs failed:", err=True)
        for name, why in trained.failures.items():
            typer.echo(f"- {name}: {why}", err=True)
        raise typer.Exit(1)


def _report(
    runs: list[Path], out: Path, measure: bool, device: str, batch: int, as_json: bool, progress: Any
) -> None:
    from lhc_bench.reports.report import make_report

    made = make_report(runs, out, measure=measure, device=device, batch=batch, progress=progress)
    if as_json:
        print_json(made.to_dict())
        return
    show_experiments([experiment.to_dict() for experiment in made.experiments])
    typer.echo(f"Written: {out / 'report.html'}, report.json and pictures")
