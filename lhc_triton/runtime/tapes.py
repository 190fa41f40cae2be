"""Recordings of a network on the CPU: its operators called again from C++, without Python in between.

Python's share of a call is small for one layer and large for all: ResNet50 at density 0.1 took 11.8 ms on
two cores, and the same operators called from C++ 10.1 ms. Python also runs on one core, however many the
operators use.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lhc_triton.runtime.modules import DenseConv2d
from lhc_triton.runtime.watch import Watch

MAX_TAPES = 8

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class _Recording:
    tape: Any  # a torch.classes.lhc.Tape
    watch: Watch
    structure: TreeSpec  # of the output
    leaves: tuple[Any, ...]  # what is no tensor in it; _TENSOR stands for those that the tape returns

    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        tensors = iter(self.tape.run(list(inputs)))
        leaves = [next(tensors) if leaf is _TENSOR else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.structure)


_TENSOR = object()


def can_record() -> bool:
    """Return whether the native kernel's library, which does the recording, is in this process."""
    from lhc_kernels.cpu import loaded

    return loaded()


class Tapes:
    """Runs a network on the CPU through recordings, one for each signature of its inputs.

    A signature is the inputs' shapes, strides and types. Its first call runs as it is, the second one is
    recorded, later ones are replayed. The most recently used `limit` recordings are kept; one is dropped when
    its network changes (see `watch.Watch`). A replay calls the same operators on the same weights, so it
    computes the same bits; the outputs are the caller's own. Threads may call at once. As it is the network
    runs on other devices, under autocast or a dispatch mode (a FLOP counter, for example), with hooks, and
    where gradients are asked for.

    Args:
        limit: recordings to keep.

    Attributes:
        problem: why nothing is recorded any more; "" while it may be.
    """

    def __init__(self, limit: int = MAX_TAPES) -> None:
        self.problem = ""
        self._limit = limit
        self._recordings: OrderedDict[Signature, _Recording | None] = OrderedDict()  # None: seen once
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tapes, (self._limit,)  # a copy records its own: it has other weights

    def __len__(self) -> int:
        return sum(recording is not None for recording in self._recordings.values())

    def applies(self, inputs: tuple[Any, ...]) -> bool:
        """Return whether a call with these inputs may be recorded or replayed here and now."""
        if self.problem or not inputs or not all(type(x) in (Tensor, nn.Parameter) for x in inputs):
            return False
        if not all(x.device.type == "cpu" and x.layout == torch.strided for x in inputs):
            return False
        wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return not (wants_gradients or is_in_torch_dispatch_mode() or torch.is_autocast_enabled("cpu"))

    def run(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Return the network's output for inputs that it applies to."""
        signature = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        with self._lock:
            seen = signature in self._recordings
            recording = self._recordings.get(signature)
        if recording is not None and recording.watch.same() and not recording.watch.hooked():
            return recording.replay(inputs)
        output, made = self._record(network, inputs) if seen else (network(*inputs), None)
        with self._lock:
            self._recordings[signature] = made
            self._recordings.move_to_end(signature)
            while len(self._recordings) > self._limit:
                self._recordings.popitem(last=False)
        return output

    def refuse(self, problem: str) -> None:
        """Record and replay nothing any more."""
        self.problem = problem
        self._recordings.clear()

    def _record(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, _Recording | None]:
        """Run the network; return its output, and the recording where there can be one."""
        watch = Watch(network)
        if watch.hooked():
            return network(*inputs), None
        tape = torch.classes.lhc.Tape()
        tape.start(list(inputs))
        try:
            output = network(*inputs)
        except BaseException:
            tape.abandon()
            raise
        leaves, structure = tree_flatten(output)
        problem = tape.stop([leaf for leaf in leaves if isinstance(leaf, Tensor)], _constants(network))
        if problem:
            self.refuse(problem)
            return output, None
        rest = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return output, _Recording(tape, watch, structure, rest)


def _constants(network: nn.Module) -> list[Tensor]:
    """Return the tensors that operators may be given besides the inputs and each other's results."""
    prepacked = [m.prepacked_weight for m in network.modules() if isinstance(m, DenseConv2d)]
    kept = [weight for weight in prepacked if weight is not None]
    return [*network.parameters(), *network.buffers(), *kept]
