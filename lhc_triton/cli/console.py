"""What the command line shows: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from lhc_triton.files import printable

_LONGEST = 1000  # characters of a line or a cell: names may come out of a file, and be long or worse


@contextmanager
def stages() -> Iterator[Any]:
    """A spinner on stderr that names the stage at work."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:

        def progress(stage: str) -> None:
            if console.is_terminal:
                status.update(stage)
            else:
                console.print(f"- {stage}", highlight=False, soft_wrap=True)

        yield progress


@contextmanager
def counting(title: str) -> Iterator[Any]:
    """A progress bar on stderr: called with (done, total, label)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[label]}"),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(title, total=None, label="")

    def progress(done: int, total: int, label: str = "") -> None:
        bar.start()  # only now, so that a mistake found before any work is one line; again, it does nothing
        bar.update(task, completed=done, total=total, label=label)

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def show_results(results: dict[str, Any]) -> None:
    """Print what a suite found: groups of layers, ways to plan, or rows of batches."""
    if "groups" in results["summary"]:
        show_summary(results["summary"])
    elif "aims" in results["summary"]:
        show_planner(results["summary"])
    else:
        show_loading(results["rows"])


def show_summary(summary: dict[str, Any]) -> None:
    """Print a line for each backend, block size and density of a suite."""
    rows = [
        (
            group["backend"],
            f"{group['in_block']}x{group['out_block']}",
            f"{group['density']:g}",
            str(group["cases"]),
            f"{group['speedup']:.2f}x",
            f"{group['worst_speedup']:.2f}x  {group['worst_case']}",
            f"{100 * group['floor_share']:.0f} %",
            "" if group["peak_share"] is None else f"{100 * group['peak_share']:.0f} %",
        )
        for group in summary["groups"]
    ]
    head = ("backend", "blocks", "density", "cases", "speed-up", "least", "of the floor", "of a matmul")
    print_table(head, rows)
    typer.echo("Speed-up over the best dense form in the same run, geometric mean over the cases.")


def show_planner(summary: dict[str, Any]) -> None:
    """Print a line for each cost model and way to form tiles, then the optimum and the aims."""
    kinds = list(dict.fromkeys(kind for row in summary["methods"] for kind in row["predicted_ratio"]))
    rows = [
        (
            row["cost_model"],
            row["method"],
            *(f"{ratio:.3f}" if (ratio := row["predicted_ratio"].get(kind)) else "-" for kind in kinds),
            f"{row['worst_ratio']:.3f}",
            f"{row['planning_ms']:.1f}",
            f"{row['most_planning_ms']:,.0f}",
        )
        for row in summary["methods"]
    ]
    print_table(("cost model", "tiles", *kinds, "worst", "planning, ms", "most"), rows)
    typer.echo("Predicted time over that of the best way under the same mask, geometric mean over the cases.")
    if optimum := summary["optimum"]:
        typer.echo(
            f"Planner over the optimum, where that was found ({optimum['cases']} cases): "
            f"{optimum['predicted_ratio']:.4f}, at most {optimum['worst_ratio']:.4f}."
        )
    for aim in summary["aims"]:
        typer.echo(
            f"{aim['aim']}: at most {aim['planning_ms']:,.0f} ms ({aim['case']}); "
            f"the aim of {aim['limit_ms']:,.0f} ms is {'met' if aim['met'] else 'missed'}."
        )


def show_loading(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each way to deliver batches, and one for bare decoding."""
    cells = [
        (
            row["case"],
            f"{row['width']}x{row['height']}",
            row["augmentation"],
            f"{row['images_per_s']:,.0f}",
            f"{row['p20_images_per_s']:,.0f} to {row['p80_images_per_s']:,.0f}",
            "-" if row["decode_share"] is None else f"{row['decode_share']:.2f}x",
        )
        for row in rows
    ]
    print_table(("batches", "size", "augmentation", "images/s", "20 to 80 %", "of bare decoding"), cells)
    typer.echo("Medians over the rounds. Bare decoding: Pillow in one thread, on the same files.")


def show_demo(report: dict[str, Any]) -> None:
    """Print what the demo found: the whole network beside its dense twin, and each layer's plan."""
    rows = [
        (
            "test accuracy",
            f"{100 * report['dense_accuracy']:.2f} %",
            f"{100 * report['lhc_accuracy']:.2f} %",
            "",
        ),
        (
            "weights",
            f"{report['weights']:,}",
            f"{report['live_weights']:,}",
            times(report["weight_reduction"]),
        ),
        (
            "MACs per image",
            f"{report['macs']:,}",
            f"{report['live_macs']:,}",
            times(report["mac_reduction"]),
        ),
        (
            f"time of {report['batch']} images",
            f"{report['dense_us'] / 1000:.2f} ms",
            f"{report['lhc_us'] / 1000:.2f} ms",
            times(report["speedup"]),
        ),
    ]
    print_table(("", f"dense ({report['baseline']})", "LHC", "less by"), rows)
    print_table(
        ("layer", "backend", "density", "patterns", "tiles", "why"),
        [
            (
                x["layer"],
                x["backend"],
                f"{x['density']:.3f}",
                str(x["patterns"]),
                str(x["tiles"]),
                x["reason"],
            )
            for x in report["layers"]
        ],
    )
    typer.echo("Weights and MACs count the converted convolutions; times are medians of whole networks.")


