"""Who runs a layer: model, store or measurement."""

import dataclasses

import pytest
import torch
from op_problems import Problem

from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.choosing import dispatch
from lhc_triton.runtime.choosing.calibration import cost_model
from lhc_triton.runtime.choosing.dispatch import (
    auto_backend,
    backend_status,
    choose_backend,
    known_times,
    measure,
    supports,
)
from lhc_triton.runtime.choosing.timing_store import TimingStore, layer_key

CPU = torch.device("cpu")
LAYER = Problem(ConvGeometry(1, 16, 16, 6, 6)).layer
KEY = layer_key(LAYER, torch.float32, CPU)


@pytest.fixture
def store(tmp_path):
    return TimingStore(tmp_path / "times.json")


@pytest.fixture
def without_native(monkeypatch):
    """A machine on which the native kernel cannot be built."""
    monkeypatch.setattr("lhc_kernels.cpu.problem", lambda: "no C++ compiler")


@pytest.fixture
def measured(monkeypatch, without_native):
    """Stand in for the measurement; the list holds what it was asked."""
    calls = []

    def fake(layer, dtype, device, backends, configs):
        calls.append(tuple(backends))
        return {**dict.fromkeys(backends, 10.0), "dense": 30.0}

    monkeypatch.setattr(dispatch, "measure", fake)
    return calls


def choose(tune, store, layer=LAYER, dtype=torch.float32, **options):
    return choose_backend(layer, dtype, CPU, tune, store, **options)


def test_off_is_the_cost_model_s_choice(store, measured):
    store.put(KEY, {"torch": 1.0, "dense": 9.0})
    for backend in ("dense", "torch", "reference"):
        layer = dataclasses.replace(LAYER, backend=backend, reason="said the model")
        found = choose("off", store, layer)
        assert (found.backend, found.reason, found.measured_us) == (backend, "said the model", {})
    assert not measured


@pytest.mark.parametrize(
    ("times", "backend"),
    [
        ({"torch": 10.0, "dense": 30.0}, "torch"),
        ({"torch": 30.0, "dense": 10.0}, "dense"),
        ({"torch": 10.0, "dense": 10.0}, "dense"),
    ],
)
def test_cached_takes_the_faster_of_the_stored_times(store, measured, times, backend):
    store.put(KEY, times)
    found = choose("cached", store)
    assert (found.backend, found.measured_us) == (backend, times)
    assert f"{times['dense'] / times['torch']:.2f}x the speed of dense" in found.reason
    assert not measured


def test_cached_without_both_times_is_the_model_s_choice(store, measured):
    assert choose("cached", store).reason == LAYER.reason
    store.put(KEY, {"torch": 1.0})
    assert choose("cached", store).reason == LAYER.reason
    assert not measured


def test_full_measures_once_and_stores(store, measured):
    found = choose("full", store)
    assert (found.backend, found.measured_us) == ("torch", {"torch": 10.0, "dense": 30.0})
    assert choose("full", store) == found == choose("cached", store)
    assert measured == [("torch",)]


def test_auto_takes_the_native_kernel_where_it_can_serve(monkeypatch):
    monkeypatch.setattr("lhc_kernels.cpu.problem", lambda: None)
    assert auto_backend(torch.float32, CPU) == "native"
    assert cost_model("auto", torch.float32, CPU, "off").sparse_backend == "native"
    assert cost_model("torch", torch.float32, CPU, "off").sparse_backend == "torch"
    assert auto_backend(torch.float64, CPU) == "torch"


@pytest.mark.usefixtures("without_native")
def test_without_a_compiler_torch_takes_the_native_kernel_s_place():
    assert auto_backend(torch.float32, CPU) == "torch"
    assert cost_model("auto", torch.float32, CPU, "off").sparse_backend == "torch"
    wide = Problem(ConvGeometry(1, 256, 256, 28, 28, (3, 3)), in_block=64, out_block=64, density=0.1).layer
    planned = dataclasses.replace(wide, backend="native", reason="elsewhere")
    found = choose("off", None, planned)
    assert found.backend == "torch"
    assert "faster than dense" in found.reason


def test_candidates_are_all_measured(store, measured):
    choose("full", store, candidates=("dense", "reference", "torch", "triton", "native"))
    assert measured == [("reference", "torch")]


def test_where_no_backend_can_serve_dense_stays_and_says_why(store, measured, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = choose("full", store, candidates=("triton",))
    assert found.backend == "dense"
    assert "needs a CUDA device" in found.reason
    assert choose_backend(LAYER, torch.float32, "meta").backend == "dense"
    assert choose("full", store, dtype=torch.int8).backend == "dense"
    planned = dataclasses.replace(LAYER, backend="triton")
    assert choose("off", store, planned).backend == "dense"
    assert not measured


def test_a_store_that_cannot_be_written_is_a_warning(tmp_path, measured):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="measured times are not kept"):
        assert choose("full", TimingStore(tmp_path / "file" / "t.json")).backend == "torch"


@pytest.mark.usefixtures("without_native")
def test_the_user_s_store_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path))
    TimingStore(tmp_path / "timings.json").put(KEY, {"torch": 1.0, "dense": 2.0})
    assert choose("cached", None).measured_us == {"torch": 1.0, "dense": 2.0}


def test_an_unknown_way_to_tune_is_refused(store):
    with pytest.raises(ValueError, match="tune is 'fast'; supported are off, cached, full"):
        choose("fast", store)


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_times_every_backend_and_dense(padding, dtype):
    layer = Problem(ConvGeometry(1, 16, 16, 6, 6, padding=padding)).layer
    times = measure(layer, dtype, CPU, ["reference", "torch"], rounds=1, budget_s=None)
    assert set(times) == {"reference", "torch", "dense"}
    assert all(time > 0 for time in times.values())


def test_supports_names_the_reason_or_nothing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in ("dense", "reference", "torch"):
        assert supports(backend, LAYER, torch.float32, "cpu") is None
        assert supports(backend, LAYER, torch.float64, "cuda") is None
    assert supports("triton", LAYER, torch.float16, "cuda") is None
    assert "does not serve float64" in supports("triton", LAYER, torch.float64, "cuda")
    assert "needs a CUDA device" in supports("triton", LAYER, torch.float16, "cpu")
    assert "does not serve device type" in supports("native", LAYER, torch.float32, "cuda")
    assert "is unknown" in supports("cudnn", LAYER, torch.float32, "cuda")
    assert 'device type "mps"' in supports("torch", LAYER, torch.float32, "mps")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supports("triton", LAYER, torch.float32, "cpu") is None


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_status_has_a_line_for_every_backend(device):
    rows = backend_status(device)
    assert [row["backend"] for row in rows] == ["dense", "reference", "torch", "native", "triton"]
    assert all(row["state"] for row in rows)


def test_known_times_are_those_of_the_store_and_nothing_is_measured(store, measured):
    assert known_times([LAYER], torch.float32, CPU, store) == {LAYER.name: {}}
    assert not store.path.exists()
    store.put(KEY, {"torch": 30.0, "dense": 10.0, "native": "it does not run"})
    other = dataclasses.replace(LAYER, topology=dataclasses.replace(LAYER.topology, name="other"))
    wider = dataclasses.replace(LAYER, tile_width=2 * LAYER.tile_width)
    found = known_times([LAYER, other], torch.float32, "cpu", store)
    assert found == {name: {"torch": 30.0, "dense": 10.0} for name in (LAYER.name, "other")}
    assert known_times([wider], torch.float32, CPU, store) == {LAYER.name: {}}
    assert known_times([LAYER], torch.float16, CPU, store) == {LAYER.name: {}}
    assert not measured
