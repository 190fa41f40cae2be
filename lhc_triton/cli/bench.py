"""Measuring, and drawing what was measured: `bench`, `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from lhc_triton.cli.app import SOURCE_HELP, Input, Json, Weights, app
from lhc_triton.cli.console import counting, print_json, print_table, show_results
from lhc_triton.cli.networks import network_of
from lhc_triton.files import open_regular

NOTES = 4  # of a suite, that are printed


class _Bench(TyperCommand):
    """`bench`, whose help names the suites there are; they are imported for it only."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the suites' names."""
        from lhc_bench.measure import own
        from lhc_bench.measure.suites import SUITES

        for option in self.params:
            if isinstance(option, TyperOption) and option.name == "suite":
                option.help = f"{', '.join((*SUITES, own.SUITE))}."
        super().format_help(ctx, formatter)


@app.command(
    cls=_Bench,
    epilog="Examples: `lhc-triton bench --suite quick --out out/bench`, "
    "`lhc-triton bench --suite mine mine.net:make --weights net.safetensors --input 1x3x224x224`",
)
def bench(
    network: Annotated[str | None, typer.Argument(metavar="SOURCE", help=f"For mine: {SOURCE_HELP}")] = None,
    weights: Weights = None,
    input_shape: Input = None,
    device: Annotated[str, typer.Option(help="For mine: cpu or cuda.")] = "cpu",
    suite: Annotated[str, typer.Option(help="What to measure.")] = "quick",
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
    "peers"). The suite "loading" times how fast image files become batches instead. The suite "mine" times
    one's own network with the zeros that it has. The suite "planner" runs nothing: it compares the predicted
    times of the planner's tiles with those of other ways to form them, and measures how long planning takes.
    """
    from lhc_bench.measure import loading, own
    from lhc_bench.measure.engines import Engines, engines_table
    from lhc_bench.measure.suites import run_suite
    from lhc_bench.pictures.drawing import draw

    if (network is None) == (suite == own.SUITE):
        raise ValueError(f"a SOURCE belongs to --suite {own.SUITE}, and to it alone; give both or neither")
    if suite in (own.SUITE, loading.SUITE) and (density or batch is not None or not compiled):
        raise ValueError(
            f"suite {suite!r} measures no layers of ours: leave --density, --batch and --no-compiled out"
        )
    engines = None if deepsparse_python is None else Engines(deepsparse_python)
    with counting(f"suite {suite}") as progress:
        if network is not None:
            found = network_of(network, weights, input_shape, device=device)
            results = own.run_own(found, out, progress, seed=seed)
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
    show_results(results)
    if compared := results["summary"].get("engines"):
        print_table(*engines_table(compared))


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
