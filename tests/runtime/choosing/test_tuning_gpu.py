"""Tuning and CUDA graphs on a real GPU."""

import os
import threading

import pytest
import torch
from oracle import norm_error
from recorded_bench import HALF, layer_of
from runtime_networks import image, resnet, vgg
from torch import nn

from lhc_triton.runtime.choosing import launch_configs
from lhc_triton.runtime.choosing.cold_timing import ColdTimer, time_cold
from lhc_triton.runtime.choosing.dispatch import choose_backend
from lhc_triton.runtime.choosing.layer_tuner import tune_layer
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.replay.cuda_graphs import GraphMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets kernels"
    ),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv(launch_configs.DETERMINISTIC, raising=False)
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path))
    return TimingStore()


def test_a_layer_is_tuned_once_and_its_config_found_again(store):
    layer = layer_of(1024)
    first = tune_layer(layer, HALF, CUDA, store, limit=4)
    assert (first.timed, first.failed, first.left) == (4, 0, 0)
    assert all(isinstance(time, float) and time > 0 for time in store.get(first.key).values())
    assert tune_layer(layer, HALF, CUDA, store, limit=4).timed == 0
    assert launch_configs.look_up(layer, HALF, CUDA, 1024, (128, 8)).source == "store"


def test_full_compares_the_tuned_kernel_with_dense(store):
    found = choose_backend(layer_of(1024), HALF, CUDA, "full", store)
    assert set(found.measured_us) == {"triton", "dense"}
    assert choose_backend(layer_of(1024), HALF, CUDA, "cached", store) == found


def test_a_cold_sample_takes_some_time():
    x = torch.randn(256, 256, device=CUDA)
    assert ColdTimer(CUDA).sampler(lambda: x @ x)() > 0
    assert all(time > 0 for time in time_cold({"a": lambda: x @ x, "b": lambda: x + x}, CUDA, 3).values())


def test_inside_a_capture_tuning_is_refused(store):
    x = torch.ones(8, device=CUDA)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add(1)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
            tune_layer(layer_of(), HALF, CUDA, store)


def test_after_a_failed_capture_the_thread_and_the_memory_serve_on():
    memory, x = GraphMemory(), torch.ones(8, device=CUDA)
    before = torch.cuda.current_stream()
    for _ in range(3):
        with pytest.raises(RuntimeError):
            memory.capture(lambda: float(x.sum()))
        assert torch.cuda.current_stream() == before
    graph, y = memory.capture(lambda: 2 * x)
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [8] * 8
    torch.cuda.empty_cache()  # fails while a capture counts as underway


@pytest.fixture
def fast(store):
    return accelerate(resnet().to(CUDA, HALF), image(size=16).to(CUDA, HALF), backend="triton", tune="off")


def picture(seed, batch=2):
    return image(batch=batch, size=16, seed=seed).to(CUDA, HALF)


def test_graphs_give_the_bits_of_the_network_and_the_caller_owns_them(fast):
    assert fast.graphs.problem == ""
    assert len(fast.graphs) == 1
    with torch.no_grad():
        outputs = [fast(picture(seed)) for seed in range(4)]
        assert all(torch.equal(y, fast.network(picture(seed))) for seed, y in enumerate(outputs))
    for batch in (1, 3, 1, 3):
        with torch.no_grad():
            assert torch.equal(fast(picture(9, batch)), fast.network(picture(9, batch)))
    assert len(fast.graphs) == 3


def test_callers_on_streams_of_their_own_get_their_own_results(fast):
    expected = {}
    with torch.no_grad():
        for seed in range(12):
            expected[seed] = fast.network(picture(seed))
    torch.cuda.synchronize()
    wrong = []

    def call(thread):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            results = [(seed, fast(picture(seed))) for seed in range(thread, 12, 3) for _ in range(20)]
        stream.synchronize()
        wrong.extend(seed for seed, y in results if not torch.equal(y, expected[seed]))

    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_replay_does_not_wait_for_the_device(fast):
    x = picture(1)
    fast(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_network_can_be_captured_by_its_caller(fast):
    x = picture(1)
    with torch.no_grad():
        expected = fast.network(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fast(x)
        graph.replay()
    assert torch.equal(y, expected)


def test_a_network_that_waits_for_the_device_runs_without_graphs_and_says_so(store):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = vgg()

        def forward(self, x):
            return self.body(x) * (2 if float(x.sum()) > 0 else 1)

    x = image().to(CUDA)
    model = Reads().to(CUDA)
    fast = accelerate(model, x, tune="off")
    assert "CUDA graphs are off: capture failed" in fast.explain()
    with torch.no_grad():
        assert norm_error(fast(x), model(x)) < 5e-3


def test_torch_compile_goes_around_the_network(fast):
    compiled = torch.compile(fast)
    with torch.no_grad():
        assert norm_error(compiled(picture(3)), fast.network(picture(3))) < 1e-2
