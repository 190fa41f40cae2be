"""What every way to record a network's calls and replay them shares."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lhc_triton.runtime.replay.staleness import Watch

MAX_KEPT = 8
MAX_SEEN = 64

Signature = tuple[Any, ...]
Kept = TypeVar("Kept")


class Replays(Generic[Kept]):
    """Recordings of one network by the signatures of its inputs, dropped when the network changes.

    Args:
        limit: recordings to keep, the most recently used ones.

    Attributes:
        problem: why nothing is recorded any more; "" while it may be.
    """

    addresses = False  # whether a tensor that lies elsewhere makes a recording stale

    def __init__(self, limit: int = MAX_KEPT) -> None:
        self.problem = ""
        self._limit = limit
        self._kept: OrderedDict[Signature, Kept] = OrderedDict()
        self._seen: OrderedDict[Signature, None] = OrderedDict()
        self._watch: Watch | None = None
        self._lock = threading.Lock()
        _LIVE.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._limit,)  # a copy records its own: it has other weights

    def __len__(self) -> int:
        return len(self._kept)

    def takes(self, inputs: tuple[Any, ...]) -> bool:
        """Return whether inputs are plain tensors, and nobody watches the operators or wants gradients."""
        if self.problem or not inputs or not all(type(x) in (Tensor, nn.Parameter) for x in inputs):
            return False
        wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return not wants_gradients and not is_in_torch_dispatch_mode()

    def refuse(self, problem: str) -> None:
        """Record and replay nothing any more."""
        self.problem = problem
        self.clear()

    def clear(self) -> None:
        """Drop all recordings, and what they hold."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        """Forget everything; the caller holds the lock."""
        self._kept.clear()
        self._seen.clear()
        self._watch = None

    def _after_fork(self) -> None:
        """Begin anew in a forked child whose parent was at work on this: the thread that was is not in it."""
        held, self._lock = self._lock.locked(), threading.Lock()
        if held:
            self._drop()

    def _keep_watch(self, network: nn.Module) -> bool:
        """Drop what is of the network as it was before; return whether it may be replayed now."""
        if self._watch is not None and not self._watch.same():
            self._drop()
        if self._watch is None:
            self._watch = Watch(network, addresses=self.addresses)
        return not self._watch.hooked()

    def _note(self, signature: Signature) -> None:
        """Remember that the network ran on such inputs; only then may it be recorded."""
        keep_latest(self._seen, signature, None, MAX_SEEN)

    def _keep(self, signature: Signature, recording: Kept) -> None:
        keep_latest(self._kept, signature, recording, self._limit)


def keep_latest(cache: OrderedDict[Signature, Any], signature: Signature, value: Any, limit: int) -> None:
    """Put a value at the end of a cache, and drop what was used the longest time ago."""
    cache[signature] = value
    cache.move_to_end(signature)
    while len(cache) > limit:
        cache.popitem(last=False)


_LIVE: weakref.WeakSet[Replays[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for replays in list(_LIVE):
        replays._after_fork()


os.register_at_fork(after_in_child=_after_fork)
