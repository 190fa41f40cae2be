"""CUDA graphs: a call recorded once and replayed, so that the launch of many small kernels costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lhc_triton.errors import first_line, one_line
from lhc_triton.runtime.replay.cuda_graphs import GraphMemory

Call = Callable[[], Any]


def replayed(call: Call, device: str) -> tuple[Call, str | None]:
    """Record a call into a CUDA graph.

    Args:
        call: reads and writes the same memory each time; run in inference mode.
        device: "cuda" records; on another device the call is returned as it is.

    Returns:
        (the replay, None), or (the call itself, one line that says why it was not recorded).
    """
    if device != "cuda":
        return call, None
    try:
        with torch.inference_mode():
            graph, output = GraphMemory().capture(call)
    # Whatever the call does may be forbidden while recording, and each library says so in its own way.
    except Exception as error:
        return call, reason_of(error)

    def replay() -> Any:
        graph.replay()
        return output

    return replay, None


def reason_of(error: Exception) -> str:
    """Return an error as one line: its message's first, after its type where it is not meant for users."""
    return first_line(error) if isinstance(error, ValueError) else one_line(error)
