"""Full disks and full memories, told in one line that says how to go on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lhc_triton.training.config import TrainConfig


@contextmanager
def named_where_disk_fails(out: Path) -> Iterator[None]:
    """Say of an OSError inside that the run's folder cannot be written, and that what lies there is whole."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        inside = error.filename is not None and Path(error.filename).is_relative_to(out)
        if not (full or inside):
            raise  # of something that was read
        raise OSError(
            f"{out}: cannot be written ({error.strerror or error}); what lies there is whole: "
            f"{'make room' if full else 'mend that'}, and the same command goes on from it"
        ) from error


@contextmanager
def named_where_memory_ends(config: TrainConfig) -> Iterator[None]:
    """Turn whatever torch raises where memory ends into one MemoryError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for CUDA only.
        signs = ("can't allocate memory", "not enough memory", "bad allocation")
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
        ):
            raise
        raise MemoryError(
            f"no memory for steps of {config.batch_size} images in parts of "
            f"{config.batch_size // config.accumulate}; raise accumulate or lower batch_size, "
            "in another folder"
        ) from error
