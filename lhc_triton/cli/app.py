"""The application that every command joins, and the options that several of them have."""

from __future__ import annotations

from pathlib import Path
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
SOURCE_HELP = (
    "package.module:factory; a .pt2 of torch.export; a run folder or weights of `train`; an artefact; a name"
    " in torchvision or timm, where installed; or a shipped network (lhc, dense,"
    " cifar10-lhc, cifar10-dense)."
)
Network = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Weights = Annotated[
    Path | None,
    typer.Option(help="For a factory or a name: its state_dict, .safetensors or a .pt of tensors alone."),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="SHAPE", help="Of the example, such as 1x3x224x224; commas between inputs."
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
