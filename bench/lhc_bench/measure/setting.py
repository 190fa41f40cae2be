"""What every measurement shares: the run's setting, the machine's rates, and rows from interleaved times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lhc_bench.measure.engines import Engines, OpenEngines
from lhc_bench.measure.remote_engine import DEEPSPARSE, EngineError
from lhc_bench.measure.replayed import reason_of, replayed
from lhc_bench.measure.rows import Row
from lhc_triton.runtime.choosing.dispatch import Tune
from lhc_triton.runtime.choosing.timing import Timing
from lhc_triton.runtime.choosing.timing_store import TimingStore

Call = Callable[[], Any]
Progress = Callable[[int, int, str], None]
Timer = Callable[..., dict[str, Timing]]
COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
MATRIX_SIDE = {"cpu": 1536, "cuda": 8192}
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Norm error against float64 above which a result is wrong and its time worthless."""


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share.

    Attributes:
        device: "cpu" or "cuda".
        dtype: compute type.
        backends: who runs the sparse layers; each gives a row. "auto" is what dispatch takes.
        rounds: interleaved rounds of each timing.
        seed: of masks, weights and inputs.
        compiled: whether the dense peers include torch.compile.
        timer: called as `time_paired`; another one in tests.
        store: the times by which "auto" chooses, and the launch configs of GPU kernels.
        rivals: other ways to save the same work, each with a row: "narrow", "bsr", "2:4", "int8",
            and engines.
        budget_s: seconds after which a timing begins no further round; None: no limit.
        engines: where the rivals that are other engines run; None without them.
        choosing: how "auto" chooses, "off", "cached" or "full"; None: see `tune`.
        cold_timer: of layers on a GPU: takes functions and returns their medians in us with an empty L2; None
            leaves that out.
    """

    device: str
    dtype: torch.dtype
    backends: tuple[str, ...]
    rounds: int
    seed: int
    compiled: bool
    timer: Timer
    store: TimingStore
    rivals: tuple[str, ...] = ()
    budget_s: float | None = None
    engines: OpenEngines | None = None
    choosing: Tune | None = None
    cold_timer: Callable[[Mapping[str, Call]], dict[str, float]] | None = None

    @property
    def dtype_name(self) -> str:
        """The compute type as rows and plans name it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def tune(self) -> Tune:
        """How dispatch chooses: by its own measurement on a CPU, by what `lhc-triton tune` stored on a GPU.

        There, each layer has a dozen launch configs to compile, which would take longer than all the rest.
        """
        return self.choosing or ("full" if self.device == "cpu" else "cached")

    def time(self, calls: Mapping[str, Call]) -> dict[str, Timing]:
        """Time functions interleaved on the device."""
        return self.timer(calls, rounds=self.rounds, warmup=2, device=self.device, budget_s=self.budget_s)


@dataclass(frozen=True)
class Machine:
    """What the device reached in this run.

    Attributes:
        gmacs: 1e9 multiply-accumulates per second of a large matrix product.
        copy_gbs: 1e9 bytes per second of a large copy, bytes read and bytes written both counted.
        read_gbs: 1e9 bytes per second of a large sum, which only reads.
    """

    gmacs: float
    copy_gbs: float
    read_gbs: float

    def floor_us(self, parts: Sequence[tuple[float, float]]) -> float:
        """Return the least time of (MACs, bytes moved) done one after the other.

        Each part takes its arithmetic or its memory traffic, whichever is longer.
        """
        gbs = max(self.copy_gbs, self.read_gbs)
        return sum(max(macs / (self.gmacs * 1e3), size / (gbs * 1e3)) for macs, size in parts)


