"""Tuning one layer: what is measured, what is dropped, what is remembered."""

import dataclasses
import math

import pytest
import torch
from recorded_bench import CPU, HALF, Recorded, layer_of, names_of

from lhc_triton.runtime.choosing import layer_tuner
from lhc_triton.runtime.choosing.launch_configs import config_key
from lhc_triton.runtime.choosing.layer_tuner import ROUNDS, tune_layer
from lhc_triton.runtime.choosing.timing import race
from lhc_triton.runtime.choosing.timing_store import TimingStore

LAYER = layer_of()
NAMES = names_of(LAYER)
KEY = config_key(LAYER, HALF, CPU, 64)


@pytest.fixture
def store(tmp_path):
    return TimingStore(tmp_path / "times.json")


def tune(store, bench, **options):
    return tune_layer(LAYER, HALF, CPU, store, benches=bench, **options)


def test_every_candidate_gets_one_record_in_the_order_of_the_candidates(store):
    bench = Recorded({NAMES[3]: 10.0})
    done = tune(store, bench)
    assert bench.prepared == NAMES
    assert (done.key, done.timed, done.failed, done.left) == (KEY, 12, 0, 0)
    assert store.get(KEY) == {**dict.fromkeys(NAMES, 100.0), NAMES[3]: 10.0}


@pytest.mark.parametrize(("batch", "measured"), [(1, 1), (5, 7), (7, 7), (8, 14)])
def test_a_bucket_is_measured_at_its_largest_batch_so_that_its_times_compare(store, batch, measured):
    geometry = dataclasses.replace(LAYER.topology.geometry, batch=batch, height=3, width=3)
    layer = dataclasses.replace(LAYER, topology=dataclasses.replace(LAYER.topology, geometry=geometry))
    asked = []

    class Watched(Recorded):
        def __call__(self, layer, dtype, device):
            asked.append(layer.topology.geometry.batch)
            return self

    tune_layer(layer, HALF, CPU, store, benches=Watched())
    assert asked == [measured]


def test_what_is_recorded_is_not_measured_again_and_a_new_config_only_times_itself(store):
    tune(store, Recorded(), limit=5)
    first = store.get(KEY)
    bench = Recorded(other=50.0)
    assert tune(store, bench, limit=7).timed == 2
    assert bench.prepared == NAMES[5:7]
    assert store.get(KEY) == {**first, NAMES[5]: 50.0, NAMES[6]: 50.0}
    idle = Recorded()
    done = tune(store, idle, limit=7)
    assert (done.timed, done.left, idle.prepared) == (0, 0, [])


def test_a_clearly_slower_config_leaves_early_and_keeps_its_time(store):
    bench = Recorded({NAMES[1]: 80.0, NAMES[2]: 90.0})
    tune(store, bench)
    assert bench.samples[NAMES[1]] == bench.samples[NAMES[2]] == ROUNDS
    assert bench.samples[NAMES[0]] == 3
    assert store.get(KEY)[NAMES[0]] == 100.0


def test_one_slow_sample_does_not_throw_a_config_out(store):
    bench = Recorded({NAMES[0]: [500.0, 10.0], NAMES[1]: 10.0})
    tune(store, bench)
    assert bench.samples[NAMES[0]] == ROUNDS
    assert store.get(KEY)[NAMES[0]] == 10.0


def test_failing_and_wrong_configs_are_recorded_with_the_reason_and_never_tried_again(store):
    bench = Recorded(
        {
            NAMES[0]: RuntimeError("no shared memory\nmore"),
            NAMES[1]: ArithmeticError("wrong result: norm error 3.0e-01"),
            NAMES[2]: [7.0, ValueError("launch failed")],
        }
    )
    done = tune(store, bench)
    assert (done.timed, done.failed) == (9, 3)
    found = store.get(KEY)
    assert found[NAMES[0]] == "RuntimeError: no shared memory"
    assert found[NAMES[1]] == "ArithmeticError: wrong result: norm error 3.0e-01"
    assert found[NAMES[2]] == "ValueError: launch failed"
    again = Recorded()
    tune(store, again)
    assert again.prepared == []


