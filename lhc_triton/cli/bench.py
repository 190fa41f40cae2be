"""Measuring, and drawing what was measured: `bench`, `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lhc_triton.cli.app import Json, app
from lhc_triton.cli.console import counting, print_json, print_table, show_loading, show_summary
from lhc_triton.files import open_regular

NOTES = 4  # of a suite, that are printed


@app.command(epilog="Example: `lhc-triton bench --suite quick --out out/bench`")
def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="quick, cpu-layers, cpu-models, cpu-scaling, cpu-engines, gpu-layers, gpu-models, "
            "gpu-questions, gpu-first, gpu-first-models, loading."
        ),
    ] = "quick",
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.csv and the plots.")] = Path(
        "out/bench"
    ),
    only: Annotated[
        str, typer.Option(help="Measure only what has this in its name, for example vgg16-imagenet.")
    ] = "",
    density: Annotated[
        list[float] | None, typer.Option(help="Live share of the weights; may be given many times.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images of a call; default: the suite's.")] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled/--no-compiled",
            help="Compare with torch.compile too, on a GPU with max-autotune: seconds to minutes a layer.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of masks, weights and inputs.")] = 0,
    deepsparse_python: Annotated[
        Path | None, typer.Option(help="For cpu-engines: a Python with deepsparse==1.8.0 and numpy<2.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the backends against the best dense convolution, paired and interleaved, and draw the curves.

    The suite "cpu-engines" compares with other inference engines, those that are installed (the extra
    "peers"). The suite "loading" times how fast image files become batches instead.
    """
    from lhc_bench.measure import loading
    from lhc_bench.measure.engines import Engines, engines_table
    from lhc_bench.measure.suites import run_suite
    from lhc_bench.pictures.drawing import draw

    engines = None if deepsparse_python is None else Engines(deepsparse_python)
    with counting(f"suite {suite}") as progress:
        if suite == loading.SUITE and engines is None:
            if density or batch is not None:
                raise ValueError("suite 'loading' measures no layers: leave --density and --batch out")
            results = loading.run_loading(out, progress, seed, only=only)
        else:
            results = run_suite(
                suite, out, progress, seed, densities=density or None, compiled=compiled, only=only,
                engines=engines, batch=batch,
            )  # fmt: skip
    pictures = draw(out / "results.json", out)
    if as_json:
        print_json(results)
        return
    paths = [out / "results.json", out / "results.csv", *pictures]
    typer.echo(f"Written: {', '.join(map(str, paths))}")
    for note in (notes := results["env"]["notes"])[:NOTES]:
        typer.echo(f"Not measured: {note}")
    if len(notes) > NOTES:
        typer.echo(f"Not measured: {len(notes) - NOTES} more, see results.json")
    show_loading(results["rows"]) if suite == loading.SUITE else show_summary(results["summary"])
    if found := results["summary"].get("engines"):
        print_table(*engines_table(found))


@app.command(epilog="Example: `lhc-triton plot out/bench/results.json --out out/bench`")
def plot(
    results: Annotated[Path, typer.Argument(help="A results.json of `bench`, or the store of `tune`.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/plots"),
    as_json: Json = False,
) -> None:
    """Draw the curves of a results file again, or the landscape of the configs that were tuned."""
    from lhc_bench.pictures.config_landscape import draw_landscapes, is_store
    from lhc_bench.pictures.drawing import draw

    if results.exists():
        open_regular(results).close()  # of a pipe the first reader would wait for ever
    pictures = [str(path) for path in (draw_landscapes if is_store(results) else draw)(results, out)]
    if as_json:
        print_json({"pictures": pictures})
    else:
        typer.echo("\n".join(pictures))
