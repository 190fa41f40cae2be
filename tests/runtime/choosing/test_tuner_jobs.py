"""Tuning many layers: order, budget, resume, sharing the work out."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recorded_bench import CPU, HALF, Recorded, layer_of, names_of

from lhc_triton.runtime.choosing import tuning_jobs
from lhc_triton.runtime.choosing.dispatch import Decision
from lhc_triton.runtime.choosing.launch_configs import DETERMINISTIC, config_key
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.choosing.tuning_jobs import Job, run_jobs, tuning_device

SIZES = (64, 128, 256, 512, 1024)
JOBS = [Job(layer_of(pixels), HALF) for pixels in SIZES]
KEYS = [config_key(job.layer, HALF, CPU, pixels) for job, pixels in zip(JOBS, SIZES, strict=True)]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def store(tmp_path):
    return TimingStore(tmp_path / "times.json")


def run(store, bench=None, jobs=JOBS, **options):
    return run_jobs(jobs, CPU, store, benches=bench or Recorded(), **options)


def test_all_jobs_are_tuned_in_their_order_and_reported(store):
    shown = []
    names = names_of(JOBS[0].layer)
    report = run(store, Recorded({names[2]: 40.0}), progress=lambda *step: shown.append(step))
    assert [row.key for row in report.rows] == list(store.read()) == KEYS
    first = report.rows[0]
    assert (first.config, first.time_us, first.heuristic_us) == (
        [int(part) for part in names[2].split(",")], 40.0, 100.0,
    )  # fmt: skip
    assert (report.jobs, report.jobs_left, report.problem) == (5, 0, "")
    assert shown == [(index, 5, "layer") for index in range(5)] + [(5, 5, "done")]
    document = json.loads(json.dumps(report.to_dict()))
    assert document["configs_timed"] == sum(row.timed for row in report.rows) > 50
    assert document["configs_failed"] == 0


def test_equal_layers_are_tuned_once(store):
    assert run(store, jobs=[*JOBS, *JOBS]).jobs == 5


def test_a_budget_ends_the_run_and_the_next_one_goes_on_there(store):
    now = [0.0]

    def pass_time(name):
        now[0] += 1.0

    first = run(store, Recorded(on_prepare=pass_time), budget_s=30, clock=lambda: now[0])
    assert [row.left for row in first.rows] == [0, 0, 6]
    assert (first.jobs_left, first.seconds) == (3, 30.0)
    rest = Recorded()
    second = run(store, rest)
    assert second.jobs_left == 0
    assert rest.prepared == [*names_of(JOBS[2].layer)[6:], *names_of(JOBS[3].layer), *names_of(JOBS[4].layer)]
    idle = Recorded()
    assert run(store, idle).to_dict()["configs_timed"] == 0
    assert idle.prepared == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_processes_of_a_run_share_the_jobs_out(store, ranks):
    shares = [run(store, rank=rank, ranks=ranks) for rank in range(ranks)]
    keys = [[row.key for row in share.rows] for share in shares]
    assert keys == [KEYS[rank::ranks] for rank in range(ranks)]
    assert set(store.read()) == set(KEYS)


def test_a_layer_that_does_not_fit_into_memory_is_passed_over_with_the_reason(store):
    class Narrow(Recorded):
        def __call__(self, layer, dtype, device):
            if layer.topology.geometry.out_pixels == 128:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self

    report = run(store, Narrow())
    assert [bool(row.problem) for row in report.rows] == [False, True, False, False, False]
    assert "out of memory" in report.rows[1].problem
    assert report.jobs_left == 1


def test_a_lost_gpu_ends_the_run_and_what_was_done_is_reported(store):
    name = names_of(JOBS[1].layer)[0]

    class Breaks(Recorded):
        def __call__(self, layer, dtype, device):
            self.lost = layer.topology.geometry.out_pixels == 128
            self.times = {name: RuntimeError("illegal memory access")} if self.lost else {}
            return self

    report = run(store, Breaks())
    assert len(report.rows) == 1
    assert report.jobs_left == 4
    assert "the GPU is lost" in report.problem
    assert store.get(KEYS[1]) == {name: "RuntimeError: illegal memory access"}


def test_a_network_s_layers_are_also_measured_against_dense_once_they_are_tuned(store, monkeypatch):
    asked = []

    def choose(layer, dtype, device, tune, given):
        asked.append((layer.topology.geometry.out_pixels, tune, given is store, len(store.get(KEYS[0]))))
        return Decision("triton", "measured", {})

    monkeypatch.setattr(tuning_jobs, "choose_backend", choose)
    report = run(store, jobs=[Job(JOBS[0].layer, HALF, choose=True), JOBS[1]])
    assert asked == [(64, "full", True, 12)]
    assert [row.backend for row in report.rows] == ["triton", ""]


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_without_time_is_refused(store, budget):
    with pytest.raises(ValueError, match="it must be positive"):
        run(store, budget_s=budget)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that torch sees two GPUs."""
    monkeypatch.delenv(DETERMINISTIC, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_each_process_of_torchrun_takes_its_gpu(gpus):
    assert tuning_device({}) == (torch.device("cuda", 0), 0, 1)
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert tuning_device(given) == (torch.device("cuda", 1), 3, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "one"}, "RANK=one, WORLD_SIZE=1, LOCAL_RANK=0: expected what torchrun sets"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1, WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}, "LOCAL_RANK=2, and torch sees 2 GPUs"),
    ],
    ids=str,
)
def test_variables_that_make_no_sense_are_refused(gpus, given, said):
    with pytest.raises(ValueError, match=said):
        tuning_device(given)


def test_without_a_gpu_or_in_deterministic_mode_there_is_nothing_to_tune(gpus, monkeypatch):
    monkeypatch.setenv(DETERMINISTIC, "1")
    with pytest.raises(ValueError, match=f"{DETERMINISTIC}=1 rules measured choices out; unset it"):
        tuning_device({})
    monkeypatch.delenv(DETERMINISTIC)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="tune needs a CUDA GPU, and torch sees none"):
        tuning_device({})


def _tune_share(path: str, rank: int) -> None:
    run_jobs(JOBS, CPU, TimingStore(path), rank=rank, ranks=2, benches=Recorded())


def test_two_processes_that_tune_at_once_lose_nothing(store):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_tune_share, args=(str(store.path), rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = store.read()
    assert set(found) == set(KEYS)
    assert all(len(records) >= 10 for records in found.values())


def test_a_writer_that_is_killed_leaves_the_file_whole_and_unlocked(store):
    store.put("kept", {"torch": 1.0})
    code = (
        "import os, signal\n"
        "from lhc_triton.runtime.choosing.timing_store import TimingStore\n"
        "def killed(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = killed\n"
        f"TimingStore({str(store.path)!r}).put('lost', {{'torch': 2.0}})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT)
    assert done.returncode < 0
    assert len(list(store.path.parent.glob(".*.tmp"))) == 1
    assert store.read() == {"kept": {"torch": 1.0}}
    store.put("next", {"torch": 3.0})
    assert set(store.read()) == {"kept", "next"}
    assert not list(store.path.parent.glob(".*.tmp"))
    assert os.access(store.path, os.W_OK)
