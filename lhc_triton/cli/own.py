"""One's own network, from weights to an artefact and its answers: `accelerate`, `prune`, `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lhc_triton.cli.app import Input, Json, Network, Weights, app
from lhc_triton.cli.console import counting, print_json, print_table, stages
from lhc_triton.cli.networks import network_of


@app.command(
    epilog="Example: `lhc-triton accelerate mine.net:make --weights net.safetensors --input 1x3x224x224 "
    "--out fast.safetensors`"
)
def accelerate(
    network: Network,
    weights: Weights = None,
    input_shape: Input = None,
    out: Annotated[Path | None, typer.Option(help="Write the artefact, a safetensors file.")] = None,
    tune: Annotated[str, typer.Option(help="off, cached, or full: measure each layer here.")] = "cached",
    backend: Annotated[str, typer.Option(help="auto, or one backend for every layer.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="int8: quantise, by --images. Default: the network's own.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Image files, or folders, 16 of which are the example; else random numbers are."),
    ] = None,
    mean: Annotated[str, typer.Option(help="Of the images, see `predict`.")] = "0",
    std: Annotated[str, typer.Option(help="Of the images, see `predict`.")] = "1",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Make a network fast where its weights have structured zeros or a topology, check it, and keep it."""
    import lhc_triton as lhc
    from lhc_triton.predicting import Classifier, picture_files

    with stages() as progress:
        progress(f"reading {network}")
        found = network_of(network, weights, input_shape, device=device)
        if found.accelerated is not None:
            raise ValueError(f"{network} is accelerated already; give the network that it was made from")
        example: Any = found.inputs
        if images:
            example = Classifier(found.model, found.inputs, mean, std, None, device).examples(
                picture_files(images)
            )
        elif dtype == "int8":
            typer.echo("lhc-triton: int8 is fitted to random numbers; give --images of real ones", err=True)
        progress("planning, building and comparing with the network as it is")
        options: dict[str, Any] = {"tune": tune, "backend": backend, "dtype": dtype}
        fast = lhc.accelerate(found.model, example, **options)
        if out is not None:
            progress(f"writing {out}")
            lhc.save(fast, out)
    if as_json:
        print_json({**fast.report(), "artifact": None if out is None else str(out)})
        return
    typer.echo(fast.explain())
    if out is not None:
        typer.echo(f"Written: {out}")


@app.command(
    epilog="Example: `lhc-triton prune mine.net:make --weights net.safetensors --input 1x3x224x224 "
    "--budget 0.2 --out pruned.safetensors`"
)
def prune(
    network: Network,
    weights: Weights = None,
    input_shape: Input = None,
    budget: Annotated[float, typer.Option(help="Share of the objective that may stay, in (0, 1].")] = 0.1,
    objective: Annotated[str, typer.Option(help="weights, macs, or latency as predicted.")] = "weights",
    scope: Annotated[str, typer.Option(help="network, or layer: the same share in each.")] = "network",
    in_block: Annotated[int, typer.Option(help="Input channels of a block.")] = 32,
    out_block: Annotated[int, typer.Option(help="Filters of a block.")] = 16,
    share: Annotated[
        int | None, typer.Option(help="Afterwards, let so many filters at least share each pattern.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the state_dict with its zeros, a safetensors file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep the best blocks of trained weights; what is written loads into the same network.

    In Python, `lhc.prune` gives layers that keep their zeros while they are fine-tuned.
    """
    import lhc_triton as lhc
    from lhc_triton.models.weights import write_tensors

    found = network_of(network, weights, input_shape)
    if found.accelerated is not None:
        raise ValueError(f"{network} is an artefact; give the network that it was made from")
    reports: list[lhc.PruningReport] = []
    config = lhc.LHCConfig(density=None, in_block=in_block, out_block=out_block)
    model = lhc.prune(
        found.model,
        found.inputs,
        config,
        budget=budget,
        objective=objective,  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        report=reports.append,
    )
    merged = lhc.consolidate(model, share=share) if share is not None else None
    if out is not None:
        write_tensors(out, lhc.to_dense(model).state_dict(), {"kind": "pruned weights", "network": network})
    if as_json:
        consolidated = None if merged is None else merged.to_dict()
        print_json(
            {
                **reports[0].to_dict(),
                "consolidated": consolidated,
                "weights": None if out is None else str(out),
            }
        )
        return
    typer.echo(str(reports[0]))
    if merged is not None:
        typer.echo(f"\n{merged}")
    if out is not None:
        typer.echo(f"Written: {out}")


@app.command(
    epilog="Example: `lhc-triton predict fast.safetensors photos --mean 0.485,0.456,0.406 "
    "--std 0.229,0.224,0.225`"
)
def predict(
    network: Network,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    weights: Weights = None,
    input_shape: Input = None,
    batch: Annotated[int, typer.Option(help="Images per call.")] = 16,
    top: Annotated[int, typer.Option(help="Classes told of each image.")] = 1,
    mean: Annotated[str, typer.Option(help="Of each channel, on the scale 0 to 1: subtracted.")] = "0",
    std: Annotated[str, typer.Option(help="Of each channel: divided by.")] = "1",
    classes: Annotated[Path | None, typer.Option(help="Text file with a class name in each line.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Classify image files: the middle square of each, resized to the network's input."""
    from lhc_triton.predicting import Classifier, picture_files

    found = network_of(network, weights, input_shape, device=device)
    classifier = Classifier(found.model, found.inputs, mean, std, classes, device)
    files = picture_files(images)
    with counting("predict") as progress:
        result = classifier.run(files, batch, top, progress)
    if as_json:
        print_json(result.to_dict())
        return
    print_table(
        ("image", "class", "share"),
        [
            (str(row.file), row.classes[0].name if row.classes else row.problem, row.shares())
            for row in result.rows
        ],
    )
    typer.echo(
        f"{result.read} images in {result.seconds:.2f} s, {result.images_per_s:,.1f} images/s"
        f" ({result.network_share:.0%} of it in the network)"
    )
    if result.read < len(result.rows):
        typer.echo(f"lhc-triton: {len(result.rows) - result.read} files could not be read", err=True)
        raise typer.Exit(1)
