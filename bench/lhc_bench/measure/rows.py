"""Results of a benchmark: one schema for all devices, written as JSON and CSV, checked when read back."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from lhc_bench.files import write_text
from lhc_triton.files import parse_json
from lhc_triton.runtime.choosing.doctor import cpu_name, package_versions
from lhc_triton.runtime.choosing.timing import geometric_mean

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Densities that rows are sorted under unless a run names its own."""

COUNTS = ("batch", "in_channels", "out_channels", "height", "width", "in_block", "out_block", "threads")
TIMES = ("cold_us", "cold_baseline_us", "baseline_us", "time_us", "p20_us", "p80_us", "floor_us", "speedup")
POSITIVE = frozenset((*COUNTS, *TIMES))

R = TypeVar("R")


@dataclass(frozen=True)
class Row:
    """One measurement: a layer, or a whole network, by one backend against the fastest dense peer.

    Attributes:
        case: what was measured, for example "vgg16-imagenet/conv3_2".
        model, layer: its parts; the layer of a whole network is "all".
        device: "cpu" or "cuda".
        dtype: compute type, for example "float32".
        batch, in_channels, out_channels, height, width: N, I, O, H, W of the input.
        kernel, stride: of the square convolution; 0 for a whole network.
        density: live share of the weights that was reached, in (0, 1].
        in_block, out_block: input channels and filters that share one mask bit.
        backend: who ran the sparse layer.
        baseline: name of the fastest dense peer.
        baseline_us, time_us: medians of baseline and backend, microseconds.
        p20_us, p80_us: a fifth and four fifths of the backend's rounds were at most this long.
        speedup: baseline_us / time_us.
        floor_us: the least time the live work could take at the rates measured in the same run.
        rel_err: norm error of the backend's output against a float64 dense reference with the same mask.
        seed: of mask, weights and input.
        gmacs: 1e9 multiply-accumulates per second that it reached, those of live weights counted.
        peak_share: gmacs as a share of what a large matrix product reached in the same run.
        memory_mb, baseline_memory_mb: 1e6 bytes of tensors during a call of this and of the eager dense
            network: weights, tables, and activations at their most.
        threads: of the CPU.
        cold_us, cold_baseline_us: of a layer on a GPU, the medians of the same two with L2 emptied before
            each sample. `time_us` and `baseline_us` are repeated calls, whose operands may still be there.

    The last seven came later: they are None where a file does not have them, or where they do not apply.
    """

    case: str
    model: str
    layer: str
    device: str
    dtype: str
    batch: int
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    height: int
    width: int
    density: float
    in_block: int
    out_block: int
    backend: str
    baseline: str
    baseline_us: float
    time_us: float
    p20_us: float
    p80_us: float
    speedup: float
    floor_us: float
    rel_err: float
    seed: int
    gmacs: float | None = None
    peak_share: float | None = None
    memory_mb: float | None = None
    baseline_memory_mb: float | None = None
    threads: int | None = None
    cold_us: float | None = None
    cold_baseline_us: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, POSITIVE)
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}, expected a share in (0, 1]")


