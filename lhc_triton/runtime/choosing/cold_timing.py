"""Timing on a GPU with a cold L2 cache and without launch overhead, as amid a network's CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lhc_triton.runtime.choosing.timing import race
from lhc_triton.runtime.replay.cuda_graphs import GraphMemory

LEAST_FLUSH = 1 << 27  # bytes; writing so much also gives the host time to queue the sample behind it


class ColdTimer:
    """Makes samplers of functions on one GPU.

    A sample overwrites a buffer of twice the L2 cache and then replays the function's CUDA graph between two
    events; the host queues all of it while the buffer is being written.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        with torch.cuda.device(device):
            self._memory = GraphMemory()
        self._flush = torch.empty(max(2 * cache, LEAST_FLUSH), dtype=torch.uint8, device=device)

    def sampler(self, function: Callable[[], object]) -> Callable[[], float]:
        """Capture a function and return what takes one sample of it, in microseconds."""
        with torch.cuda.device(self._device), torch.inference_mode():
            graph, _ = self._memory.capture(function)
        return self.replays(graph.replay)

    def replays(self, replay: Callable[[], object]) -> Callable[[], float]:
        """Return what takes one sample, in microseconds, of a function that hardly keeps the host busy."""
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def sample() -> float:
            with torch.cuda.device(self._device):
                self._flush.zero_()
                start.record()
                replay()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3

        return sample


def time_cold(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    captured: bool = False,
) -> dict[str, float]:
    """Return each function's median time in microseconds, interleaved and with a cold L2 cache.

    Args:
        functions: by name.
        device: the GPU.
        rounds: samples of each.
        captured: whether the functions replay graphs themselves; otherwise each is captured.

    Raises:
        RuntimeError: a function failed, or cannot be captured.
    """
    timer = ColdTimer(device)
    make = timer.replays if captured else timer.sampler
    times = {}
    for name, record in race({n: make(f) for n, f in functions.items()}, rounds).items():
        if isinstance(record, str):
            raise RuntimeError(f"{name} cannot be timed: {record}")
        times[name] = record
    return times