def test_a_layer_whose_configs_all_fail_is_not_an_error(store):
    done = tune(store, Recorded(dict.fromkeys(NAMES, RuntimeError("no"))))
    assert (done.timed, done.failed, done.left) == (0, 12, 0)


def test_without_memory_a_config_is_left_for_another_time(store):
    done = tune(store, Recorded({NAMES[4]: torch.OutOfMemoryError("CUDA out of memory")}))
    assert (done.timed, done.failed, done.left) == (11, 0, 1)
    assert NAMES[4] not in store.get(KEY)


def test_after_the_deadline_no_config_is_compiled_and_those_that_are_ready_are_timed(store):
    now = [0.0]

    def pass_time(name):
        now[0] += 1.0

    bench = Recorded(on_prepare=pass_time)
    done = tune(store, bench, deadline=4.0, clock=lambda: now[0])
    assert (done.timed, done.left) == (4, 8)
    assert list(store.get(KEY)) == NAMES[:4]
    rest = Recorded()
    assert tune(store, rest).left == 0
    assert rest.prepared == NAMES[4:]


def test_a_config_that_takes_the_gpu_down_is_recorded_and_ends_the_run(store):
    bench = Recorded({NAMES[1]: RuntimeError("illegal memory access")}, lost=True)
    with pytest.raises(RuntimeError, match=r"the GPU is lost .* start again"):
        tune(store, bench)
    assert store.get(KEY) == {NAMES[1]: "RuntimeError: illegal memory access"}
    assert bench.prepared == NAMES[:2]


def test_a_gpu_that_is_lost_while_timing_is_not_held_against_the_configs(store):
    bench = Recorded({NAMES[1]: [5.0, RuntimeError("illegal memory access")], NAMES[2]: 5.0}, lost=True)
    with pytest.raises(RuntimeError, match="the GPU is lost"):
        tune(store, bench)
    found = store.get(KEY)
    assert NAMES[1] not in found
    assert all(isinstance(record, float) for record in found.values())


def test_inside_a_capture_tuning_is_refused_with_what_to_do(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    bench = Recorded()
    with pytest.raises(RuntimeError, match=r"inside a CUDA graph capture: run `lhc-triton tune`.* before"):
        tune(store, bench)
    assert bench.prepared == []


def test_a_store_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        tune(TimingStore(tmp_path / "file" / "t.json"), Recorded())


def test_a_damaged_store_is_tuned_anew(store):
    store.path.write_text("{")
    with pytest.warns(UserWarning, match="is skipped"):
        tune(store, Recorded())
    assert len(store.get(KEY)) == 12


def test_a_race_interleaves_in_another_order_each_round_and_in_the_same_orders_again():
    order = []

    def sampler(name):
        def sample():
            order.append(name)
            return 1.0

        return sample

    assert race({name: sampler(name) for name in "abc"}, rounds=6) == {"a": 1.0, "b": 1.0, "c": 1.0}
    turns = ["".join(order[first : first + 3]) for first in range(0, 18, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 2
    race({name: sampler(name) for name in "abc"}, rounds=6)
    assert order[:18] == order[18:]
    assert race({}, rounds=3) == {}


class Clockwork:
    """A stand-in for the timer of GPU graphs: runs the call once and gives a time."""

    def __init__(self, device):
        pass

    def sampler(self, function):
        function()
        return lambda: 5.0


@pytest.mark.parametrize("fault", ["none", "wrong", "unwritten"])
def test_the_gpu_bench_checks_each_config_before_it_is_timed(monkeypatch, fault):
    original = layer_tuner.Workload.sparse

    def sparse(self, backend, config=()):
        call = original(self, "torch")

        def broken():
            y = call()
            if fault == "wrong":
                return y * 1.5
            if fault == "unwritten":
                y[-1, :, -1] = math.nan
            return y

        return broken

    monkeypatch.setattr(layer_tuner.Workload, "sparse", sparse)
    monkeypatch.setattr(layer_tuner, "ColdTimer", Clockwork)
    bench = layer_tuner.GpuBench(LAYER, torch.float32, CPU)
    if fault == "none":
        assert bench.prepare([])() == 5.0
    else:
        with pytest.raises(ArithmeticError, match="wrong result"):
            bench.prepare([])
