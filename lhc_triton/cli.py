"""The command line, thin: it parses, calls, and shows. Results go to stdout, progress to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .console import (
    counting,
    print_json,
    print_table,
    show_demo,
    show_diagnosis,
    show_experiments,
    show_kernels,
    show_loading,
    show_summary,
    show_topology,
    stages,
    tell_once,
    times,
)
from .files import open_regular

app = typer.Typer(
    name="lhc-triton",
    help="Convolutions that learn their own topology, and kernels that only touch what is left.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

USER_MISTAKE = 2
INTERRUPTED = 130
MAX_BATCH = 4096  # planning runs the network once on so many images
NOTES = 4  # of a suite, that are printed
SHIPPED = ("lhc", "dense")

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


@app.command(epilog="Example: `lhc-triton demo --out out/demo`")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.json and the pictures.")] = Path("out/demo"),
    batch: Annotated[int, typer.Option(help="Images per timed call.")] = 64,
    rounds: Annotated[int, typer.Option(help="Interleaved timing rounds.")] = 20,
    as_json: Json = False,
) -> None:
    """Show the whole promise on the shipped network: accuracy, weights, MACs and time beside a dense twin."""
    from lhc_bench.demo import run_demo

    with stages() as progress:
        report = run_demo(out, batch=batch, rounds=rounds, progress=progress)
    if as_json:
        print_json(report)
        return
    show_demo(report)
    typer.echo(f"{report['device']}, {report['threads']} threads. Written to {out}: report.json and pictures")


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

    given = {"data_folder": data, "seed": seed, "device": device, "density": density}
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
    from lhc_bench.runs import run_folders

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
    from lhc_bench.ablation import check_ablation, read_ablation, run_ablation

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
    from lhc_bench.report import make_report

    made = make_report(runs, out, measure=measure, device=device, batch=batch, progress=progress)
    if as_json:
        print_json(made.to_dict())
        return
    show_experiments([experiment.to_dict() for experiment in made.experiments])
    typer.echo(f"Written: {out / 'report.html'}, report.json and pictures")


@app.command(epilog="Example: `lhc-triton plan lhc --batch 8 --out plan.json`")
def plan(
    network: Network,
    batch: Annotated[
        int | None, typer.Option(help="Images per call that the plan is for; default: 1, or the artefact's.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto, or one backend for every layer; an artefact has its own.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Batch the filters that share a pattern and say how every layer will run, and why."""
    from lhc_bench.files import write_beside

    made = _plan_of(network, batch, backend)
    if out is not None:
        write_beside(out, made.to_json() + "\n")
    typer.echo(made.to_json() if as_json else made.explain())


