"""CUDA graphs of a network: when they are used, who owns the output, what concurrent callers get."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from runtime_networks import image, vgg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lhc_triton as lhc
from lhc_triton.runtime.network import accelerated
from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.replay.cuda_graphs import Graphs


class PaperDevice:
    """Graphs without CUDA: a replay runs the function again and writes into the first result.

    Attributes:
        captures, replays: how often.
        inside: turns at work right now; more than one would be a race.
    """

    def __init__(self, fails=None):
        self.captures = self.replays = self.waits = self.finishes = self.inside = 0
        self.is_ready = True
        self.fails = fails

    def ready(self, inputs):
        return self.is_ready

    @contextmanager
    def turn(self, device):
        self.inside += 1
        assert self.inside == 1
        yield
        self.inside -= 1

    def capture(self, function):
        self.captures += 1
        if self.fails is not None:
            raise self.fails
        outputs = function()

        def replay():
            self.replays += 1
            flat, fresh = (torch.utils._pytree.tree_leaves(o) for o in (outputs, function()))
            for mine, new in zip(flat, fresh, strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(new)

        return replay, outputs

    def wait(self):
        self.waits += 1

    def finish(self):
        self.finishes += 1


class Double(nn.Module):
    """Twice the input; counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if x.dim() != 2:
            raise ValueError("two dimensions, please")
        return 2 * x


def run(graphs, network, inputs):
    """Call as an accelerated network does."""
    return graphs.run(network, inputs) if graphs.applies(inputs) else network(*inputs)


@pytest.fixture
def device():
    return PaperDevice()


def row(value, width=4):
    return torch.full((1, width), float(value))


def test_the_second_call_of_a_signature_captures_and_the_later_ones_replay(device):
    graphs, network = Graphs(device=device), Double()
    outputs = [run(graphs, network, (row(v),)) for v in range(4)]
    assert [float(y[0, 0]) for y in outputs] == [0, 2, 4, 6]
    assert (device.captures, device.replays) == (1, 3)
    run(graphs, network, (row(1, width=8),))
    run(graphs, network, (row(1).double(),))
    assert (device.captures, len(graphs)) == (1, 1)


def test_the_caller_owns_the_output(device):
    graphs, network = Graphs(device=device), Double()
    for _ in range(2):
        run(graphs, network, (row(0),))
    first = run(graphs, network, (row(1),))
    second = run(graphs, network, (row(2),))
    assert (float(first[0, 0]), float(second[0, 0])) == (2, 4)
    first.fill_(9)
    assert float(run(graphs, network, (row(3),))[0, 0]) == 6


def test_the_caller_s_input_is_only_read(device):
    graphs, network = Graphs(device=device), Double()
    x = row(1)
    for _ in range(3):
        run(graphs, network, (x,))
    x.fill_(5)
    assert float(run(graphs, network, (row(2),))[0, 0]) == 4
    assert float(x[0, 0]) == 5


def test_nested_outputs_are_copied_as_they_are(device):
    class Nested(nn.Module):
        def forward(self, x):
            return {"a": [x + 1, None], "b": (x, 3)}

    graphs = Graphs(device=device)
    y = [run(graphs, Nested(), (row(v),)) for v in range(3)]
    assert [float(out["a"][0][0, 0]) for out in y] == [1, 2, 3]
    assert [float(out["b"][0][0, 0]) for out in y] == [0, 1, 2]
    assert (y[2]["a"][1], y[2]["b"][1]) == (None, 3)


def test_an_output_that_cannot_be_copied_ends_graphs(device):
    class Odd(nn.Module):
        def forward(self, x):
            return iter([x])

    graphs = Graphs(device=device)
    for _ in range(3):
        assert float(next(run(graphs, Odd(), (row(1),)))[0, 0]) == 1
    assert "the output holds a list_iterator" in graphs.problem


def test_the_least_recently_used_graph_goes_first_and_only_when_its_work_is_done(device):
    graphs, network = Graphs(limit=2, device=device), Double()
    for width in (1, 2, 1, 3):
        for _ in range(2):
            run(graphs, network, (row(1, width),))
    assert (device.captures, device.waits, len(graphs)) == (3, 1, 2)
    run(graphs, network, (row(1, 1),))
    assert device.captures == 3
    run(graphs, network, (row(1, 2),))
    assert device.captures == 4


def test_concurrent_callers_take_turns_and_get_their_own_results(device):
    graphs, network = Graphs(device=device), Double()
    for width in (4, 8):
        for _ in range(2):
            run(graphs, network, (row(0, width),))
    barrier = threading.Barrier(4)

    def call_many(caller):
        barrier.wait()
        x = [row(100 * caller + turn, 4 + 4 * (turn % 2)) for turn in range(50)]
        return all(torch.equal(run(graphs, network, (value,)), 2 * value) for value in x)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call_many, range(4))) == [True] * 4
    assert device.captures == 2


