"""The suites by name: which layers, networks, blocks and densities are measured, and where results go."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lhc_bench.files import check_writable
from lhc_bench.measure import engines as other
from lhc_bench.measure import loading, planner
from lhc_bench.measure.cases import (
    LayerCase,
    batch_of,
    cpu_cases,
    first_cases,
    gpu_cases,
    question_cases,
    quick_cases,
)
from lhc_bench.measure.layers import LayerSubject
from lhc_bench.measure.networks import NetworkCase, NetworkSubject
from lhc_bench.measure.rivals import MASK_FREE
from lhc_bench.measure.rows import Results, Row, environment, summarise, write_results
from lhc_bench.measure.setting import (
    Call,
    Machine,
    Progress,
    Request,
    Setting,
    Subject,
    SuiteLike,
    Timer,
    measure,
    measure_machine,
)
from lhc_triton.runtime.choosing.cold_timing import time_cold
from lhc_triton.runtime.choosing.dispatch import Tune
from lhc_triton.runtime.choosing.timing import Timing, time_paired
from lhc_triton.runtime.choosing.timing_store import TimingStore

Case = LayerCase | NetworkCase
Blocks = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Suite:
    """What a suite measures.

    Attributes:
        device: "cpu" or "cuda".
        dtype: compute type.
        backends: who runs the sparse layers; "auto" is what dispatch takes.
        rivals: other ways to save the same work, measured beside them; see `Setting`.
        cases: gives the layers or networks, the ones that matter most first.
        blocks: (in_block, out_block) of the masks.
        densities: wanted live shares.
        rounds: interleaved rounds of each timing.
        budget_s: seconds after which a timing begins no further round; None: no limit.
        limit_s: seconds after which the suite begins no further measurement; what is left out is named.
        compiled: whether torch.compile is among the dense peers.
        choosing: how "auto" chooses; see `Setting`.
    """

    device: str
    dtype: torch.dtype
    backends: tuple[str, ...]
    rivals: tuple[str, ...]
    cases: Callable[[], Sequence[Case]]
    blocks: Blocks
    densities: tuple[float, ...]
    rounds: int
    budget_s: float | None = None
    limit_s: float = 480.0
    compiled: bool = True
    choosing: Tune | None = None

    def run(self, request: Request) -> dict[str, Any]:
        """Measure every case under every mask and write the results; see `run_suite`."""
        rounds = self.rounds if request.rounds is None else request.rounds
        wanted = tuple(self.densities if request.densities is None else request.densities)
        _check(rounds, request.seed, wanted, request.batch)
        cases = tuple(case for case in self.cases() if request.only in case.name)
        if not cases:
            known = "; ".join(case.name for case in self.cases())
            raise ValueError(
                f"no case of suite {request.name!r} has {request.only!r} in its name; the cases are {known}"
            )
        out, timer = Path(request.out), request.timer
        with ExitStack() as stack:
            opened = None
            if set(self.rivals) & set(other.ENGINES):
                opened = stack.enter_context((request.engines or other.Engines()).open())
                timer = partial(timer, clock=opened.clock)
            check_writable(out)
            cache = stack.enter_context(tempfile.TemporaryDirectory())
            # A GPU's launch configs come from the user's tuning; on a CPU, earlier runs have no say.
            store = TimingStore(None if self.device == "cuda" else Path(cache) / "timings.json")
            setting = Setting(
                self.device, self.dtype, self.backends, rounds, request.seed,
                request.compiled and self.compiled, timer, store, self.rivals,
                self.budget_s, opened, self.choosing,
            )  # fmt: skip
            if self.device == "cuda":
                setting = replace(setting, cold_timer=partial(_time_cold, rounds=rounds))
            run = _Run(self, cases, setting, wanted, request.progress, request.batch)
            # cuDNN's own search is part of the best dense a GPU has.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                run.measure_all()
        env = environment(
            self.device,
            suite=request.name,
            rounds=rounds,
            rounds_made=run.rounds_made,
            seed=request.seed,
            densities=list(wanted),
            skipped_peers=run.skipped,
            notes=run.notes,
            **({} if opened is None else {"engines": opened.versions}),
            **asdict(run.machine()),
        )
        summary = summarise(run.rows, wanted)
        if opened is not None:
            summary["engines"] = other.ours_over(run.rows)
        results = Results(env, tuple(run.rows), summary)
        write_results(out, results)
        return results.to_dict()


CPU_DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
GPU_DENSITIES = (0.1, 0.2, 0.5, 1.0)
PAPER: Blocks = ((32, 16),)
SHARED: Blocks = ((32, 128), (32, 16), (32, 64))
CPU = ("cpu", torch.float32, ("torch", "native", "auto"))
GPU = ("cuda", torch.float16, ("triton", "auto"))
QUESTIONED = ("triton grid", "triton persistent", "triton box", "triton split", "triton resident")


def cpu_networks() -> tuple[NetworkCase, ...]:
    """VGG16 at both image sizes and its convolutional part, ResNet34 and ResNet50."""
    return (
        NetworkCase("vgg16", "cifar", 8),
        NetworkCase("resnet34", "imagenet", 1),
        NetworkCase("resnet50", "imagenet", 1),
        NetworkCase("vgg16", "imagenet", 1, "features"),
        NetworkCase("vgg16", "imagenet", 1),
    )


def engine_networks() -> tuple[NetworkCase, ...]:
    """Networks that every engine takes whole, VGG16 at the size of photographs without its classifier."""
    return (
        NetworkCase("vgg16", "cifar", 8),
        NetworkCase("vgg16", "imagenet", 1, "features"),
        NetworkCase("resnet34", "imagenet", 1),
        NetworkCase("resnet50", "imagenet", 1),
    )


def scaled_networks() -> tuple[NetworkCase, ...]:
    """One and all threads on two networks, then a curve over the batch."""
    threads = sorted({1, torch.get_num_threads()})
    vgg = partial(NetworkCase, "vgg16", "cifar")
    return (
        *(vgg(8, threads=count) for count in threads),
        *(NetworkCase("resnet34", "imagenet", 1, threads=count) for count in threads),
        *(vgg(batch) for batch in (1, 2, 4, 16, 32, 64)),
    )


def gpu_networks() -> tuple[NetworkCase, ...]:
    """The networks at both image sizes, and VGG16's convolutional part."""
    return (
        *(NetworkCase(network, "imagenet", 64) for network in ("vgg16", "resnet34", "resnet50")),
        NetworkCase("vgg16", "imagenet", 64, "features"),
        *(NetworkCase(network, "cifar", 256) for network in ("vgg16", "resnet34", "resnet50")),
    )