def show_diagnosis(found: dict[str, Any]) -> None:
    """Print what this machine can run."""
    versions = [(name, version or "not installed") for name, version in found["packages"].items()]
    print_table(("package", "version"), [("python", found["python"]), *versions])
    print_table(
        ("device", "name", "details"),
        [
            (
                d["device"],
                d["name"],
                ", ".join(f"{k} {v}" for k, v in d.items() if k not in ("device", "name")),
            )
            for d in found["devices"]
        ],
    )
    print_table(
        ("compiler", "version"), [(name, line or "not found") for name, line in found["compilers"].items()]
    )
    set_here = [(name, value) for name, value in found["environment"].items()]
    if set_here:
        print_table(("variable", "value"), set_here)
    print_table(("native kernel", "value"), list(found["native"].items()))
    for kind, rows in found["backends"].items():
        print_table((f"backend on {kind}", "state"), [(row["backend"], row["state"]) for row in rows])
    for note in found["notes"]:
        typer.echo(f"Note: {note}")


def show_experiments(found: Sequence[dict[str, Any]]) -> None:
    """Print a line for each experiment of a report: means, and spreads where there are several runs."""
    columns = (
        ("dense, %", "dense_accuracy", 100, ".2f"),
        ("LHC, %", "lhc_accuracy", 100, ".2f"),
        ("gain", "gain", 100, "+.2f"),
        ("weights /", "weight_reduction", 1, ".1f"),
        ("MACs /", "mac_reduction", 1, ".1f"),
        ("patterns", "patterns", 1, ".0f"),
        ("CPU", "predicted_cpu", 1, ".1f"),
        ("GPU", "predicted_cuda", 1, ".1f"),
        ("measured", "measured", 1, ".2f"),
    )
    rows = [
        (
            experiment["label"],
            str(len(experiment["runs"])),
            *(
                _spread(experiment["mean"][name], experiment["spread"][name], factor, form)
                for _, name, factor, form in columns
            ),
        )
        for experiment in found
    ]
    print_table(("setting", "runs", *(column[0] for column in columns)), rows)
    typer.echo("Test accuracies; weights and MACs of the converted layers, times fewer; ± over the seeds.")
    typer.echo("CPU, GPU: predicted speed-up of the converted layers. Measured: of the whole network.")


def _spread(mean: float | None, spread: float | None, factor: float, form: str) -> str:
    if mean is None:
        return "-"
    text = f"{factor * mean:{form}}"
    return text if spread is None else f"{text} ± {factor * spread:{form.lstrip('+')}}"


def show_topology(statistics: Sequence[dict[str, Any]]) -> None:
    """Print what each layer learned."""
    print_table(
        ("layer", "shape", "density", "weights", "live", "patterns", "kernel shapes (share)"),
        [
            (
                row["layer"],
                f"{row['in_channels']}->{row['out_channels']} {row['kernel'][0]}x{row['kernel'][1]}",
                f"{row['density']:.3f}",
                f"{row['weights']:,}",
                f"{row['live_weights']:,}",
                f"{row['patterns']} of {row['groups']}",
                "  ".join(f"{glyph(s['taps'])} {100 * s['share']:.0f}%" for s in row["shapes"][:3]),
            )
            for row in statistics
        ],
    )


def show_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """Print what the compiler made of each kernel."""
    head = ("target", "kernel", "layer", "dtype", "config", "registers", "stack", "shared", "wgmma", "async")
    print_table(head, [_kernel_cells(row) for row in rows])
    typer.echo("Registers and stack bytes of a thread, shared bytes of a program.")


def _kernel_cells(row: dict[str, Any]) -> tuple[str, ...]:
    config = row["config"]
    blocks = f"{config['block_m']}x{config['block_n']}x{config['block_k'] * config['entries']}"
    splits = f" {config['splits']}" if config["splits"] > 1 else ""
    depth = f"{config['num_warps']} warps, {config['num_stages']} stages"
    return (
        row["target"],
        row["kernel"],
        row["layer"],
        row["dtype"],
        f"{blocks}, {depth}, {config['variant']}{splits}",
        *(str(row[name]) for name in ("registers", "stack_bytes", "shared_bytes")),
        *("yes" if row[name] else "no" for name in ("wgmma", "async_copy")),
    )


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table; its cells are taken as text, of which control characters are escaped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(printable(cell, _LONGEST).replace("[", r"\[") for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def tell_once(line: str) -> None:
    """Print a line on stderr, once where several processes of a run have the same to say.

    torchrun gives the processes of a machine a folder together, a new one for each attempt. Whoever leaves a
    mark there first speaks. It need not be rank 0: torchrun ends that one as soon as another has ended, and a
    mistake may be another's alone. Where there is no such folder, rank 0 speaks.
    """
    line = printable(line, _LONGEST)
    if _is_first_to_tell(line):
        typer.echo(line, err=True)


def _is_first_to_tell(line: str) -> bool:
    own_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_N/LOCAL_RANK/error.json
    if not own_file:
        return os.environ.get("RANK", "0") == "0"
    mark = Path(own_file).parent.parent / f"told-{hashlib.sha256(line.encode()).hexdigest()}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # said twice is better than not at all
    return True


def print_json(value: Any) -> None:
    """Print JSON for machines."""
    typer.echo(json.dumps(value, indent=2))


def times(ratio: float) -> str:
    """Write a ratio for people."""
    return f"{ratio:.2f}x"


def glyph(taps: list[list[int]]) -> str:
    """Draw a kernel's live taps, row by row."""
    return "/".join("".join("■" if tap else "·" for tap in row) for row in taps)
