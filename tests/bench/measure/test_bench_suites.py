"""Suites, on tiny layers with a timer that calls everything once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lhc_bench.measure import layers, peers, suites
from lhc_bench.measure.cases import LayerCase
from lhc_bench.measure.rows import read_results
from lhc_bench.measure.setting import Machine, Setting, measure
from lhc_kernels.configs import VARIANTS, KernelConfig
from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.planner import plan_layer
from lhc_triton.planning.schema import LayerTopology
from lhc_triton.runtime.choosing.dispatch import Decision
from lhc_triton.runtime.choosing.timing import Timing
from lhc_triton.runtime.choosing.timing_store import TimingStore

TINY = (
    LayerCase("tiny-cifar", "conv1", 64, 48, 6, 6),
    LayerCase("tiny-cifar", "conv2", 40, 32, 7, 5, stride=2),
)


def once(calls, rounds, warmup, device, budget_s):
    with torch.inference_mode():
        for call in calls.values():
            call()
    return {name: Timing((100.0 + place,) * rounds) for place, name in enumerate(calls)}


def with_suite(monkeypatch, name, **changes):
    monkeypatch.setitem(suites.SUITES, name, dataclasses.replace(suites.SUITES[name], **changes))


@pytest.fixture
def tiny(monkeypatch):
    with_suite(monkeypatch, "quick", cases=lambda: TINY, backends=("torch", "auto"))


@pytest.mark.usefixtures("tiny")
def test_a_suite_writes_right_numbers_for_each_case_and_density(tmp_path):
    seen = []
    found = suites.run_suite(
        "quick", tmp_path, lambda *step: seen.append(step[:2]), rounds=2, densities=(0.1, 1.0), timer=once,
        compiled=False,
    )  # fmt: skip
    results = read_results(tmp_path / "results.json")
    assert results.to_dict() == found
    assert (tmp_path / "results.csv").is_file()
    rows = [row for row in results.rows if row.backend == "torch"]
    assert [row.case for row in rows] == ["tiny-cifar/conv1"] * 2 + ["tiny-cifar/conv2"] * 2
    assert len(results.rows) == 8
    assert all(row.rel_err <= 1e-5 for row in results.rows)
    assert all(row.baseline == "eager contiguous" and row.baseline_us == 100 for row in results.rows)
    macs = rows[1].batch * 64 * 48 * 9 * 6 * 6
    assert rows[1].gmacs == pytest.approx(macs / rows[1].time_us / 1e3)
    assert rows[1].peak_share == pytest.approx(rows[1].gmacs / found["env"]["gmacs"])
    assert (found["env"]["rounds_made"], found["env"]["notes"]) == ([2, 2], [])
    assert seen[-1] == (4, 4)


@pytest.mark.usefixtures("tiny")
def test_a_batch_may_be_chosen(tmp_path):
    options = {"rounds": 1, "densities": (0.2,), "timer": once, "compiled": False}
    found = suites.run_suite("quick", tmp_path, batch=3, **options)
    assert {row["batch"] for row in found["rows"]} == {3}
    with pytest.raises(ValueError, match="batch is 0; it must be at least 1"):
        suites.run_suite("quick", tmp_path, batch=0, **options)


@pytest.mark.parametrize("fails", [False, True])
def test_layers_are_timed_with_an_empty_cache_too_where_there_is_a_timer_for_that(fails):
    def cold(calls):
        if fails:
            raise RuntimeError("compiled cannot be timed: no memory")
        return {name: 500.0 + place for place, name in enumerate(calls)}

    setting = Setting(
        "cpu", torch.float32, ("torch",), 1, 0, False, once, TimingStore(Path("none")), cold_timer=cold
    )
    subject = layers.LayerSubject.prepare(TINY[0], 2, setting)
    found = measure(subject, (32, 16), 0.2, setting, Machine(1e3, 10.0, 10.0))
    (row,) = found.rows
    forms = len(subject.peers)
    assert (row.cold_baseline_us, row.cold_us) == ((None, None) if fails else (500.0, 500.0 + forms))
    assert [reason for _, reason in found.notes] == (
        ["not timed with a cold L2: RuntimeError: compiled cannot be timed: no memory"] if fails else []
    )
    assert row.baseline_us == 100.0


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("taken", ["dense", "torch"])
def test_auto_is_what_dispatch_takes(tmp_path, monkeypatch, taken):
    monkeypatch.setattr(layers, "choose_backend", lambda *arguments: Decision(taken, "for the test", {}))
    timed = []

    def naming(calls, **options):
        timed.extend(calls)
        return once(calls, **options)

    found = suites.run_suite("quick", tmp_path, rounds=1, densities=(0.2,), timer=naming, compiled=False)
    forms = {name.removeprefix("auto ") for name in timed if name.startswith("auto ")}
    assert all(("dense" in form) == (taken == "dense") for form in forms)
    assert {row["backend"] for row in found["rows"]} == {"torch", "auto"}


@pytest.mark.usefixtures("tiny")
def test_a_suite_stops_at_its_time_limit_and_names_what_it_left_out(tmp_path, monkeypatch):
    with_suite(monkeypatch, "quick", limit_s=0.0)
    found = suites.run_suite("quick", tmp_path, rounds=1, densities=(0.1, 1.0), timer=once, compiled=False)
    assert {(row["case"], row["density"] < 1) for row in found["rows"]} == {("tiny-cifar/conv1", True)}
    assert found["env"]["notes"] == ["tiny-cifar/conv1 and 1 more: left out: the suite's 0 s are over"]


def test_a_reason_is_told_once(tmp_path, monkeypatch):
    with_suite(monkeypatch, "quick", cases=lambda: TINY[:1], backends=("triton", "torch"))
    found = suites.run_suite("quick", tmp_path, rounds=1, densities=(0.1, 1.0), timer=once, compiled=False)
    (note,) = found["env"]["notes"]
    assert note.startswith("tiny-cifar/conv1, blocks 32x16, density 0.1 and 1 more: triton: ")


def test_the_gpus_suite_of_layers_runs_on_a_cpu_with_its_rivals(tmp_path, monkeypatch):
    with_suite(
        monkeypatch, "gpu-layers", device="cpu", dtype=torch.float32, cases=lambda: TINY[:1],
        backends=("torch",), blocks=((32, 16), (32, 48)),
    )  # fmt: skip
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda matrix: matrix)
    monkeypatch.setattr(Tensor, "to_sparse_bsr", lambda matrix, block: matrix)
    found = suites.run_suite(
        "gpu-layers", tmp_path, rounds=1, densities=(0.1, 0.5, 1.0), timer=once, compiled=False
    )
    assert found["env"]["notes"] == []
    made = [(row["backend"], row["out_block"], round(row["density"], 1)) for row in found["rows"]]
    assert sorted(made) == sorted(
        [("torch", 16, 0.1), ("torch", 16, 0.5), ("torch", 16, 1.0), ("torch", 48, 0.1), ("torch", 48, 0.5)]
        + [("bsr", block, density) for block in (16, 48) for density in (0.1, 0.5)]
        + [("narrow", 16, 0.1), ("narrow", 16, 0.5), ("2:4", 16, 0.5)]
    )


def test_a_rival_that_torch_refuses_gives_its_reason(tmp_path, monkeypatch):
    with_suite(
        monkeypatch, "gpu-layers", device="cpu", dtype=torch.float32, cases=lambda: TINY[:1],
        backends=("torch",), rivals=("2:4",), blocks=((32, 16),),
    )  # fmt: skip
    found = suites.run_suite("gpu-layers", tmp_path, rounds=1, densities=(0.5,), timer=once, compiled=False)
    (note,) = found["env"]["notes"]
    assert "2:4: RuntimeError: " in note
    assert [row["backend"] for row in found["rows"]] == ["torch"]


@pytest.mark.usefixtures("tiny")
def test_a_backend_that_breaks_gives_its_reason_and_the_others_their_rows(tmp_path, monkeypatch):
    def break_down(plan, *arguments):
        if plan.backend == "torch":
            raise RuntimeError("out of registers\nand more")
        return pack(plan, *arguments)

    pack = layers.pack
    monkeypatch.setattr(layers, "pack", break_down)
    monkeypatch.setattr(layers, "choose_backend", lambda *arguments: Decision("dense", "for the test", {}))
    found = suites.run_suite("quick", tmp_path, rounds=1, densities=(0.1,), timer=once, compiled=False)
    assert found["env"]["notes"] == [
        "tiny-cifar/conv1, blocks 32x16, density 0.1 and 1 more: torch: RuntimeError: out of registers"
    ]
    assert {row["backend"] for row in found["rows"]} == {"auto"}


@pytest.mark.usefixtures("tiny")
def test_only_the_named_cases_are_measured(tmp_path):
    found = suites.run_suite(
        "quick", tmp_path, rounds=1, densities=(0.1,), compiled=False, timer=once, only="conv2"
    )
    assert {row["case"] for row in found["rows"]} == {"tiny-cifar/conv2"}


def test_each_variant_of_the_kernel_is_timed_with_a_config_of_its_own(tmp_path, monkeypatch):
    case = next(case for case in suites.question_cases() if case.layer == "conv4_2")
    topology = LayerTopology.from_mask(
        case.name, case.geometry(64), 32, 128, np.ones((4, 16, 3, 3), dtype=bool)
    )
    plan = plan_layer(topology, CostModel.for_device("cuda"), backend="triton", dtype="float16")
    device = torch.device("cpu")  # stands for an H100 there
    for name in ("grid", "persistent", "box"):
        config = layers.variant_config(plan, torch.float16, device, name)
        assert KernelConfig.from_list(config).variant == name
    with pytest.raises(ValueError, match="candidate configs is of the variant 'spiral'"):
        layers.variant_config(plan, torch.float16, device, "spiral")
    assert all(name.partition(" ")[2] in VARIANTS for name in suites.QUESTIONED)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "suite 'nothing' is not known; choose one of quick, cpu-layers"),
        ("quick", {"rounds": 0}, "rounds is 0"),
        ("quick", {"seed": -1}, "seed is -1"),
        ("quick", {"densities": (0.0,)}, "densities are"),
        ("quick", {"only": "conv9"}, "no case of suite 'quick' has 'conv9' in its name; the cases are vgg16"),
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


def test_a_compiled_peer_agrees_with_the_eager_one():
    layer = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    x = torch.randn(1, 8, 5, 5)
    compiled, reason = peers.compiled_or_reason(layer, x)
    assert reason is None
    with torch.inference_mode():
        assert peers.norm_error(compiled(x), layer(x)) < 1e-5


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