def first_networks() -> tuple[NetworkCase, ...]:
    """VGG16 and ResNet50 at the size of photographs."""
    return NetworkCase("vgg16", "imagenet", 64), NetworkCase("resnet50", "imagenet", 64)


SUITES: dict[str, SuiteLike] = {
    "quick": Suite(*CPU, (), quick_cases, PAPER, CPU_DENSITIES, 15, budget_s=3.0),
    "cpu-layers": Suite(*CPU, ("narrow",), cpu_cases, PAPER, CPU_DENSITIES, 20, budget_s=5.0),
    "cpu-models": Suite(*CPU, ("narrow", "int8"), cpu_networks, PAPER, (0.1, 0.25), 20, budget_s=15.0),
    "cpu-scaling": Suite(*CPU[:2], ("native", "auto"), (), scaled_networks, PAPER, (0.1,), 20, budget_s=15.0),
    other.SUITE: Suite(
        *CPU[:2],
        (other.OURS,),
        other.ENGINES,
        engine_networks,
        PAPER,
        (0.1,),
        20,
        budget_s=60.0,
        limit_s=2400.0,
        choosing="cached",  # as `accelerate` comes
    ),
    "gpu-layers": Suite(*GPU, ("narrow", "bsr", "2:4"), gpu_cases, SHARED, GPU_DENSITIES, 30, budget_s=3.0),
    "gpu-questions": Suite(
        *GPU[:2], QUESTIONED, (), question_cases, SHARED, (0.1, 0.2, 0.5), 30, budget_s=3.0, compiled=False
    ),
    "gpu-first": Suite(
        *GPU[:2],
        ("triton shared", "triton"),
        (),
        first_cases,
        SHARED,
        (0.1, 0.2, 0.5),
        30,
        budget_s=1.0,
        limit_s=120.0,
        compiled=False,
    ),
    "gpu-first-models": Suite(
        *GPU, (), first_networks, SHARED[:2], (0.1, 0.2), 30, budget_s=2.0, limit_s=420.0, compiled=False
    ),
    "gpu-models": Suite(*GPU, ("narrow",), gpu_networks, SHARED[:2], (0.1, 0.2, 0.5), 30, budget_s=3.0),
    loading.SUITE: loading.LoadingSuite(),
    planner.SUITE: planner.PlannerSuite(),
}
"""By name; whatever can run a `Request` is a suite."""


