"""CUDA graphs of a whole network: at small sizes, launching the kernels takes longer than running them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lhc_triton.errors import one_line
from lhc_triton.runtime.replay.replays import MAX_KEPT, Replays, Signature

_PLAIN = (Tensor, bool, int, float, str, type(None))

Function = Callable[[], Any]


class Device(Protocol):
    """What `Graphs` asks of CUDA; the tests have another one."""

    def ready(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether a graph may be captured or replayed here and now."""

    def turn(self, device: torch.device) -> AbstractContextManager[None]:
        """Order the work inside after that of every earlier turn, whatever stream it ran on."""

    def capture(self, function: Function) -> tuple[Callable[[], None], Any]:
        """Return what replays the function's kernels, and its result, which each replay overwrites."""

    def wait(self) -> None:
        """Wait until the last turn's work is done."""

    def finish(self) -> None:
        """Wait, and let go of the graphs' memory."""


@dataclass(frozen=True)
class _Graph:
    inputs: tuple[Tensor, ...]
    outputs: Any
    replay: Callable[[], None]


class Graphs(Replays[_Graph]):
    """Runs a network through CUDA graphs, one for each signature of its inputs.

    A signature is their shapes, strides, types and device. Its first call runs as it is, which also warms up;
    from the second one on a graph is replayed. The most recently used `limit` graphs are kept, in one memory
    pool. The caller owns what it gets: outputs are copies, no later call changes them. Calls from several
    threads or streams are safe; they take turns, for the graphs' inputs and memory are shared. All graphs are
    dropped when the network changes (see `staleness.Watch`). As it is the network runs on other devices,
    inside another capture, under autocast or a dispatch mode (a FLOP counter, for example), with hooks, and
    where gradients are asked for.

    Args:
        limit: graphs to keep.
        device: another one in tests.

    Attributes:
        problem: why there are no graphs any more; "" while there may be.
    """

    addresses = True  # the kernels of a graph read addresses, not tensors

    def __init__(self, limit: int = MAX_KEPT, device: Device | None = None) -> None:
        super().__init__(limit)
        self._device = CudaDevice() if device is None else device

    def run(self, network: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Return the network's output for inputs that it applies to, through a graph once it is time."""
        signature = _signature(inputs)
        with self._lock:
            usable = self._keep_watch(network)
            if usable and (
                signature in self._kept or (signature in self._seen and self._capture(network, inputs))
            ):
                return self._replay(signature, inputs)
        output = network(*inputs)
        with self._lock:
            # Only now: an input that the network refuses is no signature.
            self._note(signature)
        return output

    def capture(self, network: nn.Module, inputs: tuple[Any, ...]) -> bool:
        """Capture a graph for these inputs, which the network has run on before; False if there is none."""
        if not self.applies(inputs):
            return False
        with self._lock:
            usable = self._keep_watch(network)
            return usable and (_signature(inputs) in self._kept or self._capture(network, inputs))

    def _drop(self) -> None:
        self._device.finish()
        super()._drop()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # CUDA does not survive a fork, so its graphs are left alone

    def applies(self, inputs: tuple[Any, ...]) -> bool:
        """Return whether a call with these inputs may be captured or replayed here and now."""
        return self.takes(inputs) and self._device.ready(inputs)

    def _capture(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
        try:
            # Tensors of inference mode could not be written to by a caller outside of it.
            with torch.inference_mode(False), torch.no_grad(), self._device.turn(inputs[0].device):
                static = tuple(x.clone() for x in inputs)
                replay, outputs = self._device.capture(lambda: network(*static))
            odd = [type(leaf).__name__ for leaf in tree_leaves(outputs) if not isinstance(leaf, _PLAIN)]
            if odd:
                raise TypeError(f"the output holds a {odd[0]}")
        except Exception as error:  # foreign code: whatever it raises, the network still runs without graphs
            self.problem = f"capture failed ({one_line(error)})"
            self._drop()  # no call will use them any more, nor their memory
            return False
        if len(self._kept) == self._limit:
            self._device.wait()  # a replay on another stream may still need the memory that is freed
        self._keep(_signature(inputs), _Graph(static, outputs, replay))
        return True

    def _replay(self, signature: Signature, inputs: tuple[Tensor, ...]) -> Any:
        graph = self._kept[signature]
        self._kept.move_to_end(signature)
        with torch.no_grad(), self._device.turn(inputs[0].device):
            for mine, given in zip(graph.inputs, inputs, strict=True):
                mine.copy_(given)
            graph.replay()
            return tree_map_only(Tensor, torch.clone, graph.outputs)


def _signature(inputs: tuple[Tensor, ...]) -> Signature:
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)


class CudaDevice:
    """CUDA as `Graphs` uses it; serves one GPU between two calls of `finish`."""

    def __init__(self) -> None:
        self._done: torch.cuda.Event | None = None
        self._memory: GraphMemory | None = None

    def ready(self, inputs: Sequence[Tensor]) -> bool:
        """See `Device`."""
        if not inputs[0].is_cuda or len({x.device for x in inputs}) > 1:
            return False
        return not torch.cuda.is_current_stream_capturing() and not torch.is_autocast_enabled("cuda")

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """See `Device`."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._done is None:
                self._done = torch.cuda.Event()
            else:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def capture(self, function: Function) -> tuple[Callable[[], None], Any]:
        """See `Device`."""
        if self._memory is None:
            self._memory = GraphMemory()
        graph, outputs = self._memory.capture(function)
        return graph.replay, outputs

    def wait(self) -> None:
        """See `Device`."""
        if self._done is not None:
            self._done.synchronize()

    def finish(self) -> None:
        """See `Device`."""
        self.wait()
        self._done = self._memory = None


class GraphMemory:
    """Captures graphs on the current GPU that share their memory, for they never run at the same time.

    What one capture frees serves the next one only on the same stream, so all of them are made on one.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Function) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Run a function once on the stream of captures, then capture it.

        Args:
            function: called twice; the first call compiles and allocates what a capture must not.

        Returns:
            The graph, and the function's result, which every replay writes again.

        Raises:
            Exception: the function's own, or the capture's. The current stream is the caller's again, and the
                pool serves further captures.
        """
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            function()
        before.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                try:
                    result = function()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            # Where the end of a capture fails, torch leaves the stream set and the pool open.
            torch.cuda.set_stream(before)
            _close_pool(before.device_index, self._pool)
            raise cause or error  # noqa: B904  (the end of a capture that failed says only that it did)
        return graph, result


def _close_pool(device: int, pool: Any) -> None:
    """Undo what the beginning of a capture did to the allocator, unless its end has done so."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # it is not open
    torch._C._cuda_releasePool(device, pool)
