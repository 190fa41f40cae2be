"""What a capture leaves behind, on a stand-in for torch.cuda that fails as the real one does."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from lhc_triton.runtime.replay.cuda_graphs import GraphMemory


class PaperCuda:
    """torch.cuda as far as captures use it: the current stream, and which pools are open.

    Attributes:
        current: the current stream.
        open, users: begun and not ended captures of the pool, and those that have not let go of it.
        captured_on: the streams of all captures.
        fails: what the end of a capture raises, before it restores anything, as torch's does.
    """

    def __init__(self, monkeypatch):
        self.main = self.current = self.Stream()
        self.open = self.users = 0
        self.captured_on = []
        self.fails = None
        for name in ("Stream", "stream", "set_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    class Stream:
        device_index = 3

        def wait_stream(self, other):
            pass

    def set_stream(self, stream):
        self.current = stream

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        before, self.current = self.current, stream
        self.captured_on.append(stream)
        self.open += 1
        self.users += 1
        try:
            yield
        finally:
            if self.fails is not None:
                raise self.fails
            self.open -= 1
            self.current = before

    def end(self, device, pool):
        assert (device, pool) == (3, (0, 7))
        if not self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open -= 1

    def release(self, device, pool):
        assert (device, pool) == (3, (0, 7))
        self.users -= 1


@pytest.fixture
def cuda(monkeypatch):
    return PaperCuda(monkeypatch)


def test_a_function_runs_once_before_it_is_captured_on_the_same_stream(cuda):
    streams = []
    _, result = GraphMemory().capture(lambda: streams.append(cuda.current) or len(streams))
    assert result == 2
    assert streams == [cuda.captured_on[0]] * 2
    assert cuda.main not in streams
    assert cuda.current is cuda.main


def test_all_captures_of_a_memory_are_made_on_one_stream(cuda):
    memory = GraphMemory()
    for _ in range(8):
        memory.capture(lambda: None)
    assert len(set(cuda.captured_on)) == 1
    GraphMemory().capture(lambda: None)
    assert len(set(cuda.captured_on)) == 2


def test_where_the_end_of_a_capture_fails_stream_and_pool_are_given_back(cuda):
    memory = GraphMemory()
    cuda.fails = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError, match="previous error during capture"):
        memory.capture(lambda: None)
    assert cuda.current is cuda.main
    assert (cuda.open, cuda.users) == (0, 0)
    cuda.fails = None
    assert memory.capture(lambda: 5)[1] == 5


def test_the_function_s_own_error_is_told_rather_than_the_capture_s(cuda):
    calls = []

    def waits():
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("it waits for the device")

    cuda.fails = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    with pytest.raises(ValueError, match="it waits for the device"):
        GraphMemory().capture(waits)
    assert cuda.current is cuda.main
    assert (cuda.open, cuda.users) == (0, 0)


def test_a_pool_that_the_capture_has_closed_is_left_alone(cuda):
    calls = []

    def fails_later():
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("no second time")

    with pytest.raises(ValueError, match="no second time"):
        GraphMemory().capture(fails_later)
    assert (cuda.open, cuda.users) == (0, 1)  # the graph itself lets go of it