@dataclass(frozen=True)
class Results:
    """What results.json holds.

    Attributes:
        env: where and how it was measured; see `environment`.
        rows: the measurements.
        summary: see `summarise`.
    """

    env: dict[str, Any]
    rows: tuple[Row, ...]
    summary: dict[str, Any]

    @property
    def densities(self) -> tuple[float, ...]:
        """Densities the run asked for, rising."""
        return tuple(sorted(self.env.get("densities") or DENSITIES))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form: {"env", "rows", "summary"}."""
        return {"env": self.env, "rows": [asdict(row) for row in self.rows], "summary": self.summary}


def check_fields(row: Any, positive: Collection[str]) -> None:
    """Check the texts and numbers of a row against the types that its dataclass declares.

    Args:
        row: of a dataclass whose fields are texts, integers and numbers, some of them optional.
        positive: fields that must be above 0; the other numbers must not be negative.

    Raises:
        ValueError: one that is of another type, empty, not finite or too small; the message names it.
    """
    for item in fields(row):
        value, (wanted, _, optional) = getattr(row, item.name), str(item.type).partition(" | ")
        if optional and value is None:
            continue
        if wanted == "str":
            if not isinstance(value, str) or not value:
                raise ValueError(f"{item.name} is {value!r}, expected a text")
        elif isinstance(value, bool) or not isinstance(value, int if wanted == "int" else (int, float)):
            raise ValueError(
                f"{item.name} is {value!r}, expected {'an integer' if wanted == 'int' else 'a number'}"
            )
        elif not math.isfinite(value):
            raise ValueError(f"{item.name} is {value}, expected a finite number")
        elif value < 0 or (value == 0 and item.name in positive):
            least = "above 0" if item.name in positive else "of at least 0"
            raise ValueError(f"{item.name} is {value}, expected a number {least}")


def nearest_density(density: float, densities: Sequence[float] = DENSITIES) -> float:
    """Return the wanted density that a reached one belongs to: the nearest by ratio, ties to the smaller."""
    return min(sorted(densities), key=lambda wanted: abs(math.log(density / wanted)))


def summarise(rows: Iterable[Row], densities: Sequence[float] = DENSITIES) -> dict[str, Any]:
    """Sum rows up.

    Args:
        rows: any number of them, also none.
        densities: the wanted densities; each row is counted under the nearest one.

    Returns:
        {"geomean_speedup": {backend: {density as str: value}}, "wins": n, "losses": n, "groups": [...]}; a
        row wins with a speed-up above 1 and loses below it. A group holds the rows of one backend, block size
        and density: "backend", "in_block", "out_block", "density", "cases", the geometric means "speedup",
        "floor_share" (floor_us / time_us) and "peak_share" (None where a row has none), and the case that
        gained least as "worst_case" and "worst_speedup".
    """
    rows = tuple(rows)
    by_backend: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    groups: dict[tuple[str, int, int, float], list[Row]] = defaultdict(list)
    for row in rows:
        density = nearest_density(row.density, densities)
        by_backend[row.backend][density].append(row)
        groups[row.backend, row.in_block, row.out_block, density].append(row)
    return {
        "geomean_speedup": {
            backend: {str(d): geometric_mean([row.speedup for row in found[d]]) for d in sorted(found)}
            for backend, found in sorted(by_backend.items())
        },
        "wins": sum(row.speedup > 1 for row in rows),
        "losses": sum(row.speedup < 1 for row in rows),
        "groups": [_group(key, groups[key]) for key in sorted(groups)],
    }


def _group(key: tuple[str, int, int, float], rows: Sequence[Row]) -> dict[str, Any]:
    worst = min(rows, key=lambda row: row.speedup)
    shares = [row.peak_share for row in rows if row.peak_share]
    return {
        **dict(zip(("backend", "in_block", "out_block", "density"), key, strict=True)),
        "cases": len(rows),
        "speedup": geometric_mean([row.speedup for row in rows]),
        "floor_share": geometric_mean([row.floor_us / row.time_us for row in rows]),
        "peak_share": geometric_mean(shares) if len(shares) == len(rows) else None,
        "worst_case": worst.case,
        "worst_speedup": worst.speedup,
    }


def write_results(out_dir: str | Path, results: Results) -> tuple[Path, Path]:
    """Write results.json and results.csv, each whole or not at all; return their paths."""
    return write_document(out_dir, results.to_dict(), [item.name for item in fields(Row)])


def write_document(
    out_dir: str | Path, document: Mapping[str, Any], columns: Sequence[str]
) -> tuple[Path, Path]:
    """Write {"env", "rows", "summary"} as results.json, and its rows as results.csv with these columns."""
    out = Path(out_dir)
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(document["rows"])
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    return write_text(out / "results.json", text), write_text(out / "results.csv", table.getvalue())


def suite_of(path: str | Path) -> str | None:
    """Return which suite a JSON file says it is of; None if it does not say, or cannot be read."""
    try:
        suite = parse_json(Path(path).read_text(encoding="utf-8"))["env"]["suite"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return suite if isinstance(suite, str) else None


def read_results(path: str | Path) -> Results:
    """Read and check a results.json.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: one line that names the file and what is wrong with it.
    """
    return read_document(path, _checked)


def read_document(path: str | Path, check: Callable[[dict[str, Any]], R]) -> R:
    """Read a results.json of any suite.

    Args:
        path: the file.
        check: makes results of {"env": dict, "rows": list, "summary": dict}; a ValueError where it cannot.

    Returns:
        What ``check`` gives.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no results file at {path}; `lhc-triton bench` writes one")
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        _check_parts(found)
        return check(found)
    except ValueError as error:  # broken JSON and broken UTF-8 are ValueErrors as well
        raise ValueError(f"{path} is not a results file of `lhc-triton bench`: {error}") from None


