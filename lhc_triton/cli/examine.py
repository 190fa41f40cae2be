"""Looking at a network and at the machine: `inspect`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lhc_triton.cli.app import Json, Network, app
from lhc_triton.cli.console import counting, print_json, show_diagnosis, show_kernels, show_topology
from lhc_triton.cli.networks import plan_of


@app.command(epilog="Example: `lhc-triton inspect lhc --out topology.png`")
def inspect(
    network: Network,
    out: Annotated[Path | None, typer.Option(help="Write the topology picture (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Show what a network learned: density, patterns and kernel shapes of every layer."""
    from lhc_bench.pictures.topology_map import draw_topology, topology_statistics

    topologies = [layer.topology for layer in plan_of(network).layers]
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
