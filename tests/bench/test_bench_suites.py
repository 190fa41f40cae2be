"""Suites, on tiny layers with a timer that calls everything once."""

import dataclasses

import pytest
import torch
from torch import nn

from lhc_bench import peers, suites
from lhc_bench.cases import LayerCase
from lhc_bench.rows import read_results
from lhc_triton.runtime.timing import Timing

TINY = (
    LayerCase("tiny-cifar", "conv1", 64, 48, 6, 6),
    LayerCase("tiny-cifar", "conv2", 40, 32, 7, 5, stride=2),
)


def once(calls, rounds, warmup, device, budget_s):
    with torch.inference_mode():
        for call in calls.values():
            call()
    return {name: Timing((100.0 + place,) * rounds) for place, name in enumerate(calls)}


@pytest.fixture
def tiny(monkeypatch):
    suite = dataclasses.replace(suites.SUITES["quick"], cases=lambda: TINY)
    monkeypatch.setitem(suites.SUITES, "quick", suite)


@pytest.mark.usefixtures("tiny")
def test_a_suite_writes_right_numbers_for_each_case_and_density(tmp_path):
    seen = []
    found = suites.run_suite(
        "quick", tmp_path, lambda *step: seen.append(step[:2]), rounds=2, densities=(0.1, 1.0), timer=once
    )
    results = read_results(tmp_path / "results.json")
    assert results.to_dict() == found
    assert (tmp_path / "results.csv").is_file()
    assert [row.case for row in results.rows] == ["tiny-cifar/conv1"] * 2 + ["tiny-cifar/conv2"] * 2
    assert all(row.rel_err <= 1e-5 for row in results.rows)
    assert all(row.baseline == "eager contiguous" and row.baseline_us == 100 for row in results.rows)
    assert seen[-1] == (4, 4)


def test_the_model_suite_measures_the_whole_network(tmp_path, monkeypatch):
    monkeypatch.setitem(suites.MODEL_BATCH, "cpu", 2)
    monkeypatch.setitem(
        suites.SUITES, "cpu-models", dataclasses.replace(suites.SUITES["cpu-models"], blocks=((32, 16),))
    )
    monkeypatch.setattr("lhc_bench.networks.compiled_or_reason", lambda model, x: (None, "not here"))
    found = suites.run_suite("cpu-models", tmp_path, rounds=1, densities=(0.1,), timer=once)
    (row,) = found["rows"]
    assert (row["case"], row["baseline"]) == ("small_vgg/all", "folded eager")
    assert row["rel_err"] <= 1e-5
    skipped = {f"small_vgg: compiled {layout}": "not here" for layout in ("contiguous", "channels_last")}
    assert found["env"]["skipped_peers"] == skipped


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "suite 'nothing' is not known; choose one of quick, cpu-layers"),
        ("quick", {"rounds": 0}, "rounds is 0"),
        ("quick", {"seed": -1}, "seed is -1"),
        ("quick", {"densities": (0.0,)}, "densities are"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        suites.run_suite(name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_gpu_suite_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="suite 'gpu-layers' needs a CUDA GPU"):
        suites.run_suite("gpu-layers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dense_peers_agree():
    geometry = TINY[0].geometry(2)
    x, weight, bias = torch.randn(2, 64, 6, 6), torch.randn(48, 64, 3, 3), torch.randn(48)
    calls, skipped = peers.dense_peers(geometry, x, weight, bias)
    assert list(calls) == ["eager contiguous", "eager channels_last"]
    assert "compiled" in skipped
    first, second = (call() for call in calls.values())
    assert peers.norm_error(first, second.double()) < 1e-5


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert peers.compiled_or_reason(nn.Identity(), torch.ones(1)) == (
        None,
        "no C++ compiler: no-such-compiler is not on the PATH",
    )


def test_a_compilation_that_fails_gives_one_line(monkeypatch):
    def fail(model, **options):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(peers, "_no_compiler", lambda device: None)
    model, reason = peers.compiled_or_reason(nn.Identity(), torch.ones(1))
    assert model is None
    assert reason == "torch.compile failed: RuntimeError: first line"