@app.command(
    epilog="Examples: `lhc-triton tune lhc --batch 256`, `lhc-triton tune --suite standard --budget 500`"
)
def tune(
    network: Annotated[
        str | None,
        typer.Argument(help="A shipped network ('lhc', 'dense'), trained weights, or an artefact of `save`."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Instead of a network: standard.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds; what is left is resumed next time.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per call; default: 64, the suite's, or the artefact's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    store: Annotated[
        Path | None, typer.Option(help="File of measurements; default: the user's, which `accelerate` reads.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure launch configs of the GPU's kernels and remember them; torchrun shares the work out over GPUs.

    What is recorded is not measured again, so a run that was stopped goes on where it was.
    `lhc-triton plot` draws the landscape from the file.
    """
    from lhc_triton.runtime.store import TimingStore
    from lhc_triton.runtime.tuner_jobs import run_jobs, tuning_device

    device, rank, ranks = tuning_device()
    jobs = _tuning_jobs(network, suite, batch, dtype, device)
    with counting("tune" if ranks == 1 else f"tune, {rank} of {ranks}") as progress:
        report = run_jobs(
            jobs, device, TimingStore(store), budget_s=budget, rank=rank, ranks=ranks, progress=progress
        )
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.explain())
    if report.problem:
        typer.echo(f"lhc-triton: {report.problem}", err=True)
        raise typer.Exit(1)


@app.command(epilog="Example: `lhc-triton bench --suite quick --out out/bench`")
def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="quick, cpu-layers, cpu-models, cpu-scaling, cpu-engines, gpu-layers, gpu-models, "
            "gpu-questions, loading."
        ),
    ] = "quick",
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.csv and the plots.")] = Path(
        "out/bench"
    ),
    only: Annotated[
        str, typer.Option(help="Measure only what has this in its name, for example vgg16-imagenet.")
    ] = "",
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
    from lhc_bench import loading
    from lhc_bench.engines import Engines, engines_table
    from lhc_bench.plots import draw
    from lhc_bench.suites import run_suite

    engines = None if deepsparse_python is None else Engines(deepsparse_python)
    with counting(f"suite {suite}") as progress:
        if suite == loading.SUITE and engines is None:
            results = loading.run_loading(out, progress, seed, only=only)
        else:
            results = run_suite(suite, out, progress, seed, only=only, engines=engines)
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
    from lhc_bench.landscape import draw_landscapes, is_store
    from lhc_bench.plots import draw

    if results.exists():
        open_regular(results).close()  # of a pipe the first reader would wait for ever
    pictures = [str(path) for path in (draw_landscapes if is_store(results) else draw)(results, out)]
    if as_json:
        print_json({"pictures": pictures})
    else:
        typer.echo("\n".join(pictures))


@app.command(epilog="Example: `lhc-triton inspect lhc --out topology.png`")
def inspect(
    network: Network,
    out: Annotated[Path | None, typer.Option(help="Write the topology picture (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Show what a network learned: density, patterns and kernel shapes of every layer."""
    from lhc_bench.topology_picture import draw_topology, topology_statistics

    topologies = [layer.topology for layer in _plan_of(network).layers]
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
    from lhc_triton.runtime.doctor import diagnose

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


def _tuning_jobs(network: str | None, suite: str | None, batch: int | None, dtype: str, device: Any) -> Any:
    from lhc_bench.tuning_suite import compute_type, network_jobs, suite_jobs

    if (network is None) == (suite is None):
        raise ValueError("give either a network or --suite")
    compute = compute_type(dtype)
    if network is None:
        return suite_jobs(suite or "", compute, batch)
    return network_jobs(_plan_of(network, batch, "auto", 64, device, compute))


def _plan_of(
    network: str,
    batch: int | None = None,
    backend: str = "auto",
    usual_batch: int = 1,
    device: Any = "cpu",
    dtype: Any = None,
) -> Any:
    """Plan a shipped network or trained weights; an artefact brings its own plan."""
    import torch

    import lhc_triton as lhc
    from lhc_triton.artifact import is_artifact
    from lhc_triton.models.pretrained import load_network, pretrained_path

    if batch is not None and not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"batch is {batch}; it must be from 1 to {MAX_BATCH}")
    if network in SHIPPED:
        saved = load_network(pretrained_path(network))  # type: ignore[arg-type]
    elif not Path(network).exists():
        raise FileNotFoundError(
            f"no network {network!r}; give one of {', '.join(SHIPPED)}, or an existing file"
        )
    elif is_artifact(network):
        if batch is not None or backend != "auto":
            raise ValueError(f"{network} brings its own plan: leave --batch and --backend out")
        return lhc.load(network, device=device).plan
    else:
        saved = load_network(network)
    made = saved.architecture
    size = (batch or usual_batch, made.in_channels, made.image_size, made.image_size)
    image = torch.zeros(size, device=device, dtype=dtype)
    return lhc.plan(saved.model.to(device, dtype), image, backend=backend)


def main() -> None:
    """Run the command line; exit code 2 and one line on stderr for a user's mistake."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("LHC_TRITON_DEBUG"):
            raise
        _refuse(_told(error))
    except typer.Abort:
        tell_once("lhc-triton: interrupted")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        # The parser's own errors (unknown option, ...) share this method, and no public base class.
        if not hasattr(error, "format_message"):
            raise
        _refuse(f"{error.format_message().rstrip('.')}. See lhc-triton --help.")
    raise SystemExit(code if isinstance(code, int) else 0)


def _told(error: Exception) -> str:
    """Return an error's message; the system's own with the file first and without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _refuse(message: str) -> NoReturn:
    tell_once(f"lhc-triton: {' '.join(message.split())}")
    raise SystemExit(USER_MISTAKE) from None
