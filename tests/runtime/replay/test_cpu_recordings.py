"""Recordings on the CPU: when they are made and replayed, and that nobody can tell but by the time."""

import contextlib
import copy
import gc
import io
import os
import signal
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from runtime_networks import finish, image, vgg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lhc_triton as lhc
from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.network.grouped import GroupedConv2d
from lhc_triton.runtime.op.dense import DenseConv2d
from lhc_triton.runtime.replay.cpu_recordings import MAX_DISTURBED, Tapes, can_record


@pytest.fixture(autouse=True)
def library(native_kernel):
    if not can_record():
        pytest.skip(f"the native kernel cannot be built here: {native_kernel}")


@dataclass
class Scores:
    scores: torch.Tensor


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
    assert len(fast.tapes) == 6  # with and without inference mode


def test_the_recording_that_was_not_used_for_longest_makes_room():
    calls = []
    tapes, net = Tapes(limit=2), Net(lambda self, x: calls.append(len(x)) or x * 2)
    for size in (1, 1, 2, 2, 1, 3, 3, 4, 5):
        tapes.run(net, (torch.ones(size),))
    assert len(tapes) == 2
    del calls[:]
    for size in (1, 3, 2):
        tapes.run(net, (torch.ones(size),))
    assert calls == [2]


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


def write_elsewhere(net):
    """Write a dense weight, and bring it into oneDNN's order twice, as calls of other threads do."""

    def work():
        for _ in range(2):
            net.conv.weight.neg_()
            net.conv(torch.ones(1, 3, 8, 8))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def disturbed_net(times):
    """A network whose weight another thread writes in the middle of its recording, ``times`` times."""

    def function(self, x):
        self.calls += 1
        if self.calls % 2 == 0 and self.calls <= 2 * times:  # a change lets the next call run as it is
            write_elsewhere(self)
            y = self.conv(x)
            write_elsewhere(self)
            return y
        return self.conv(x)

    net = Net(function)
    net.calls = 0
    net.conv = DenseConv2d(torch.randn(4, 3, 3, 3), None)
    return net


def test_a_weight_that_is_written_while_it_is_recorded_is_recorded_anew():
    net, x, tapes = disturbed_net(times=3), torch.randn(1, 3, 8, 8), Tapes()
    for _ in range(6):
        tapes.run(net, (x,))
        assert (tapes.problem, len(tapes)) == ("", 0)
    for _ in range(3):
        expected = torch.nn.functional.conv2d(x, net.conv.weight)
        torch.testing.assert_close(tapes.run(net, (x,)), expected)
    assert (tapes.problem, len(tapes), net.calls) == ("", 1, 8)


def test_a_network_that_changes_during_every_recording_is_no_longer_recorded():
    net, x, tapes = disturbed_net(times=100), torch.randn(1, 3, 8, 8), Tapes()
    for call in range(2 * MAX_DISTURBED):
        assert tapes.problem == "", call
        tapes.run(net, (x,))
    assert "uses a tensor that is none of the network's" in tapes.problem
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


def test_a_failure_while_the_output_is_looked_at_ends_the_recording(monkeypatch):
    net, x, tapes = Net(lambda self, x: x * 2), torch.ones(3), Tapes()
    tapes.run(net, (x,))

    def interrupted(output):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lhc_triton.runtime.replay.cpu_recordings.tree_flatten", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tapes.run(net, (x,))
    with pytest.raises(RuntimeError, match="records nothing"):
        torch.classes.lhc.Tape().stop([], [])
    for _ in range(3):
        assert torch.equal(tapes.run(net, (x,)), x * 2)
    assert len(tapes) == 1


def test_a_thread_records_one_tape_at_a_time():
    tape = torch.classes.lhc.Tape()
    tape.start([torch.ones(2)])
    with pytest.raises(RuntimeError, match="records already"):
        torch.classes.lhc.Tape().start([torch.ones(2)])
    tape.stop([], [])


def test_the_same_tensor_twice_or_a_weight_as_input_is_not_recorded():
    net, tapes, x = Net(lambda self, x, y: x + 2 * y), Tapes(), torch.randn(5)
    assert not tapes.applies((x, x))
    for _ in range(3):
        assert torch.equal(tapes.run(net, (x, net.kept)), x + 2 * net.kept)
    assert len(tapes) == 0
    with pytest.raises(RuntimeError, match="given twice"):
        torch.classes.lhc.Tape().start([x, x])


