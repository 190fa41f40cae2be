"""Tunes many layers: within a budget, shared out over several processes, and resumed where it stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lhc_triton.errors import one_line
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.dispatch import choose_backend
from lhc_triton.runtime.choosing.launch_configs import (
    DETERMINISTIC,
    config_name,
    deterministic,
    fastest,
    planned,
    precision,
)
from lhc_triton.runtime.choosing.layer_tuner import LIMIT, Benches, GpuBench, Tuned, tune_layer
from lhc_triton.runtime.choosing.timing_store import TimingStore, device_name, layer_key

Progress = Callable[[int, int, str], None]
_HEADER = ("layer", "timed", "failed", "left", "best us", "heuristic us", "best config", "backend")


@dataclass(frozen=True)
class Job:
    """One layer to tune.

    Attributes:
        layer: the plan.
        dtype: of the activations.
        choose: also measure the tuned kernel against dense, for the choice of backend in ``accelerate``.
    """

    layer: LayerPlan
    dtype: torch.dtype
    choose: bool = False


@dataclass(frozen=True)
class Row:
    """What is known about one job's layer after a run.

    Attributes:
        layer: its name.
        key: where its records are in the store.
        config: the fastest config, as in the op's ``config`` argument; None if none has been measured.
        time_us: its time, for a full bucket of pixels.
        heuristic_us: the time of the heuristic's config; None if it failed or was not measured.
        timed, failed, left: configs measured now, failed now, and still without a record.
        backend: the choice against dense; "" where it was not asked for or not reached.
        problem: why the job was given up; "" for none.
    """

    layer: str
    key: str
    config: list[int] | None = None
    time_us: float | None = None
    heuristic_us: float | None = None
    timed: int = 0
    failed: int = 0
    left: int = 0
    backend: str = ""
    problem: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row as texts, for a table."""
        times = ("-" if us is None else f"{us:.1f}" for us in (self.time_us, self.heuristic_us))
        config = "-" if self.config is None else " ".join(map(str, self.config))
        counts = (str(self.timed), str(self.failed), str(self.left))
        return (self.layer, *counts, *times, config, self.problem or self.backend or "-")


@dataclass(frozen=True)
class Report:
    """A tuning run.

    Attributes:
        device: the GPU's name.
        store: path of the records.
        rank, ranks: which share of the jobs this process had.
        jobs, jobs_left: jobs of this share, and those the budget did not reach or complete.
        seconds: the run took.
        rows: of the jobs that were begun.
        problem: why the run stopped early, other than by its budget; "" for nothing.
    """

    device: str
    store: str
    rank: int
    ranks: int
    jobs: int
    jobs_left: int
    seconds: float
    rows: tuple[Row, ...] = field(default=())
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data ready for JSON, with sums over the rows."""
        timed, failed = sum(row.timed for row in self.rows), sum(row.failed for row in self.rows)
        return {**asdict(self), "configs_timed": timed, "configs_failed": failed}

    def explain(self) -> str:
        """Return the rows as a plain table for people."""
        cells = [_HEADER, *(row.cells() for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        left = f"; {self.jobs_left} are left, run it again" if self.jobs_left else ""
        lines += ["", f"{self.jobs - self.jobs_left} of {self.jobs} layers on {self.device}{left}"]
        return "\n".join([*lines, f"records: {self.store}"])


def tuning_device(environment: Mapping[str, str] = os.environ) -> tuple[torch.device, int, int]:
    """Return this process's GPU, its rank, and the number of processes, by torchrun's variables.

    Raises:
        ValueError: there is no GPU for this process, tuning is ruled out by LHC_TRITON_DETERMINISTIC=1, or
            a variable makes no sense.
    """
    if deterministic():
        raise ValueError(f"{DETERMINISTIC}=1 rules measured choices out; unset it to tune")
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA GPU, and torch sees none")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = [environment.get(name, default) for name, default in zip(names, ("0", "1", "0"), strict=True)]
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        given = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
        raise ValueError(f"{given}: expected what torchrun sets, or none of them")
    rank, ranks, local = map(int, texts)
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local}, and torch sees {torch.cuda.device_count()} GPUs: start a process for each"
        )
    return torch.device("cuda", local), rank, ranks


def run_jobs(
    jobs: Sequence[Job],
    device: torch.device,
    store: TimingStore,
    *,
    budget_s: float | None = None,
    rank: int = 0,
    ranks: int = 1,
    progress: Progress = lambda done, total, label: None,
    limit: int = LIMIT,
    benches: Benches = GpuBench,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Tune layers, in order; what has a record is not measured again.

    Args:
        jobs: the layers; equal ones are tuned once.
        device: the GPU.
        store: of the records; processes may share it.
        budget_s: seconds after which no further config is begun; None: no limit.
        rank: this process takes every ``ranks``-th job, beginning with this one.
        ranks: processes that share the jobs out.
        progress: called with (jobs done, all of them, the one that begins).
        limit: most candidates of a layer.
        benches: see ``layer_tuner.tune_layer``.
        clock: seconds.

    Raises:
        ValueError: the budget is not positive.
        OSError: the store cannot be written.
    """
    if budget_s is not None and not budget_s > 0:
        raise ValueError(f"budget is {budget_s} seconds; it must be positive")
    start = clock()
    deadline = float("inf") if budget_s is None else start + budget_s
    mine = distinct(jobs, device)[rank::ranks]
    rows: list[Row] = []
    problem = ""
    for index, job in enumerate(mine):
        if clock() >= deadline:
            break
        progress(index, len(mine), job.layer.name)
        try:
            rows.append(_run_job(job, device, store, deadline, limit, benches, clock))
        except RuntimeError as error:
            problem = str(error)
            break
    left = len(mine) - sum(not row.left and not row.problem for row in rows)
    progress(len(mine) - left, len(mine), "done" if not left else "stopped")
    name, seconds = device_name(device), clock() - start
    return Report(name, str(store.path), rank, ranks, len(mine), left, seconds, tuple(rows), problem)


def distinct(jobs: Sequence[Job], device: torch.device) -> list[Job]:
    """Return the jobs without those that would find all their records made."""
    found: dict[tuple[str, str], Job] = {}
    for job in jobs:
        choice = layer_key(job.layer, job.dtype, device) if job.choose else ""
        found.setdefault((planned(job.layer, job.dtype, device)[0], choice), job)
    return list(found.values())


def _run_job(
    job: Job,
    device: torch.device,
    store: TimingStore,
    deadline: float,
    limit: int,
    benches: Benches,
    clock: Callable[[], float],
) -> Row:
    from lhc_kernels import heuristic_config

    layer, dtype = job.layer, job.dtype
    key, shape = planned(layer, dtype, device)
    tuned, backend, problem = Tuned(key, 0, 0, 0), "", ""
    try:
        tuned = tune_layer(
            layer, dtype, device, store, limit=limit, deadline=deadline, benches=benches, clock=clock
        )
        if job.choose and not tuned.left:
            backend = choose_backend(layer, dtype, device, "full", store).backend
    except torch.OutOfMemoryError as error:
        problem = one_line(error)
    records = store.get(key)
    best = fastest(records, shape)
    plain = records.get(config_name(heuristic_config(shape, precision(shape.dtype)).to_list()))
    return Row(
        layer=layer.name,
        key=key,
        config=None if best is None else best[0].to_list(),
        time_us=None if best is None else best[1],
        heuristic_us=None if isinstance(plain, str) else plain,
        timed=tuned.timed,
        failed=tuned.failed,
        left=tuned.left,
        backend=backend,
        problem=problem,
    )
