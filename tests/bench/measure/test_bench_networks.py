"""Whole networks in a suite, their memory, and narrower rivals."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from lhc_bench.measure import memory, networks, replayed, rivals, suites
from lhc_bench.measure.networks import NetworkCase
from lhc_triton.models import VGG
from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.choosing.timing import Timing
from lhc_triton.runtime.op.backends import unavailable


def once(calls, rounds, warmup, device, budget_s):
    with torch.inference_mode():
        for call in calls.values():
            call()
    return {name: Timing((100.0 + place,) * rounds) for place, name in enumerate(calls)}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """VGG16 with a few narrow layers on its own images, no compiler, and no times from elsewhere."""
    monkeypatch.setattr(
        "lhc_triton.runtime.choosing.timing_store.default_path", lambda: tmp_path / "timings.json"
    )
    monkeypatch.setattr(networks, "VGG16_WIDTHS", (32, "M", 64, "M", 64, "M"))
    monkeypatch.setattr("lhc_bench.measure.networks.compiled_or_reason", lambda model, x: (None, "not here"))


def run(monkeypatch, tmp_path, cases, **changes):
    suite = dataclasses.replace(suites.SUITES["cpu-models"], cases=lambda: cases, **changes)
    monkeypatch.setitem(suites.SUITES, "cpu-models", suite)
    return suites.run_suite("cpu-models", tmp_path, rounds=1, densities=(0.25,), timer=once)


@pytest.mark.usefixtures("small")
def test_a_network_is_measured_whole_and_without_its_classifier(monkeypatch, tmp_path):
    cases = [NetworkCase("vgg16", "cifar", 2), NetworkCase("vgg16", "cifar", 2, "features")]
    found = run(monkeypatch, tmp_path, cases, backends=("torch", "auto"))
    served = () if unavailable("native", torch.int8, "cpu") else ("int8",)
    assert [(row["case"], row["backend"]) for row in found["rows"]] == [
        (f"vgg16-cifar/{part}", backend)
        for part in ("all", "features")
        for backend in ("torch", "auto", *served, "narrow")
    ]
    for row in found["rows"]:
        assert (row["baseline"], row["kernel"]) == ("folded eager", 0)
        assert row["rel_err"] <= 1e-5 or (row["backend"] == "int8" and 1e-4 < row["rel_err"] < 0.15)
        assert row["memory_mb"] > 0
    torch_row, narrow_row = (
        next(row for row in found["rows"] if row["backend"] == name) for name in ("torch", "narrow")
    )
    assert torch_row["density"] == pytest.approx(0.25, abs=0.02)
    assert torch_row["memory_mb"] < torch_row["baseline_memory_mb"]
    # The narrower network does about the work that the masks leave, the dense first layer included.
    work = narrow_row["gmacs"] * narrow_row["time_us"] / (torch_row["gmacs"] * torch_row["time_us"])
    assert 0.5 < work < 2
    skipped = found["env"]["skipped_peers"]
    assert skipped["vgg16-cifar/all, batch 2: compiled contiguous"] == "not here"


@pytest.mark.usefixtures("small")
def test_threads_are_set_for_a_case_and_put_back(monkeypatch, tmp_path):
    before = torch.get_num_threads()
    cases = [NetworkCase("vgg16", "cifar", 1, threads=count) for count in (1, 3)]
    found = run(monkeypatch, tmp_path, cases, backends=("torch",), rivals=())
    assert [row["threads"] for row in found["rows"]] == [1, 3]
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("small")
def test_a_backend_that_cannot_serve_a_network_gives_its_reason(monkeypatch, tmp_path):
    def refuse(model, x, backend, **options):
        if backend == "torch":
            raise ValueError("layer 'features.3' cannot run")
        return accelerate(model, x, backend=backend, **options)

    accelerate = networks.accelerate
    monkeypatch.setattr(networks, "accelerate", refuse)
    cases = [NetworkCase("vgg16", "cifar", 1)]
    found = run(monkeypatch, tmp_path, cases, backends=("torch", "auto"), rivals=())
    assert [row["backend"] for row in found["rows"]] == ["auto"]
    (note,) = found["env"]["notes"]
    assert note.endswith("torch: layer 'features.3' cannot run")


def test_the_suites_hold_the_networks_of_the_papers():
    for cases in (suites.cpu_networks(), suites.gpu_networks()):
        assert {case.network for case in cases} == {"vgg16", "resnet34", "resnet50"}
        assert any(case.part == "features" for case in cases)
    batches = {case.batch for case in suites.scaled_networks() if case.model == "vgg16-cifar"}
    assert batches == {1, 2, 4, 8, 16, 32, 64}
    names = [case.name for case in suites.scaled_networks()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (NetworkCase("alexnet", "cifar", 1), "network='alexnet'"),
        (NetworkCase("vgg16", "mnist", 1), "images='mnist'"),
        (NetworkCase("resnet34", "cifar", 1, "features"), "part='features' of resnet34"),
    ],
)
def test_an_unknown_network_is_refused(case, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        case.build()


def test_a_scaled_network_keeps_its_form():
    with torch.device("meta"):
        model = NetworkCase("vgg16", "cifar", 1).build(0.5)
        residual = NetworkCase("resnet50", "imagenet", 1).build(0.32)
    assert isinstance(model, VGG)
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)][:4] == [32, 32, 64, 64]
    assert (residual.conv1.out_channels, residual.fc.in_features) == (24, 4 * 160)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("channels", [(64, 64), (64, 128), (512, 512), (3, 20)])
def test_a_narrower_layer_has_about_the_macs_asked_for(density, channels):
    inputs, outputs = rivals.narrow_channels(channels, density)
    assert inputs % 8 == 0 or inputs == channels[0]
    assert 1 <= inputs <= channels[0]
    assert 1 <= outputs <= channels[1]
    if min(channels) >= 64:
        share = inputs * outputs / math.prod(channels)
        assert share == pytest.approx(density, rel=0.3)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_im2col_product_is_the_convolution(stride):
    geometry = ConvGeometry(
        batch=2, in_channels=32, out_channels=16, height=7, width=5, kernel=(3, 3),
        stride=(stride, stride), padding=(1, 1, 1, 1),
    )  # fmt: skip
    x, weight, bias = torch.randn(2, 32, 7, 5), torch.randn(16, 32, 3, 3), torch.randn(16)
    expected = torch.conv2d(x.double(), weight.double(), bias.double(), stride, 1).relu()
    found = rivals._product(geometry, x, rivals._matrix(weight), bias)()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_memory_counts_weights_once_and_activations_at_their_most():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    model.append(model[0])
    weights = 2 * (8 * 8 * 9 + 8) * 4 / 1e6
    assert memory.tensors_mb(model) == pytest.approx(weights)
    x = torch.randn(1, 8, 64, 64)
    map_mb = x.nbytes / 1e6
    # Input of a layer and its output live at once; kernels may ask for some room of their own.
    assert 2 * map_mb <= memory.transient_mb(lambda: model(x), "cpu") < 6 * map_mb


def test_without_cuda_a_call_is_left_as_it_is():
    call = object()
    assert replayed.replayed(call, "cpu") == (call, None)


def test_a_call_that_cannot_be_recorded_runs_plainly(monkeypatch):
    def no_stream():
        raise RuntimeError("no driver\nmore")

    monkeypatch.setattr(torch.cuda, "Stream", no_stream)
    call = object()
    assert replayed.replayed(call, "cuda") == (call, "RuntimeError: no driver")