def test_a_recording_keeps_no_activation_alive():
    kept = []

    def function(self, x):
        parts = [x + 1, x + 2]
        kept.extend(map(weakref.ref, parts))
        return torch.cat(parts)

    run_thrice(Net(function), torch.randn(5))
    assert [part() for part in kept] == [None] * 4  # of the two calls that ran in Python


@pytest.mark.parametrize("label", [False, True])
def test_operators_inside_a_label_or_a_profile_are_recorded(label):
    def function(self, x):
        with torch.profiler.record_function("mine") if label else contextlib.nullcontext():
            return x.mul(2).add_(self.kept)

    net, tapes = Net(function), Tapes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        for _ in range(2):
            tapes.run(net, (torch.randn(5),))
    x = torch.randn(5)
    assert torch.equal(tapes.run(net, (x,)), x * 2 + net.kept)
    assert len(tapes) == 1


def test_a_layer_that_is_switched_to_training_trains():
    net, x = Net(lambda self, x: self.drop(x)), torch.ones(1000)
    net.drop = nn.Dropout()
    net.eval()
    tapes, outputs = run_thrice(net, x)
    assert torch.equal(outputs[-1], x)
    net.drop.train()
    torch.manual_seed(0)
    assert not torch.equal(tapes.run(net, (x,)), x)


def test_after_a_dense_weight_changed_no_replay_brings_it_into_order_again():
    fast, x = accelerate(vgg(), image(), tune="off", backend="dense"), image()
    layer = next(layer for layer in fast.fused_layers().values() if isinstance(layer, DenseConv2d))
    for change in range(2):
        for _ in range(3):
            fast(x)
        if change == 0:
            layer.weight.mul_(1.5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        fast(x)
    names = {event.name for event in seen.events()}
    assert any("convolution" in name for name in names)
    assert not any("reorder" in name for name in names)


def test_a_move_lets_go_of_the_weights(fast):
    for _ in range(3):
        fast(image())
    packed = weakref.ref(next(m for m in fast.modules() if isinstance(m, GroupedConv2d)).packed)
    fast.to(torch.bfloat16)
    gc.collect()
    assert packed() is None


@pytest.mark.parametrize("odd", ["new_tensor", "tolist", "autocast", "dataclass"])
def test_networks_with_anything_unlisted_run_as_they_are(odd):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = vgg()

        def forward(self, x):
            if odd == "new_tensor":
                x = x - x.new_tensor([0.5])
            if odd == "tolist":
                x = x + x.abs().amax().reshape(1).tolist()[0]
            if odd == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    x = torch.matmul(x, x).float()
            y = self.body(x)
            return Scores(y) if odd == "dataclass" else y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = accelerate(Odd().eval(), image(size=16), tune="off")
    for seed in range(4):
        x = image(seed=seed, size=16)
        got, expected = fast(x), fast.network(x)
        if odd == "dataclass":
            got, expected = got.scores, expected.scores
        assert torch.equal(got, expected)


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_value_that_changes_between_its_native_readers_is_read_as_it_was(layout, recorded):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 32, 3, padding=1)
            self.a = nn.Conv2d(32, 32, 3, padding=1)
            self.b = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            x = self.first(x)
            y = self.a(x)
            x.relu_()
            return y + self.b(x)

    torch.manual_seed(0)
    model = finish(Changing())
    fast = accelerate(model, image(size=16), tune="off", backend="native", graphs=recorded)
    x = image(seed=4, size=16).contiguous(memory_format=layout)
    for _ in range(3):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of fork() beside threads
def test_a_child_forked_while_another_thread_looks_at_the_network_does_not_wait_for_it():
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Net):
        def modules(self):
            inside.set()
            go_on.wait(60)
            return super().modules()

    net, x, tapes = Slow(lambda self, x: x * 2), torch.ones(3), Tapes()
    busy = threading.Thread(target=lambda: tapes.run(net, (x,)))
    busy.start()
    try:
        assert inside.wait(60)
        child = os.fork()
        if not child:
            signal.alarm(20)  # ends a child that waits for ever
            go_on.set()
            right = all(torch.equal(tapes.run(net, (x,)), x * 2) for _ in range(3))
            os._exit(0 if right and len(tapes) == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go_on.set()
        busy.join()
    assert torch.equal(tapes.run(net, (x,)), x * 2)
