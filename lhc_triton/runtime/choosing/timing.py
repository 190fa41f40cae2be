"""Paired timing: functions in turn, round by round, so that a machine's drift hits all of them alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lhc_triton.errors import one_line

MIN_SAMPLE_US = 200.0  # a sample repeats its function until it lasts about this long
BRIEF_US = 2000.0  # shorter functions feel what ran before them
MIN_ROUNDS = 3  # what a time budget leaves at the least


@dataclass(frozen=True)
class Timing:
    """What the rounds of one function gave.

    Attributes:
        samples_us: time of one call in each round, microseconds, in order.
        repeats: calls behind each sample.
    """

    samples_us: tuple[float, ...]
    repeats: int = 1

    @property
    def median_us(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples_us)

    @property
    def p20_us(self) -> float:
        """A fifth of the rounds were at most this long."""
        return _quantile(self.samples_us, 0.2)

    @property
    def p80_us(self) -> float:
        """Four fifths of the rounds were at most this long."""
        return _quantile(self.samples_us, 0.8)


def _quantile(samples: tuple[float, ...], share: float) -> float:
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def time_paired(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    budget_s: float | None = None,
) -> dict[str, Timing]:
    """Time functions interleaved: every round calls each of them once, in an order of its own.

    What ran just before leaves its mark on caches and clocks: after a dense layer, a sparse one took 182 us
    instead of 145. So nobody always follows the same one, and a brief function is called once, untimed,
    before each of its samples. The orders are the same in every run.

    Short functions are repeated within a sample, so that the clock's grain does not show. Runs in
    inference mode. On CUDA, events around the calls are read after each round.

    Args:
        functions: by name; called without arguments.
        rounds: samples of each function.
        warmup: calls of each function before the first round, at least 1.
        device: where the functions do their work.
        clock: seconds; for tests.
        budget_s: seconds after which no further round begins, counted from the first call; three rounds are
            always made. None sets no limit.

    Returns:
        A `Timing` for each name, in the same order.

    Raises:
        ValueError: if there is no function, or rounds or warmup is below 1.
    """
    if not functions:
        raise ValueError("there is no function to time")
    for name, value in (("rounds", rounds), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    sample = _cuda_sample if torch.device(device).type == "cuda" else _host_sample
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    repeats: dict[str, int] = {}
    brief: dict[str, bool] = {}
    deadline = math.inf if budget_s is None else clock() + budget_s
    with torch.inference_mode():
        for name in names:
            for _ in range(warmup - 1):
                functions[name]()
            once = sample(functions[name], 1, clock)
            repeats[name] = max(1, round(MIN_SAMPLE_US / once)) if once > 0 else 1
            brief[name] = once < BRIEF_US
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and clock() >= deadline:
                break
            for name in random.Random(turn).sample(names, len(names)):
                if brief[name]:
                    functions[name]()
                samples[name].append(sample(functions[name], repeats[name], clock))
    return {name: Timing(tuple(samples[name]), repeats[name]) for name in names}


def race(
    samplers: Mapping[str, Callable[[], float]], rounds: int = 20, margin: float = math.inf, trial: int = 3
) -> dict[str, float | str]:
    """Sample alternatives interleaved, and drop those that are clearly slower than the fastest.

    Args:
        samplers: by name; each takes one sample and returns microseconds.
        rounds: samples of each that stays to the end.
        margin: after `trial` rounds, an alternative whose median exceeds the least median by this factor
            leaves.
        trial: rounds that all of them take part in.

    Returns:
        For each name its median in microseconds, or, where its sampler raised, the reason.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    failed: dict[str, float | str] = {}
    running = list(samplers)
    for turn in range(rounds):
        for name in random.Random(turn).sample(running, len(running)):
            try:
                samples[name].append(samplers[name]())
            except Exception as error:  # a kernel may fail in any way; the others go on
                failed[name] = one_line(error)
        running = [name for name in running if name not in failed]
        if turn + 1 >= trial and running:
            medians = {name: statistics.median(samples[name]) for name in running}
            running = [name for name in running if medians[name] <= margin * min(medians.values())]
    return {name: failed.get(name) or statistics.median(samples[name]) for name in samplers}


def _host_sample(function: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats * 1e6


def _cuda_sample(function: Callable[[], object], repeats: int, _clock: Callable[[], float]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats * 1e3