def _check_parts(found: Any) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, expected an object")
    for name, kind in (("env", dict), ("rows", list), ("summary", dict)):
        if not isinstance(found.get(name), kind):
            raise ValueError(f'"{name}" is missing or of the wrong type')


def _checked(found: dict[str, Any]) -> Results:
    densities = found["env"].get("densities", [])
    if not isinstance(densities, list) or not all(_is_density(d) for d in densities):
        raise ValueError('"densities" in "env" must be a list of numbers in (0, 1]')
    return Results(found["env"], read_rows(Row, found["rows"]), found["summary"])


def _is_density(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def read_rows(kind: type[R], found: Sequence[Any]) -> tuple[R, ...]:
    """Make rows of the dataclass ``kind`` from JSON objects; ValueError with the number of a wrong one."""
    return tuple(_row(kind, index, row) for index, row in enumerate(found))


def _row(kind: type[R], index: int, found: Any) -> R:
    columns = fields(kind)  # type: ignore[arg-type]
    names = {item.name for item in columns}
    later = {item.name for item in columns if item.default is None}
    if not isinstance(found, dict):
        raise ValueError(f"row {index} is no object")
    if missing := sorted(names - later - found.keys()):
        raise ValueError(f"row {index} lacks {', '.join(missing)}")
    try:
        return kind(**{name: found[name] for name in names & found.keys()})
    except ValueError as error:
        raise ValueError(f"row {index}: {error}") from None


def environment(device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Describe where a benchmark runs: device, threads, clocks, versions, commit and command.

    Args:
        device: "cpu" or "cuda".
        more: what else belongs there, for example the suite's name and its rounds.
    """
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "device_kind": device,
        "threads": torch.get_num_threads(),
        "clock_mhz": _gpu_clock() if cuda else _cpu_clock(),
        "versions": {"python": platform.python_version(), **package_versions()},
        **_checkout(),
        "command": shlex.join([Path(sys.argv[0] or "python").name, *sys.argv[1:]]),
        **more,
    }


def _output(command: Sequence[str], folder: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=folder)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _checkout() -> dict[str, Any]:
    """Return commit and whether the packages' files differ from it; None for an installed package."""
    here = Path(__file__).resolve().parent
    if _output(["git", "ls-files", "--error-unmatch", "__init__.py"], here) is None:
        return {"commit": None, "modified": None}
    code = (":/lhc_triton", ":/kernels", ":/bench/lhc_bench")
    changed = _output(["git", "status", "--porcelain", "--", *code], here)
    return {"commit": _output(["git", "rev-parse", "HEAD"], here), "modified": changed is not None}


def _cpu_clock() -> float | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return max(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))
    except (OSError, ValueError):
        return None


def _gpu_clock() -> float | None:
    found = _output(["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"])
    try:
        return float(found.splitlines()[0]) if found else None
    except ValueError:
        return None


def describe(env: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Return the lines of a caption: device, threads, types and rounds; then command, commit and torch."""
    parts = [str(env.get("device", "unknown device"))]
    if env.get("device_kind", "cpu") == "cpu" and env.get("threads"):
        parts.append(f"{env['threads']} {'thread' if env['threads'] == 1 else 'threads'}")
    parts.append(", ".join(sorted({row.dtype for row in rows})))
    batches = sorted({row.batch for row in rows})
    several = " or ".join(map(str, batches)) if len(batches) < 3 else f"{batches[0]} to {batches[-1]}"
    parts.append(f"batch {several}")
    if env.get("rounds"):
        parts.append(f"medians of up to {env['rounds']} interleaved rounds")
    return [", ".join(parts), *origin(env)]


def origin(env: Mapping[str, Any]) -> list[str]:
    """Return the caption's line of command, commit and torch; none where nothing of it is known."""
    parts = [str(env["command"])] if env.get("command") else []
    if env.get("commit"):
        parts.append(f"commit {str(env['commit'])[:10]}{' with changes' if env.get('modified') else ''}")
    versions = env.get("versions")
    if isinstance(versions, dict) and versions.get("torch"):
        parts.append(f"torch {versions['torch']}")
    return [", ".join(parts)] if parts else []
