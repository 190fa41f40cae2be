"""The random generators that all code shares."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def generators_kept(gpus: Sequence[int] = ()) -> Iterator[None]:
    """Put Python's and NumPy's common generators, and torch's of the CPU and ``gpus``, back afterwards."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
