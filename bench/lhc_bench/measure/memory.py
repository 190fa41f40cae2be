"""How much memory a network's tensors take while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def tensors_mb(model: nn.Module) -> float:
    """Return 1e6 bytes of a module's parameters and buffers; storage that is shared counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values()) / 1e6


def transient_mb(call: Callable[[], object], device: str) -> float | None:
    """Return 1e6 bytes that one call holds at its most beside what was there before it.

    On a CPU it is what torch's allocator hands out, as its profiler sees it: activations, and the workspaces
    of kernels that ask torch for them. What a library allocates by itself is not seen.

    Args:
        call: called three times in inference mode; the first two warm up, and are recorded where calls are.
        device: "cpu" or "cuda".

    Returns:
        None where torch was built without its profiler.
    """
    with torch.inference_mode():
        call()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        # The profiler greets on stderr, in the middle of our progress bar, unless told not to.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
            call()
    results = getattr(seen.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = most = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most / 1e6
