"""The application that every command joins, and the options that several of them have."""

from __future__ import annotations

from typing import Annotated

import typer

from lhc_triton import __version__

app = typer.Typer(
    name="lhc-triton",
    help="Convolutions that learn their own topology, and kernels that only touch what is left.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Network = Annotated[
    str,
    typer.Argument(
        help="A shipped network ('lhc', 'dense'), trained weights of `train`, or an artefact of `save`."
    ),
]
Measure = Annotated[
    bool, typer.Option("--measure/--no-measure", help="Time each network against its dense twin, here.")
]
MeasuredOn = Annotated[str, typer.Option(help="Where to measure: cpu or cuda.")]
MeasuredBatch = Annotated[int, typer.Option(help="Images of a call that is predicted or measured.")]


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"lhc-triton {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Convolutions that learn their own topology, and kernels that only touch what is left."""
