"""The first minutes on a GPU: its tests, layers before and after tuning, networks, and hardware counters."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lhc_bench.files import write_text
from lhc_bench.measure import gpu_counters, suites
from lhc_bench.measure.cases import LayerCase
from lhc_bench.measure.rows import environment
from lhc_bench.measure.tuning_suite import measured_jobs
from lhc_triton.runtime.choosing import layer_tuner
from lhc_triton.runtime.choosing.compiled_ahead import compiled_ahead
from lhc_triton.runtime.choosing.doctor import diagnose
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.choosing.tuning_jobs import run_jobs

TEST_SECONDS = 480.0
DEFAULT_SECONDS = 60.0
TUNING_SECONDS = 180.0
TESTS = ("tests/kernels", "tests/runtime")
DRY_TESTS = ("tests/kernels/test_kernels_gpu.py", "-k", "cuda_graph")
LAYERS, NETWORKS = "gpu-first", "gpu-first-models"
ROOT = Path(__file__).resolve().parents[3]

Lines = list[str]


def run_tests(out: Path, dry: bool) -> Lines:
    """Run the tests marked gpu, a worker for each core where pytest-xdist is there."""
    workers = ["-p", "xdist", "-n", str(len(os.sched_getaffinity(0)))]
    command = [
        sys.executable, "-m", "pytest",
        *(workers if importlib.util.find_spec("xdist") and not dry else ()),
        "-W", "default", "-m", "gpu", "-ra", "--durations", "10", "--junitxml", str(out / "tests.xml"),
        *(DRY_TESTS if dry else TESTS),
    ]  # fmt: skip
    # Nothing is known of the plugins that this Python has.
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    log = out / "tests.log"
    code = _call(command, log, environ, TEST_SECONDS)
    return [f"pytest: exit code {code}", *log.read_text(errors="replace").splitlines()[-25:]]


def run_layers(out: Path, dry: bool) -> Lines:
    """Measure the layers with default configs, tune them, measure them again."""
    store = TimingStore()
    suite = suites.SUITES[LAYERS]
    assert isinstance(suite, suites.Suite)
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    cases = [case for case in suite.cases() if isinstance(case, LayerCase)]
    jobs = measured_jobs(cases, suite.blocks, suite.densities, suite.device, suite.dtype)
    lines: Lines = []

    def tune(name: str, limit: int, seconds: float) -> None:
        ahead = contextlib.nullcontext(PaperBench) if dry else compiled_ahead(jobs, device, store, limit)
        with ahead as benches:
            report = run_jobs(jobs, device, store, budget_s=seconds, benches=benches, limit=limit)
        write_text(out / f"tuning-{name}.json", json.dumps(report.to_dict(), indent=1) + "\n")
        done = report.jobs - report.jobs_left
        lines.append(f"{name}: {done} of {report.jobs} layers in {report.seconds:.0f} s {report.problem}")

    tune("default", 1, DEFAULT_SECONDS)  # the heuristic's configs, compiled by all cores
    lines += _suite(LAYERS, out / "default", dry)
    tune("tuned", 1 if dry else layer_tuner.LIMIT, TUNING_SECONDS)
    shutil.copy(store.path, out / "timings.json")
    lines += _drawn(lambda: _draw_landscapes(store.path, out))
    return [*lines, *_suite(LAYERS, out / "tuned", dry)]


def run_networks(out: Path, dry: bool) -> Lines:
    """Measure whole networks, with what the part "layers" tuned if it ran before."""
    return _suite(NETWORKS, out, dry)


def run_counters(out: Path, dry: bool) -> Lines:
    """Read hardware counters of three kernels."""
    return gpu_counters.read_all(out, dry)


PARTS: dict[str, Callable[[Path, bool], Lines]] = {
    "tests": run_tests,
    "layers": run_layers,
    "networks": run_networks,
    "counters": run_counters,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts; returns 1 if one of them failed, 2 for a mistake of the caller's."""
    parser = argparse.ArgumentParser("gpu_first.sh", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results/DEVICE/first")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU: does it all hold?")
    parser.add_argument("--archive", action="store_true", help="pack each part's files into one archive")
    given = parser.parse_args(arguments)
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"part {unknown[0]!r} is not known; choose among {', '.join(PARTS)}")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU; try --dry-run")
    name = "dry-run" if given.dry_run else torch.cuda.get_device_name()
    out = given.out or ROOT / "bench" / "results" / re.sub("[^a-z0-9]+", "-", name.lower()) / "first"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    # Own records, kept beside the results; the parts that follow find them.
    os.environ["LHC_TRITON_CACHE"] = str(out / "records")
    failed = False
    for part in given.parts or PARTS:
        failed |= not run_part(part, out, given.dry_run, given.archive)
    return int(failed)


