"""What bounds a kernel, by Nsight Compute: memory, L2, shared memory, tensor cores, issue slots."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lhc_bench.files import write_text
from lhc_bench.measure.cases import LayerCase
from lhc_bench.measure.tuning_suite import shared_plan
from lhc_triton.runtime.choosing.workload import Workload

CASES = {"tiles of 16": (256, 56, 16), "tiles of 64": (256, 28, 64), "tiles of 128": (512, 28, 128)}
"""Channels, side of the image, filters of a tile."""

TINY = {"tiles of 16": (32, 4, 16)}
SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
    "Occupancy", "LaunchStats",
)  # fmt: skip
SECONDS = 90
SHOWN = (
    "Duration", "Memory Throughput", "L2 Cache Throughput", "L1/TEX Cache Throughput", "SM Busy",
    "Issue Slots Busy", "L1/TEX Hit Rate", "L2 Hit Rate", "Registers Per Thread", "Achieved Occupancy",
)  # fmt: skip


def read_all(out: Path, dry: bool = False) -> list[str]:
    """Profile the kernel of each case; writes counters.json, returns lines for people.

    Args:
        out: folder for what Nsight Compute said, and counters.json: {case: {counter: "value unit"}}.
        dry: a tiny case on the CPU, with whatever `ncu` is on the PATH.
    """
    tool = shutil.which("ncu")
    if tool is None:
        return ["ncu is not on the PATH: no counters"]
    found: dict[str, dict[str, str]] = {}
    lines = []
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name in TINY if dry else CASES:
        log = out / f"{name.replace(' ', '-')}.csv"
        # The clocks are left alone: the machine may be shared.
        command = [
            tool,
            "--clock-control",
            "none",
            "--kernel-name",
            "regex:grouped_conv2d",
            "--launch-skip",
            "2",
        ]
        command += ["--launch-count", "1", "--csv", "--page", "details", "--log-file", str(log)]
        command += [part for section in SECTIONS for part in ("--section", section)]
        command += [sys.executable, "-m", __name__, name, *(["dry"] if dry else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environ)
        except subprocess.TimeoutExpired:
            lines.append(f"{name}: ncu took more than {SECONDS} s")
            continue
        found[name] = counters(log.read_text(errors="replace") if log.exists() else "")
        if not found[name]:
            lines.append(f"{name}: ncu gave nothing: {(done.stdout + done.stderr).strip()[-300:]}")
        lines += [f"{name}: {counter} {value}" for counter, value in found[name].items() if counter in SHOWN]
    write_text(out / "counters.json", json.dumps(found, indent=1) + "\n")
    return lines


def counters(text: str) -> dict[str, str]:
    """Return {counter: "value unit"} of `ncu --csv --page details`, whose own lines begin with ==."""
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("=="))
    return {
        row["Metric Name"]: f"{row.get('Metric Value')} {row.get('Metric Unit') or ''}".strip()
        for row in rows
        if row.get("Metric Name")
    }


def launch(name: str, dry: bool) -> None:
    """Launch a case's kernel a few times, by its default config: density 0.1, float16, 64 images."""
    channels, side, width = (TINY if dry else CASES)[name]
    geometry = LayerCase("counters", name, channels, channels, side, side).geometry(1 if dry else 64)
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    call = Workload(shared_plan(name, geometry, 0.1, width), torch.float16, device).sparse("triton")
    for _ in range(4):
        call()
    if not dry:
        torch.cuda.synchronize()


if __name__ == "__main__":
    launch(sys.argv[1], sys.argv[2:] == ["dry"])