def measure_machine(setting: Setting) -> Machine:
    """Measure the rates behind `Row.floor_us`, by the fastest round of each."""
    side = MATRIX_SIDE[setting.device]
    a = torch.randn(side, side).to(setting.device, setting.dtype)
    product = torch.empty_like(a)
    size = COPY_BYTES[setting.device]
    source = torch.zeros(size // 4, dtype=torch.float32, device=setting.device)
    target = torch.zeros_like(source)
    times = setting.time(
        {
            "matrix": lambda: torch.mm(a, a, out=product),
            "copy": lambda: target.copy_(source),
            "read": lambda: source.sum(),
        }
    )
    fastest = {name: min(timing.samples_us) for name, timing in times.items()}
    gmacs = side**3 / fastest["matrix"] / 1e3
    return Machine(gmacs, 2 * size / fastest["copy"] / 1e3, size / fastest["read"] / 1e3)


@dataclass(frozen=True)
class Contender:
    """One way to run a subject under a mask.

    Attributes:
        forms: functions by name (memory formats); the fastest one counts.
        rel_err: norm error against the float64 reference of what it computes.
        macs: multiply-accumulates of one call that matter for the result.
        memory_mb: 1e6 bytes of its tensors at their most during a call; None: not measured.
        limit: norm error above which its result is wrong; None: the subject's.
    """

    forms: Mapping[str, Call]
    rel_err: float
    macs: int
    memory_mb: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Sparse:
    """A subject under one mask, ready to be timed.

    Attributes:
        contenders: by backend or rival.
        density: live share of the weights that the mask reached.
        parts: (live MACs, bytes of inputs, outputs and live weights) of what runs one after the other.
        unavailable: by backend or rival, why it cannot run here.
        baseline_memory_mb: as `Contender.memory_mb`, of the eager dense form.
    """

    contenders: Mapping[str, Contender]
    density: float
    parts: tuple[tuple[int, int], ...]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    baseline_memory_mb: float | None = None


class Subject(Protocol):
    """A layer or a network with its dense peers, built once and measured under many masks."""

    @property
    def model(self) -> str:
        """The network's name."""

    @property
    def layer(self) -> str:
        """The layer's name; "all" for a whole network."""

    @property
    def x(self) -> Tensor:
        """The input."""

    @property
    def peers(self) -> Mapping[str, Call]:
        """Dense forms by name."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Dense forms that are left out, with the reason."""

    @property
    def out_channels(self) -> int:
        """Channels, or classes, of the output."""

    @property
    def kernel(self) -> int:
        """Side of the kernel; 0 for a whole network."""

    @property
    def stride(self) -> int:
        """Of the convolution; 0 for a whole network."""

    @property
    def limit(self) -> float:
        """Norm error above which a result is wrong."""

    def under(self, block: tuple[int, int], density: float, setting: Setting) -> Sparse:
        """Draw a mask of (in_block, out_block) and build the contenders."""


@dataclass(frozen=True)
class Measured:
    """What one subject gave under one mask.

    Attributes:
        rows: one per contender whose result was right.
        notes: (place, why) for each contender that gave no row.
    """

    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...]


