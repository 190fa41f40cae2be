"""Compile launches in worker processes, which leave the code in Triton's cache for whoever runs it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from .prepared import Signature, prepare


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch, the worst of its kernels.

    Attributes:
        registers: per thread; 0 where they are not known.
        stack_bytes: per thread, spilled.
        problem: why it did not compile; "" if it did.
    """

    registers: int = 0
    stack_bytes: int = 0
    problem: str = ""


class CompileOnly:
    """Stands in for Triton's driver of a GPU: enough for compiling, not for launching."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Return a number that stands for the device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a number that stands for the stream."""
        return 0


def compile_launch(target: GPUTarget, signature: Signature) -> Compiled:
    """Compile one launch in this process, which gives up its own driver for that.

    Its tensors count as aligned to 16 bytes, which those that torch allocates are.
    """
    driver.set_active(CompileOnly(target))
    try:
        kernels = prepare(signature).compile()
    except Exception as error:  # compilers fail in ways of their own; a launch in earnest will say more
        return Compiled(problem=f"{type(error).__name__}: {error}".splitlines()[0])
    if target.backend != "cuda":
        return Compiled()
    from .aot import resources_of

    found = [resources_of(kernel.asm["cubin"]) for kernel in kernels]
    return Compiled(max(registers for registers, _ in found), max(stack for _, stack in found))


class Compilers:
    """Worker processes that compile launches, in the order in which they were asked for.

    Args:
        target: the GPU; by default Triton's own, for which this process initialises CUDA.
        workers: how many; by default a process for each core that this one may use.
    """

    def __init__(self, target: GPUTarget | None = None, workers: int | None = None) -> None:
        self._target = driver.active.get_current_target() if target is None else target
        cores = len(os.sched_getaffinity(0))
        # Started afresh: what is forked off a process that uses a GPU is none the better for it.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers or cores, mp_context=context)
        self._found: dict[Signature, Future[Compiled]] = {}
        self._broken = False

    def begin(self, signatures: Iterable[Signature]) -> None:
        """Ask for launches; those that were asked for before are not compiled again."""
        for signature in signatures:
            if signature not in self._found and not self._broken:
                try:
                    self._found[signature] = self._pool.submit(compile_launch, self._target, signature)
                except BrokenProcessPool:
                    self._broken = True

    def wait(self, signature: Signature) -> Compiled:
        """Return what the compiler made of a launch, once it has; asks for it if nobody has.

        Where a worker was killed, nothing is known of the launches that it and the others still had.
        """
        self.begin([signature])
        try:
            return self._found[signature].result() if signature in self._found else Compiled()
        except BrokenProcessPool:
            self._broken = True
            return Compiled()

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        """Drop what has not begun, and wait for the rest."""
        self._pool.shutdown(cancel_futures=True)
