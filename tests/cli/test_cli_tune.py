"""The tune command: what it tunes, what it prints, and how it refuses."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from lhc_triton.runtime.choosing import compiled_ahead, tuning_jobs
from lhc_triton.runtime.choosing.dispatch import Decision
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.choosing.tuning_jobs import run_jobs


class FlatBench:
    """Every config takes 100 us, the narrowest 50."""

    def __call__(self, layer, dtype, device):
        return self

    def prepare(self, config):
        return lambda: 50.0 if config[1] == 16 else 100.0

    def check(self):
        pass


@pytest.fixture
def tune(monkeypatch, run, tmp_path):
    """Run `lhc-triton tune` as its entry point would; returns exit code, stdout and stderr."""
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path / "cache"))

    def call(*arguments):
        done = run("tune", *arguments)
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture
def gpu(monkeypatch):
    """Let the CPU stand for a GPU whose kernels need no time to run."""
    monkeypatch.setattr(tuning_jobs, "tuning_device", lambda: (torch.device("cpu"), 0, 1))
    monkeypatch.setattr(compiled_ahead, "compiled_ahead", lambda *_, **__: nullcontext(FlatBench()))
    monkeypatch.setattr(tuning_jobs, "choose_backend", lambda *_: Decision("triton", "", {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_there_is_one_clear_line(tune):
    assert tune("lhc") == (2, "", "lhc-triton: tune needs a CUDA GPU, and torch sees none\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either a network or --suite"),
        (("lhc", "--suite", "standard"), "give either a network or --suite"),
        (("nowhere",), "no network 'nowhere'"),
        (("dense", "--batch", "1"), "no layer of the network has a learned or sparse topology"),
        (("--suite", "grand"), "suite 'grand' is not known; choose one of standard"),
        (("--suite", "standard", "--batch", "0"), "batch is 0"),
        (("lhc", "--batch", "-1"), "batch is -1"),
        (("lhc", "--dtype", "int4"), "dtype 'int4' is not known"),
        (("lhc", "--batch", "1", "--budget", "0"), "budget is 0.0 seconds; it must be positive"),
        (("lhc", "--batch", "1", "--store", "/proc/nowhere/times.json"), "/proc/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tune, gpu, arguments, said):
    code, out, err = tune(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("lhc-triton: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert said in lines[0]
    assert "Traceback" not in err


def test_a_network_is_tuned_into_the_store_that_accelerate_reads(tune, gpu):
    code, out, err = tune("lhc", "--batch", "1", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["jobs_left"] == report["configs_failed"] == 0
    assert report["configs_timed"] > report["jobs"] > 0
    assert {row["backend"] for row in report["rows"]} == {"triton"}
    assert set(TimingStore().read()) == {row["key"] for row in report["rows"]}
    again = json.loads(tune("lhc", "--batch", "1", "--json")[1])
    assert again["configs_timed"] == 0


def test_a_table_shows_what_was_found_for_people(tune, gpu, tmp_path):
    store = tmp_path / "own.json"
    code, out, err = tune("lhc", "--batch", "1", "--store", str(store))
    assert code == 0, err
    assert "heuristic us" in out
    assert f"records: {store}" in out
    assert TimingStore(store).read()


def test_what_the_budget_leaves_is_said(tune, gpu, monkeypatch):
    slow = iter(float(second) for second in range(10_000))
    timed = partial(run_jobs, clock=lambda: next(slow))
    monkeypatch.setattr(tuning_jobs, "run_jobs", timed)
    code, out, _ = tune("lhc", "--batch", "1", "--budget", "9")
    assert code == 0
    assert "are left, run it again" in out


def test_the_standard_suite_is_cut_by_its_budget_from_the_end(gpu):
    from lhc_bench.measure.tuning_suite import DENSITIES, TILE_WIDTHS, suite_jobs

    jobs = suite_jobs("standard", torch.float16)
    densities = [round(job.layer.topology.density, 1) for job in jobs]
    assert densities[0] == DENSITIES[0]
    assert densities[-1] == DENSITIES[-1]
    assert set(TILE_WIDTHS) <= {job.layer.tile_width for job in jobs}
    batches = {job.layer.topology.geometry.batch for job in jobs}
    assert batches == {64, 256}
    assert {j.layer.topology.geometry.batch for j in suite_jobs("standard", torch.float16, batch=2)} == {2}
    exact = [job.layer for job in jobs if job.layer.topology.out_block == 128]
    assert exact
    assert all(t.entries == layer.topology.pattern_of(t.groups[0]) for layer in exact for t in layer.tiles)


def test_plot_draws_the_landscape_of_a_store(tune, gpu, run, tmp_path):
    store = tmp_path / "own.json"
    tune("lhc", "--batch", "1", "--store", str(store))
    done = run("plot", store, "--out", tmp_path / "out", "--json")
    assert not done.returncode
    (picture,) = json.loads(done.stdout)["pictures"]
    assert Path(picture).name.startswith("landscape-")
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
