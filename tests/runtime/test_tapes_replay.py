"""Recordings on the CPU: when they are made and replayed, and that nobody can tell but by the time."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runtime_networks import image, vgg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lhc_triton as lhc
from lhc_triton.runtime.accelerate import accelerate
from lhc_triton.runtime.modules import DenseConv2d, GroupedConv2d
from lhc_triton.runtime.tapes import Tapes, can_record


@pytest.fixture(autouse=True)
def library(native_kernel):
    if not can_record():
        pytest.skip(f"the native kernel cannot be built here: {native_kernel}")


class Net(nn.Module):
    """Whatever a test wants to compute, with a buffer and a tensor that is none."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("kept", torch.randn(5))
        self.plain = torch.randn(5)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def run_thrice(net, *inputs):
    tapes = Tapes()
    assert tapes.applies(inputs)
    return tapes, [tapes.run(net, inputs) for _ in range(3)]


@pytest.fixture
def fast():
    return accelerate(vgg(), image(), tune="off", backend="native")


def calls(fast, x):
    """Count the calls that go through Python."""
    count = 0

    def forward(*inputs):
        nonlocal count
        count += 1
        return type(fast.network).forward(fast.network, *inputs)

    fast.network.forward = forward
    outputs = [fast(x) for _ in range(4)]
    del fast.network.forward
    return count, outputs


def test_the_first_two_calls_run_in_python_and_the_later_ones_from_the_recording(fast):
    x = image(seed=3)
    expected = fast.network(x)
    count, outputs = calls(fast, x)
    assert (count, len(fast.tapes), fast.tapes.problem) == (2, 1, "")
    assert all(torch.equal(output, expected) for output in outputs)


def test_a_recording_follows_its_inputs(fast):
    x = image(seed=3)
    for _ in range(2):
        fast(x)
    for seed in range(3):
        other = image(seed=seed + 10)
        assert torch.equal(fast(other), fast.network(other))
    assert len(fast.tapes) == 1


def test_another_size_batch_format_or_mode_gives_the_same_as_without_recordings(fast):
    inputs = [
        image(seed=1),
        torch.randn(3, 3, 17, 23),
        image(seed=1).contiguous(memory_format=torch.channels_last),
    ]
    for x in inputs:
        for _ in range(4):
            assert torch.equal(fast(x), fast.network(x))
            with torch.inference_mode():
                assert torch.equal(fast(x), fast.network(x))
    assert len(fast.tapes) == 3


def test_the_least_recently_used_recording_makes_room():
    tapes, net = Tapes(limit=2), Net(lambda self, x: x * 2)
    for size in (1, 2, 3):
        for _ in range(2):
            tapes.run(net, (torch.ones(size),))
    assert len(tapes) == 2


def test_outputs_are_the_callers_own(fast):
    x = image()
    first = [fast(x) for _ in range(3)][-1]
    kept = first.clone()
    fast(image(seed=9)).zero_()
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "how", ["load a layer", "replace a layer", "write to a dense weight", "write to a bias"]
)
def test_a_changed_network_is_noticed(how):
    fast, x = accelerate(vgg(), image(), tune="off"), image(seed=2)
    for _ in range(3):
        before = fast(x)
    layers = fast.fused_layers()
    grouped = next(layer for layer in layers.values() if isinstance(layer, GroupedConv2d))
    if how == "load a layer":
        grouped.load_state_dict({name: value * 1.5 for name, value in grouped.state_dict().items()})
    elif how == "replace a layer":
        last = next(name for name, m in fast.network.named_modules() if isinstance(m, nn.Linear))
        parent, _, leaf = last.rpartition(".")
        setattr(fast.network.get_submodule(parent), leaf, nn.Linear(48, 10).requires_grad_(False))
    elif how == "write to a bias":
        grouped.bias += 1
    else:
        fast = accelerate(vgg(), image(), tune="off", backend="dense")
        for _ in range(3):
            fast(x)
        dense = next(layer for layer in fast.fused_layers().values() if isinstance(layer, DenseConv2d))
        dense.weight.mul_(1.5)
    expected = fast.network(x)
    assert not torch.equal(expected, before)
    for _ in range(3):
        assert torch.equal(fast(x), expected)


def test_hooks_are_called_every_time_as_long_as_they_are_there(fast):
    x, seen = image(), []
    for _ in range(3):
        fast(x)
    layer = next(iter(fast.fused_layers().values()))
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        fast(x)
    handle.remove()
    assert len(seen) == 3
    assert calls(fast, x)[0] <= 2


