"""Looking at a network and at the machine: `inspect`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lhc_triton.cli.app import Input, Json, Network, Weights, app
from lhc_triton.cli.console import (
    counting,
    print_json,
    print_table,
    show_diagnosis,
    show_kernels,
    show_topology,
    stages,
)
from lhc_triton.cli.networks import plan_of


@app.command(epilog="Example: `lhc-triton inspect lhc --out topology.png`")
def inspect(
    network: Network,
    weights: Weights = None,
    input_shape: Input = None,
    out: Annotated[Path | None, typer.Option(help="Write the topology picture (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Show what a network learned: density, patterns and kernel shapes of every layer."""
    from lhc_bench.pictures.topology_map import draw_topology, topology_statistics

    made = plan_of(network, weights=weights, input_shape=input_shape)
    topologies = [layer.topology for layer in made.layers]
    if not topologies:
        raise ValueError(
            f"no layer of {network!r} has a learned or sparse topology; there is nothing to show"
        )
    statistics = topology_statistics(topologies)
    if out is not None:
        draw_topology(topologies, out, f"Topology of {Path(network).name}")
    if as_json:
        print_json({"layers": statistics, "picture": None if out is None else str(out)})
        return
    show_topology(statistics)
    if out is not None:
        typer.echo(f"Written: {out}")


@app.command(epilog="Examples: `lhc-triton doctor --json`, `lhc-triton doctor --kernels --target sm_90`")
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile the GPU kernels that ship instead, without a GPU.")
    ] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="With --kernels: sm_90, gfx942, ...; default: all of them.")
    ] = None,
    configs: Annotated[
        int, typer.Option(help="With --kernels: launch configs of each layer; 1: the heuristic's, 12: all.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Tell what this machine can run: versions, devices, compilers, which backend will be used, and why.

    With --kernels, tell what the compiler makes of the kernels: registers and stack of a thread, shared
    memory, warp-group products, asynchronous copies. A kernel takes about a second.
    """
    if kernels:
        rows = _compiled(target, configs)
        if as_json:
            print_json({"kernels": rows})
        else:
            show_kernels(rows)
        return
    from lhc_triton.runtime.choosing.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
        return
    show_diagnosis(found)


@app.command(epilog="Example: `CXX=clang++ lhc-triton build`")
def build(as_json: Json = False) -> None:
    """Compile the native CPU kernel now, for containers: where it is built, first use does not have to.

    $CXX names the compiler, $LHC_TRITON_NATIVE_FLAGS the CPU (default -march=native), $LHC_TRITON_CACHE the
    folder. A library is found again by the same compiler, flags and torch.
    """
    import time

    from lhc_kernels.cpu import BuildError
    from lhc_kernels.cpu import build as build_native
    from lhc_triton.runtime.choosing.doctor import native_build

    start = time.perf_counter()
    try:
        with stages() as progress:
            progress("compiling the native kernel, less than a minute")
            library = build_native()
    except BuildError as error:
        typer.echo(f"lhc-triton: {error}", err=True)
        raise typer.Exit(1) from None
    found = {"library": str(library), **native_build(), "seconds": round(time.perf_counter() - start, 1)}
    if as_json:
        print_json(found)
        return
    print_table(("native kernel", "value"), [(name, str(value)) for name, value in found.items()])


def _compiled(targets: list[str] | None, configs: int) -> list[dict[str, Any]]:
    from lhc_kernels import INTERPRETED
    from lhc_kernels.aot import TARGETS
    from lhc_kernels.table import kernel_table

    if configs < 1:
        raise ValueError(f"configs is {configs}; it must be at least 1")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted; unset it to compile them")
    with counting("compiling") as progress:
        return kernel_table(targets or tuple(TARGETS), configs, progress)
