"""The suites by name: which layers, networks, blocks and densities are measured, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lhc_triton.runtime.timing import time_paired

from .cases import LayerCase, batch_of, eligible_cases, quick_cases
from .measure import MODEL_BATCH, MODEL_NAME, Setting, Timer, measure_layer, measure_machine, measure_model
from .rows import Results, Row, environment, summarise, write_results

Progress = Callable[[int, int, str], None]
Blocks = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Suite:
    """What a suite measures.

    Attributes:
        device: "cpu" or "cuda".
        dtype: compute type.
        backend: who runs the sparse layers.
        cases: gives the layers; None for the whole network.
        blocks: (in_block, out_block) of the masks.
        densities: wanted live shares.
        rounds: interleaved rounds of each timing.
    """

    device: str
    dtype: torch.dtype
    backend: str
    cases: Callable[[], Sequence[LayerCase]] | None
    blocks: Blocks
    densities: tuple[float, ...]
    rounds: int


QUICK_DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
ALL_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
BLOCKS: Blocks = ((32, 16), (32, 64))
CPU = ("cpu", torch.float32, "torch")
GPU = ("cuda", torch.float16, "triton")
SUITES = {
    "quick": Suite(*CPU, quick_cases, BLOCKS[:1], QUICK_DENSITIES, 10),
    "cpu-layers": Suite(*CPU, eligible_cases, BLOCKS, ALL_DENSITIES, 20),
    "gpu-layers": Suite(*GPU, eligible_cases, BLOCKS, ALL_DENSITIES, 30),
    "cpu-models": Suite(*CPU, None, BLOCKS, QUICK_DENSITIES, 20),
    "gpu-models": Suite(*GPU, None, BLOCKS, QUICK_DENSITIES, 30),
}


def suite_names() -> tuple[str, ...]:
    """Names of the suites."""
    return tuple(SUITES)


def run_suite(
    name: str,
    out_dir: str | Path,
    progress: Progress = lambda done, total, label: None,
    seed: int = 0,
    rounds: int | None = None,
    densities: Sequence[float] | None = None,
    compiled: bool = False,
    timer: Timer = time_paired,
) -> dict[str, Any]:
    """Run a suite and write results.json and results.csv.

    Args:
        name: one of `suite_names`.
        out_dir: folder for the results; made where it does not exist.
        progress: called with (measurements done, all of them, the one that begins).
        seed: of masks, weights and inputs.
        rounds: interleaved rounds of each timing; by default the suite's.
        densities: wanted live shares; by default the suite's.
        compiled: also compare layers with torch.compile, which takes seconds a layer.
        timer: measures as `lhc_triton.runtime.timing.time_paired` does.

    Returns:
        What results.json holds: {"env", "rows", "summary"}.

    Raises:
        ValueError: an unknown suite, a suite for a GPU where there is none, rounds below 1, a negative seed
            or a density outside (0, 1]; nothing is written then.
        OSError: if the folder cannot be written.
    """
    suite = _checked_suite(name)
    rounds = suite.rounds if rounds is None else rounds
    wanted = tuple(suite.densities if densities is None else densities)
    _check(rounds, seed, wanted)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)

    setting = Setting(suite.device, suite.dtype, suite.backend, rounds, seed, compiled, timer)
    cases: Sequence[LayerCase | None] = suite.cases() if suite.cases else (None,)
    jobs = [(case, block, density) for case in cases for block in suite.blocks for density in wanted]
    progress(0, len(jobs), "matrix product and copy rates")
    machine = measure_machine(setting)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for done, (case, block, density) in enumerate(jobs):
        progress(done, len(jobs), f"{case.name if case else MODEL_NAME} at density {density:g}")
        if case is None:
            row, left_out = measure_model(MODEL_BATCH[suite.device], block, density, setting, machine)
        else:
            batch = batch_of(case.model, suite.device)
            row, left_out = measure_layer(case, batch, block, density, setting, machine)
        rows.append(row)
        skipped |= left_out
    progress(len(jobs), len(jobs), "done")

    env = environment(
        suite.device,
        suite=name,
        rounds=rounds,
        seed=seed,
        densities=list(wanted),
        skipped_peers=skipped,
        **asdict(machine),
    )
    results = Results(env, tuple(rows), summarise(rows, wanted))
    write_results(out, results)
    return results.to_dict()


def _checked_suite(name: str) -> Suite:
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is not known; choose one of {', '.join(SUITES)}")
    suite = SUITES[name]
    if suite.device == "cuda" and not torch.cuda.is_available():
        on_cpu = ", ".join(n for n, s in SUITES.items() if s.device == "cpu")
        raise ValueError(f"suite {name!r} needs a CUDA GPU, and torch sees none; without one run {on_cpu}")
    return suite


def _check(rounds: int, seed: int, densities: tuple[float, ...]) -> None:
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if not densities or not all(0 < density <= 1 for density in densities):
        raise ValueError(f"densities are {densities}; give at least one, each in (0, 1]")