def test_a_flop_counter_sees_every_operator(fast):
    x, counts = image(), []
    for _ in range(4):
        with FlopCounterMode(display=False) as counter:
            fast(x)
        counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1
    assert counts[0] > 0


def test_under_autocast_nothing_is_recorded(fast):
    x = image()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert torch.equal(fast(x), fast.network(x))
    assert len(fast.tapes) == 0


def test_where_gradients_are_asked_for_the_refusal_is_the_operators(fast):
    x = image().requires_grad_()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="inference only"):
            fast(x).sum().backward()


def test_threads_may_call_at_once(fast):
    images = [image(seed=seed) for seed in range(8)]
    expected = [fast.network(x) for x in images]
    start = threading.Barrier(4)

    def work(first):
        start.wait()
        return [
            torch.equal(fast(images[i % 8]), expected[i % 8])
            for _ in range(10)
            for i in range(first, first + 8)
        ]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(right) for right in pool.map(work, range(4)))


def test_lists_of_tensors_in_place_operators_and_structures_are_replayed():
    def function(self, x, y):
        z = torch.cat([x, y, self.kept]).relu_()
        z += x.sum()
        return {"z": z, "rest": (None, 3, y)}

    net, x, y = Net(function), torch.randn(5), torch.randn(4)
    tapes, outputs = run_thrice(net, x, y)
    assert (len(tapes), tapes.problem) == (1, "")
    x, y = torch.randn(5), torch.randn(4)
    output, expected = tapes.run(net, (x, y)), net(x, y)
    assert torch.equal(output["z"], expected["z"])
    assert output["rest"][:2] == (None, 3)
    assert output["rest"][2] is y
    assert not torch.equal(outputs[-1]["z"], output["z"])


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda self, x: x + self.plain, "aten::add.Tensor uses a tensor that is none of the network's"),
        (lambda self, x: self.plain, "the network uses a tensor that is none of the network's"),
        (lambda self, x: x.view(5).split(5)[0] + 1, "aten::split.Tensor cannot be replayed"),
        (lambda self, x: x * x.sum().item(), "aten::item cannot be replayed"),
    ],
    ids=["plain tensor", "plain output", "list of results", "number from data"],
)
def test_what_cannot_be_replayed_is_told_and_runs_as_it_is(function, problem):
    net, tapes = Net(function), Tapes()
    for _ in range(2):
        x = torch.randn(5)
        assert torch.equal(tapes.run(net, (x,)), net(x))
    assert problem in tapes.problem
    assert not tapes.applies((x,))


def test_a_call_that_fails_leaves_no_recording_behind():
    def function(self, x):
        if self.fails:
            raise KeyError("mine")
        return x * 2

    net, x, tapes = Net(function), torch.ones(3), Tapes()
    net.fails = False
    tapes.run(net, (x,))
    net.fails = True
    with pytest.raises(KeyError, match="mine"):
        tapes.run(net, (x,))
    net.fails = False
    for _ in range(3):
        assert torch.equal(tapes.run(net, (x,)), x * 2)
    assert len(tapes) == 1


def test_the_tape_refuses_another_number_of_inputs():
    tape = torch.classes.lhc.Tape()
    tape.start([torch.ones(2)])
    tape.stop([], [])
    with pytest.raises(RuntimeError, match="recorded with 1 inputs, run with 2"):
        tape.run([torch.ones(2), torch.ones(2)])


def test_copies_and_files_bring_no_recordings_along(fast, tmp_path):
    x = image()
    for _ in range(3):
        fast(x)
    twin = copy.deepcopy(fast)
    assert (len(fast.tapes), len(twin.tapes)) == (1, 0)
    torch.save(fast.tapes, io.BytesIO())
    lhc.save(fast, tmp_path / "net.safetensors")
    loaded = lhc.load(tmp_path / "net.safetensors")
    for other in (twin, loaded):
        for _ in range(3):
            assert torch.equal(other(x), fast(x))
        assert len(other.tapes) == 1
    assert lhc.load(tmp_path / "net.safetensors", graphs=False).tapes is None


def test_what_torch_fx_cannot_trace_is_not_recorded():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = vgg()

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else -self.body(x)

    fast = accelerate(Branching().eval(), image().abs(), tune="off")
    assert can_record()
    assert fast.tapes is None
