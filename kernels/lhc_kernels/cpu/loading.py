"""Loading the native kernel into the process."""

from __future__ import annotations

import functools

import torch

from .building import BuildError, CacheError, build
from .folders import temporary_folder


@functools.cache
def problem() -> str | None:
    """Build and load the native kernel if that has not happened yet; return why it cannot be, None if it is.

    From then on its C++ code is the CPU implementation of ``torch.ops.lhc.grouped_conv2d``, which must be
    defined already. A failure is remembered: the process does not try again. Where the cache cannot be
    written, a temporary folder takes its place, and a RuntimeWarning says so.
    """
    try:
        try:
            library = build()
        except CacheError as error:
            library = build(temporary_folder("builds of the native kernel", str(error)))
        torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return None


def loaded() -> bool:
    """Return whether the native kernel is in this process; nothing is built."""
    return problem.cache_info().currsize > 0 and problem() is None


def load() -> None:
    """Build and load the native kernel if that has not happened yet.

    Raises:
        BuildError: it cannot be built or loaded here; one line says why.
    """
    reason = problem()
    if reason is not None:
        raise BuildError(reason)
