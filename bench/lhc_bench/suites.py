"""The suites by name: which layers, networks, blocks and densities are measured, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lhc_triton.runtime.timing import Timing, time_paired

from .cases import LayerCase, batch_of, eligible_cases, quick_cases
from .files import write_beside
from .layers import LayerSubject
from .measure import Setting, Subject, Timer, measure, measure_machine
from .networks import MODEL_BATCH, MODEL_NAME, NetworkSubject
from .rows import Results, Row, environment, summarise, write_results

Progress = Callable[[int, int, str], None]
Blocks = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Suite:
    """What a suite measures.

    Attributes:
        device: "cpu" or "cuda".
        dtype: compute type.
        backends: who runs the sparse layers.
        cases: gives the layers; None for the whole network.
        blocks: (in_block, out_block) of the masks.
        densities: wanted live shares.
        rounds: interleaved rounds of each timing.
        budget_s: seconds after which a timing begins no further round, so that the suite keeps its promise
            on a slow machine; None: no limit.
    """

    device: str
    dtype: torch.dtype
    backends: tuple[str, ...]
    cases: Callable[[], Sequence[LayerCase]] | None
    blocks: Blocks
    densities: tuple[float, ...]
    rounds: int
    budget_s: float | None = None


QUICK_DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
ALL_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
BLOCKS: Blocks = ((32, 16), (32, 64))
CPU = ("cpu", torch.float32, ("torch",))
GPU = ("cuda", torch.float16, ("triton",))
SUITES = {
    "quick": Suite(*CPU, quick_cases, BLOCKS[:1], QUICK_DENSITIES, 15, budget_s=3.0),
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
    compiled: bool = True,
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
        compiled: also compare with torch.compile, which takes seconds a layer.
        timer: measures as `lhc_triton.runtime.timing.time_paired` does.

    Returns:
        What results.json holds: {"env", "rows", "summary"}. A backend that could not run, or whose result
        was wrong, has no row and a line in ``env["notes"]``.

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
    # Minutes of measuring should not end at a folder that cannot be written.
    write_beside(out / ".writable", "").unlink()

    made: list[int] = []

    def counting(calls: Any, **options: Any) -> dict[str, Timing]:
        times = timer(calls, **options)
        made.append(min(len(timing.samples_us) for timing in times.values()))
        return times

    setting = Setting(
        suite.device, suite.dtype, suite.backends, rounds, seed, compiled, counting, suite.budget_s
    )
    cases: Sequence[LayerCase | None] = suite.cases() if suite.cases else (None,)
    masks = [(block, density) for block in suite.blocks for density in wanted]
    total = len(cases) * len(masks)
    rows: list[Row] = []
    notes: list[str] = []
    skipped: dict[str, str] = {}
    # cuDNN's own search is part of the best dense a GPU has.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        progress(0, total, "matrix product and copy rates")
        machine = measure_machine(setting)
        for index, case in enumerate(cases):
            name_shown = case.name if case else MODEL_NAME
            done = index * len(masks)
            progress(done, total, f"{name_shown}: dense peers")
            subject = _prepare(case, suite, setting)
            skipped |= {f"{name_shown}: {peer}": why for peer, why in subject.skipped.items()}
            for step, (block, density) in enumerate(masks):
                progress(done + step, total, f"{name_shown} at density {density:g}")
                found = measure(subject, block, density, setting, machine)
                rows += found.rows
                notes += found.notes
    progress(total, total, "done")

    env = environment(
        suite.device,
        suite=name,
        rounds=rounds,
        rounds_made=[min(made), max(made)],
        seed=seed,
        densities=list(wanted),
        skipped_peers=skipped,
        notes=notes,
        **asdict(machine),
    )
    results = Results(env, tuple(rows), summarise(rows, wanted))
    write_results(out, results)
    return results.to_dict()


def _prepare(case: LayerCase | None, suite: Suite, setting: Setting) -> Subject:
    if case is None:
        return NetworkSubject.prepare(MODEL_BATCH[suite.device], setting)
    return LayerSubject.prepare(case, batch_of(case.model, suite.device), setting)


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