def run_suite(
    name: str,
    out_dir: str | Path,
    progress: Progress = lambda done, total, label: None,
    seed: int = 0,
    rounds: int | None = None,
    densities: Sequence[float] | None = None,
    compiled: bool = True,
    timer: Timer = time_paired,
    only: str = "",
    engines: other.Engines | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Run a suite and write results.json and results.csv.

    Args:
        name: one of `SUITES`.
        out_dir: folder for the results; made where it does not exist.
        progress: called with (measurements done, all of them, the one that begins).
        seed: of masks, weights and inputs.
        rounds: interleaved rounds of each timing; by default the suite's.
        densities: wanted live shares; by default the suite's.
        compiled: also compare with torch.compile, which takes seconds a layer.
        timer: measures as `lhc_triton.runtime.choosing.timing.time_paired` does.
        only: measure the cases whose names contain this.
        engines: for the suite "cpu-engines", which ones; by default those that are installed here. Their rows
            are named after them, and the summary has our speed-ups over them under "engines".
        batch: images of a call; by default each case's own.

    Returns:
        What results.json holds: {"env", "rows", "summary"}. A backend that could not run, or whose result
        was wrong, has no row and a line in ``env["notes"]``; so have the measurements that the suite's time
        limit left out.

    Raises:
        ValueError: an unknown suite, a suite for a GPU where there is none, no case with that name, rounds
            or a batch below 1, a negative seed, a density outside (0, 1], engines for another suite, or an
            interpreter without its engine; nothing is written then.
        OSError: if the folder cannot be written.
    """
    if engines is not None and name != other.SUITE:
        raise ValueError(f"suite {name!r} compares with no other engine; the suite {other.SUITE!r} does")
    return _known(name).run(
        Request(name, out_dir, progress, seed, timer, only, rounds, densities, compiled, engines, batch)
    )


class _Run:
    """A suite at work: what it has measured so far."""

    def __init__(
        self,
        suite: Suite,
        cases: Sequence[Case],
        setting: Setting,
        densities: Sequence[float],
        progress: Progress,
        batch: int | None,
    ) -> None:
        self.suite = suite
        self.batch = batch
        self.progress = progress
        self.cases = cases
        # A mask of all ones is the same for any block.
        self.masks = [
            (block, density)
            for index, block in enumerate(suite.blocks)
            for density in densities
            if index == 0 or density < 1
        ]
        self.total = len(self.cases) * len(self.masks)
        self.rows: list[Row] = []
        self.missing: dict[str, list[str]] = {}
        self.skipped: dict[str, str] = {}
        self.rounds_made = [setting.rounds, 0]
        self.machines: dict[int, Machine] = {}
        self.timer = setting.timer
        self.setting = replace(setting, timer=self._counting)

    def measure_all(self) -> None:
        """Measure every case under every mask until the time limit."""
        deadline = time.monotonic() + self.suite.limit_s
        for number, case in enumerate(self.cases):
            with _threads(case):
                self._measure_case(case, number * len(self.masks), deadline)
        self.progress(self.total, self.total, "done")

    def _measure_case(self, case: Case, done: int, deadline: float) -> None:
        subject: Subject | None = None
        for step, (block, density) in enumerate(self.masks):
            if done + step > 0 and time.monotonic() >= deadline:
                self._note(case.name, f"left out: the suite's {self.suite.limit_s:g} s are over")
                return
            if subject is None:
                self.progress(done, self.total, f"{case.name}: dense peers")
                subject = self._prepare(case)
                self.skipped |= {f"{case.name}: {peer}": why for peer, why in subject.skipped.items()}
            self.progress(done + step, self.total, f"{case.name} at density {density:g}")
            setting = self.setting
            if block != self.masks[0][0]:
                setting = replace(setting, rivals=tuple(r for r in setting.rivals if r not in MASK_FREE))
            found = measure(subject, block, density, setting, self.machine())
            self.rows += found.rows
            for place, reason in found.notes:
                self._note(place, reason)

    def _note(self, place: str, reason: str) -> None:
        self.missing.setdefault(reason, []).append(place)

    @property
    def notes(self) -> list[str]:
        """What has no row, and why: one line per reason."""
        return [
            f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {reason}"
            for reason, places in self.missing.items()
        ]

    def machine(self) -> Machine:
        """Return the machine's rates at the present number of threads; measured once."""
        threads = torch.get_num_threads()
        if threads not in self.machines:
            self.machines[threads] = measure_machine(self.setting)
        return self.machines[threads]

    def _prepare(self, case: Case) -> Subject:
        if isinstance(case, LayerCase):
            batch = self.batch or batch_of(case.model, self.suite.device)
            return LayerSubject.prepare(case, batch, self.setting)
        return NetworkSubject.prepare(replace(case, batch=self.batch or case.batch), self.setting)

    def _counting(self, calls: Any, **options: Any) -> dict[str, Timing]:
        times = self.timer(calls, **options)
        made = [len(timing.samples_us) for timing in times.values()]
        self.rounds_made = [min(self.rounds_made[0], *made), max(self.rounds_made[1], *made)]
        return times


def _time_cold(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    return time_cold(calls, torch.device("cuda", torch.cuda.current_device()), rounds, captured=True)


@contextmanager
def _threads(case: Case) -> Iterator[None]:
    """Let torch use as many threads as the case asks for."""
    wanted = case.threads if isinstance(case, NetworkCase) else None
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        if wanted is not None:
            torch.set_num_threads(before)


def _known(name: str) -> SuiteLike:
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is not known; choose one of {', '.join(SUITES)}")
    suite = SUITES[name]
    if suite.device == "cuda" and not torch.cuda.is_available():
        on_cpu = ", ".join(n for n, s in SUITES.items() if s.device == "cpu")
        raise ValueError(f"suite {name!r} needs a CUDA GPU, and torch sees none; without one run {on_cpu}")
    return suite


def _check(rounds: int, seed: int, densities: tuple[float, ...], batch: int | None) -> None:
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if not densities or not all(0 < density <= 1 for density in densities):
        raise ValueError(f"densities are {densities}; give at least one, each in (0, 1]")