def measure(
    subject: Subject, block: tuple[int, int], density: float, setting: Setting, machine: Machine
) -> Measured:
    """Time a subject under a random mask, all contenders and dense peers interleaved.

    On CUDA each is recorded into a graph, so that nobody waits for the host to launch its kernels. Times are
    of repeated calls, whose operands may still lie in the L2 cache; layers are also timed with an empty one.

    Args:
        subject: a layer or a network.
        block: (in_block, out_block).
        density: wanted live share of the entries.
        setting: of the run.
        machine: its rates.

    Returns:
        A row for each contender. One that cannot run, or whose norm error is above its limit, is not
        timed and gives a note.
    """
    case = f"{subject.model}/{subject.layer}"
    sparse = subject.under(block, density, setting)
    place = f"{case}, blocks {block[0]}x{block[1]}, density {density:g}"
    notes = [(place, f"{name}: {reason}") for name, reason in sparse.unavailable.items()]
    calls, owners = dict(subject.peers), dict.fromkeys(subject.peers, "")
    for name, contender in sparse.contenders.items():
        limit = subject.limit if contender.limit is None else contender.limit
        if not contender.rel_err <= limit:
            found = f"norm error {contender.rel_err:.1e} > {limit:.0e}"
            notes.append((place, f"{name}: wrong result, {found}"))
            continue
        for form, call in contender.forms.items():
            calls[f"{name} {form}"], owners[f"{name} {form}"] = call, name
    right = [name for name in sparse.contenders if name in owners.values()]
    if not right:
        return Measured((), tuple(notes))
    for name, call in calls.items():
        calls[name], reason = replayed(call, setting.device)
        if reason is not None:
            notes.append((place, f"{name}: timed with its launches, not as a CUDA graph: {reason}"))

    try:
        times = setting.time(calls)
    except EngineError as error:  # its process has ended: the others are timed without it
        notes.append((place, f"{DEEPSPARSE}: {error}"))
        right.remove(DEEPSPARSE)
        times = setting.time({name: call for name, call in calls.items() if owners[name] != DEEPSPARSE})

    def fastest(owner: str) -> str:
        return min((name for name in times if owners[name] == owner), key=lambda n: times[n].median_us)

    baseline = fastest("")
    cold: dict[str, float] = {}
    if setting.cold_timer is not None and subject.kernel:
        try:
            cold = setting.cold_timer(calls)
        except RuntimeError as error:
            notes.append((place, f"not timed with a cold L2: {reason_of(error)}"))

    def coldest(owner: str) -> float | None:
        return min((us for form, us in cold.items() if owners[form] == owner), default=None)

    rows = []
    for name in right:
        mine, contender = times[fastest(name)], sparse.contenders[name]
        gmacs = contender.macs / mine.median_us / 1e3
        rows.append(
            Row(
                case=case,
                model=subject.model,
                layer=subject.layer,
                device=setting.device,
                dtype=setting.dtype_name,
                batch=subject.x.shape[0],
                in_channels=subject.x.shape[1],
                out_channels=subject.out_channels,
                kernel=subject.kernel,
                stride=subject.stride,
                height=subject.x.shape[2],
                width=subject.x.shape[3],
                density=sparse.density,
                in_block=block[0],
                out_block=block[1],
                backend=name,
                baseline=baseline,
                baseline_us=times[baseline].median_us,
                time_us=mine.median_us,
                p20_us=mine.p20_us,
                p80_us=mine.p80_us,
                speedup=times[baseline].median_us / mine.median_us,
                floor_us=machine.floor_us(sparse.parts),
                rel_err=contender.rel_err,
                seed=setting.seed,
                gmacs=gmacs,
                peak_share=gmacs / machine.gmacs,
                memory_mb=contender.memory_mb,
                baseline_memory_mb=sparse.baseline_memory_mb,
                threads=torch.get_num_threads() if setting.device == "cpu" else None,
                cold_us=coldest(name),
                cold_baseline_us=coldest(""),
            )
        )
    return Measured(tuple(rows), tuple(notes))


@dataclass(frozen=True)
class Request:
    """What a suite is asked to do; what it has no use for, it leaves alone.

    Attributes:
        name: of the suite.
        out: folder for results.json and results.csv; made where it does not exist.
        progress: called with (measurements done, all of them, the one that begins).
        seed: of all that is random.
        timer: measures as `lhc_triton.runtime.choosing.timing.time_paired` does.
        only: measure the cases whose names contain this.
        rounds, densities: in the place of the suite's own.
        compiled: also compare with torch.compile.
        engines: which other engines to compare with.
        batch: images of a call, in the place of each case's own.
    """

    name: str
    out: str | Path
    progress: Progress
    seed: int
    timer: Timer
    only: str = ""
    rounds: int | None = None
    densities: Sequence[float] | None = None
    compiled: bool = True
    engines: Engines | None = None
    batch: int | None = None


class SuiteLike(Protocol):
    """A suite: measures what a request asks for, writes it, and returns what results.json holds."""

    @property
    def device(self) -> str:
        """The device kind that it needs, "cpu" or "cuda"."""

    def run(self, request: Request) -> dict[str, Any]:
        """Measure, and write; ValueError or OSError before anything is measured."""