def run_part(part: str, out: Path, dry: bool, archive: bool) -> bool:
    """Run one part into a folder of its name; whatever fails is told, and what was measured is kept."""
    folder, start = out / part, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    good = True
    try:
        lines = PARTS[part](folder, dry)
    except Exception as error:  # the other parts, and this one's files, are worth having all the same
        import traceback

        good, lines = (
            False,
            [*traceback.format_exc().splitlines(), f"FAILED: {type(error).__name__}: {error}"],
        )
    env = environment("cpu" if dry else "cuda", doctor=diagnose(), seconds=time.monotonic() - start)
    write_text(folder / "environment.json", json.dumps(env, indent=1, default=str) + "\n")
    text = "\n".join([f"== {part}, {time.monotonic() - start:.0f} s", *filter(None, lines)])
    write_text(out / f"{part}.txt", text + "\n")
    print(text, flush=True)
    if archive:
        with tarfile.open(out / f"{part}.tar.gz", "w:gz") as packed:
            packed.add(folder, part)
        shutil.rmtree(folder)
    return good


def _suite(name: str, out: Path, dry: bool) -> Lines:
    def progress(done: int, total: int, label: str) -> None:
        print(f"   {name}: {done} of {total}, {label}", file=sys.stderr, flush=True)

    found = suites.run_suite(name, out, progress, compiled=False, rounds=1 if dry else None)
    table = [
        ("layer", "density", "block", "backend", "dense us", "us", "cold: dense", "ours", "times", "dense")
    ]
    for row in found["rows"]:
        cold = ("", "") if row["cold_us"] is None else (row["cold_baseline_us"], row["cold_us"])
        numbers = (row["baseline_us"], row["time_us"], *cold)
        table.append(
            (
                row["case"],
                f"{row['density']:.2f}",
                f"{row['in_block']}x{row['out_block']}",
                row["backend"],
                *(f"{us:.1f}" if us else "" for us in numbers),
                f"{row['speedup']:.2f}",
                row["baseline"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    notes = [*found["env"]["notes"], *(f"{k}: {v}" for k, v in found["env"]["skipped_peers"].items())]
    return [out.name, *lines, *(f"note: {note}" for note in notes[:8]), *_drawn(lambda: _draw(out))]


def _draw(out: Path) -> None:
    from lhc_bench.pictures.drawing import draw

    draw(out / "results.json", out)


def _draw_landscapes(store: Path, out: Path) -> None:
    from lhc_bench.pictures.config_landscape import draw_landscapes

    draw_landscapes(store, out)


def _drawn(draw: Callable[[], None]) -> Lines:
    """Draw; what cannot be drawn here, for want of matplotlib, say, can be drawn elsewhere from the files."""
    try:
        draw()
    except Exception as error:
        return [f"no picture: {type(error).__name__}: {error}"]
    return []


class PaperBench:
    """Runs a config once and takes that for its time: for dry runs."""

    def __init__(self, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._work = layer_tuner.Workload(layer, dtype, device)

    def prepare(self, config: Sequence[int]) -> Callable[[], float]:
        """Run a config; see `layer_tuner.Bench`."""
        call = self._work.sparse("triton", config)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: 1e6 * seconds

    def check(self) -> None:
        """The CPU is there."""


def _call(command: Sequence[str], log: Path, environ: dict[str, str], seconds: float) -> int:
    """Run a command into a log, its process group ended after so many seconds; returns the exit code."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            return 124


if __name__ == "__main__":
    sys.exit(main())