def test_a_capture_that_fails_leaves_the_network_as_it_runs_and_says_why(device):
    graphs, network = Graphs(device=device), Double()
    for _ in range(2):
        run(graphs, network, (row(0, 8),))
    assert len(graphs) == 1
    device.fails = RuntimeError("operation not permitted\nwhen stream is capturing")
    for value in range(4):
        assert float(run(graphs, network, (row(value),))[0, 0]) == 2 * value
    assert device.captures == 2
    assert (len(graphs), device.finishes) == (0, 1)  # their memory is free again
    assert graphs.problem == "capture failed (RuntimeError: operation not permitted)"


def test_an_input_that_the_network_refuses_does_not_end_graphs(device):
    graphs, network = Graphs(device=device), Double()
    for _ in range(3):
        with pytest.raises(ValueError, match="two dimensions"):
            run(graphs, network, (torch.zeros(3),))
    assert graphs.problem == ""
    for _ in range(3):
        run(graphs, network, (row(1),))
    assert device.captures == 1


def test_where_graphs_cannot_serve_the_network_runs_as_it_is(device):
    graphs, network = Graphs(device=device), Double()
    for _ in range(2):
        run(graphs, network, (row(1),))
    replays = device.replays
    with FlopCounterMode(display=False):
        run(graphs, network, (row(1),))
    run(graphs, network, (row(1).requires_grad_(),)).sum().backward()
    with torch.no_grad():
        assert device.replays == replays
        run(graphs, network, (row(1).requires_grad_(),))
    assert device.replays == replays + 1
    device.is_ready = False  # on a CPU, inside another capture, under autocast
    run(graphs, network, (row(1),))
    assert device.replays == replays + 1


def test_inference_mode_may_come_and_go(device):
    graphs, network = Graphs(device=device), Double()
    with torch.inference_mode():
        for _ in range(2):
            assert run(graphs, network, (row(1),)).is_inference()
    assert not run(graphs, network, (row(2),)).is_inference()
    assert device.replays == 2


@pytest.fixture
def on_paper(monkeypatch):
    """Give accelerated networks the device without CUDA; the list holds those that were made."""
    made = []

    def graphs(limit=8):
        made.append(PaperDevice())
        return Graphs(limit, made[-1])

    monkeypatch.setattr(accelerated, "Graphs", graphs)
    return made


def test_accelerate_captures_the_example_and_checks_what_is_replayed(on_paper):
    model, x = vgg(), image()
    fast = accelerate(model, x, tune="off")
    assert on_paper[0].captures == 1
    replays = on_paper[0].replays
    assert replays > 0
    y = fast(x)
    assert on_paper[0].replays == replays + 1
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    assert "graphs" not in fast.explain()


def test_graphs_can_be_opted_out_of(on_paper):
    fast = accelerate(vgg(), image(), tune="off", graphs=False)
    fast(image())
    assert on_paper == []
    assert fast.graphs is None


def test_a_replay_that_computes_something_else_ends_graphs_with_a_note(on_paper, monkeypatch):
    def stuck(self, function):
        return lambda: None, torch.zeros_like(function())

    monkeypatch.setattr(PaperDevice, "capture", stuck)
    model, x = vgg(), image()
    fast = accelerate(model, x, tune="off")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert "note: CUDA graphs are off: replayed, on the example the output differs by" in fast.explain()
    assert any("CUDA graphs are off" in note for note in fast.report()["notes"])


@pytest.mark.parametrize("change", ["move", "load"])
def test_new_weights_or_another_type_drop_the_graphs(on_paper, change):
    fast, x = accelerate(vgg(), image(), tune="off", backend="torch"), image()
    if change == "move":
        fast.double()
        x = x.double()
    else:
        fast.load_state_dict({name: 0 * value for name, value in fast.state_dict().items()})
    expected = fast.network(x)
    for _ in range(3):
        torch.testing.assert_close(fast(x), expected)
    assert on_paper[0].captures == 2


def test_copies_and_files_bring_no_graphs_along(on_paper, tmp_path):
    fast = accelerate(vgg(), image(), tune="off")
    twin = copy.deepcopy(fast)
    assert (len(fast.graphs), len(twin.graphs)) == (1, 0)
    torch.testing.assert_close(twin(image()), fast(image()))
    buffer = io.BytesIO()
    torch.save(fast.graphs, buffer)
    lhc.save(fast, tmp_path / "net.safetensors")
    assert lhc.load(tmp_path / "net.safetensors", graphs=False).graphs is None
    loaded = lhc.load(tmp_path / "net.safetensors")
    for _ in range(2):
        loaded(image())
    assert len(loaded.graphs) == 1


def test_compiled_the_network_uses_no_graphs_of_ours(on_paper):
    fast = accelerate(vgg(), image(), tune="off")
    replays = on_paper[0].replays
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image(seed=5)), fast.network(image(seed=5)))
    assert on_paper[0].replays == replays
    torch._dynamo.reset()


def test_on_a_cpu_nothing_is_captured():
    fast = accelerate(vgg(), image(), tune="off")
    for _ in range(3):
        fast(image())
    assert len(fast.graphs) == 0
    assert fast.graphs.problem == ""
