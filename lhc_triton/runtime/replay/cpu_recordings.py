"""Recordings of a network on the CPU: its operators called again from C++, without Python in between.

Python's share of a call is small for one layer and large for all: ResNet50 at density 0.1 took 11.8 ms on
two cores, and the same operators called from C++ 10.1 ms. Python also runs on one core, however many the
operators use.

Only networks whose whole graph is on the closed list of `saved.operations` are recorded: what else a
network may do (read numbers out of a tensor, fill one from Python, change modes) a list of operators would
not show.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lhc_triton.runtime.op.dense import DenseConv2d
from lhc_triton.runtime.replay.replays import MAX_KEPT, Replays
from lhc_triton.runtime.saved.arguments import GraphError
from lhc_triton.runtime.saved.operations import check_listed

MAX_DISTURBED = 8

_TENSOR = object()


def why_not_recordable(network: nn.Module) -> str | None:
    """Say why a recording would not show everything that a network does; None if it would.

    It does for a graph of listed operations.
    """
    try:
        check_listed(network)
    except GraphError as error:
        return str(error)
    return None


def can_record() -> bool:
    """Return whether the native kernel's library, which does the recording, is in this process."""
    native = sys.modules.get("lhc_kernels.cpu")
    return native is not None and bool(native.loaded())


@dataclass(frozen=True)
class _Recording:
    tape: Any  # a torch.classes.lhc.Tape
    structure: TreeSpec  # of the output
    leaves: tuple[Any, ...]  # what is no tensor in it; _TENSOR stands for those that the tape returns

    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        tensors = iter(self.tape.run(list(inputs)))
        leaves = [next(tensors) if leaf is _TENSOR else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.structure)


class Tapes(Replays[_Recording]):
    """Runs a network on the CPU through recordings, one for each signature of its inputs.

    A signature is the inputs' shapes, strides and types, and whether gradients and inference mode are on. Its
    first call runs as it is, the second one is recorded, later ones are replayed. The most recently used
    `limit` recordings are kept; all are dropped when the network changes (see `staleness.Watch`). A replay
    calls the same operators on the same weights: the same bits, and outputs that belong to whom they would
    without it. Threads may call at once. As it is the network runs on other devices, under autocast or a
    dispatch mode (a FLOP counter, for example), with hooks, and where gradients are asked for. A recording
    that fails because the network changes meanwhile (another thread writes a weight) is made anew, unless
    that happens MAX_DISTURBED times in a row.

    Args:
        limit: recordings to keep.

    Attributes:
        problem: why nothing is recorded any more; "" while it may be.
    """

    def __init__(self, limit: int = MAX_KEPT) -> None:
        super().__init__(limit)
        self._disturbed = 0

    def applies(self, inputs: tuple[Any, ...]) -> bool:
        """Return whether a call with these inputs may be recorded or replayed here and now."""
        if not self.takes(inputs) or not all(
            x.device.type == "cpu" and x.layout == torch.strided for x in inputs
        ):
            return False
        if len({id(x) for x in inputs}) < len(inputs) or not can_record():
            return False  # of two equal inputs a recording could not tell which one an operator was given
        return torch._C._len_torch_function_stack() == 0 and not torch.is_autocast_enabled("cpu")

    def run(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Return the network's output for inputs that it applies to."""
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        signature = (modes, *((x.shape, x.stride(), x.dtype) for x in inputs))
        with self._lock:
            usable, watch = self._keep_watch(network), self._watch
            recording = self._kept.get(signature) if usable else None
            if recording is not None:
                self._kept.move_to_end(signature)
            # Only after a plain call, in which dense layers bring their weights into oneDNN's order.
            record = usable and signature in self._seen
        if recording is not None:
            return recording.replay(inputs)
        if not record:
            output = network(*inputs)
            with self._lock:
                self._note(signature)
            return output
        output, made, problem = self._record(network, inputs)
        with self._lock:
            stood_still = watch is not None and watch.same()
            self._disturbed = self._disturbed + 1 if problem and not stood_still else 0
            if made is not None and self._watch is watch:
                self._keep(signature, made)
        if problem and (stood_still or self._disturbed == MAX_DISTURBED):
            self.refuse(problem)
        return output

    def _record(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, _Recording | None, str]:
        """Run the network; return its output, the recording where there can be one, and what is wrong."""
        constants = _constants(network)
        if {id(x) for x in inputs} & {id(constant) for constant in constants}:
            return network(*inputs), None, ""
        tape = torch.classes.lhc.Tape()
        tape.start(list(inputs))
        try:
            output = network(*inputs)
            leaves, structure = tree_flatten(output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            problem = tape.stop(tensors, [*constants, *_constants(network)])
        except BaseException:
            tape.abandon()
            raise
        if problem:
            return output, None, problem
        rest = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return output, _Recording(tape, structure, rest), ""


def _constants(network: nn.Module) -> list[Tensor]:
    """Return the tensors that operators may be given besides the inputs and each other's results."""
    prepacked = [m.prepacked_weight for m in network.modules() if isinstance(m, DenseConv2d)]
    kept = [weight for weight in prepacked if weight is not None]
    return [*network.parameters(), *network.buffers(), *kept]
