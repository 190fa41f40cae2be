"""The CPU's cost model, fitted to the machine by probe layers."""

import dataclasses

import pytest
import torch

from lhc_triton.planning.cost import COST_MODELS
from lhc_triton.runtime.choosing import calibration
from lhc_triton.runtime.choosing.calibration import PROBES, calibrated, cost_model
from lhc_triton.runtime.choosing.timing_store import TimingStore

CPU = torch.device("cpu")
MODEL = COST_MODELS["torch"]


@pytest.fixture
def store(tmp_path):
    return TimingStore(tmp_path / "times.json")


@pytest.fixture
def probed(monkeypatch):
    """Let dense take twice, sparse three times as long as predicted; the list holds what was measured."""
    plans = []

    def fake(plan, backend, dtype):
        plans.append(plan.name)
        return {"dense": 2 * plan.predicted_us["dense"], backend: 3 * plan.predicted_us[backend]}

    monkeypatch.setattr(calibration, "_measured", fake)
    return plans


def test_a_model_is_scaled_by_what_was_measured(store, probed):
    found = calibrated(MODEL, torch.float32, store)
    assert len(probed) == len(PROBES)
    for (_, rate), (_, shipped) in zip(found.dense_gmacs, MODEL.dense_gmacs, strict=True):
        assert rate == pytest.approx(shipped / 2)
    for name in ("launch_us", "tile_us", "entry_us"):
        assert getattr(found, name) == pytest.approx(3 * getattr(MODEL, name))
    assert found.memory_gbs == MODEL.memory_gbs
    assert found.source.startswith("calibrated on")


def test_a_machine_is_measured_once(store, probed):
    first = calibrated(MODEL, torch.float32, store)
    assert calibrated(MODEL, torch.float32, store) == first
    assert len(probed) == len(PROBES)
    calibrated(MODEL, torch.bfloat16, store)
    assert len(probed) == 2 * len(PROBES)


def test_a_changed_kernel_is_measured_again(store, probed, monkeypatch):
    calibrated(MODEL, torch.float32, store)
    monkeypatch.setattr("lhc_kernels.native_source_digest", lambda: "another")
    calibrated(MODEL, torch.float32, store)
    assert len(probed) == 2 * len(PROBES)


@pytest.mark.parametrize("tune", ["off", "cached"])
def test_off_and_the_deterministic_mode_take_the_model_as_it_ships(store, probed, tune, monkeypatch):
    if tune == "cached":
        monkeypatch.setenv("LHC_TRITON_DETERMINISTIC", "1")
    assert cost_model("torch", torch.float32, CPU, tune, store) == MODEL
    assert cost_model("triton", torch.float16, torch.device("cuda"), "cached", store) == COST_MODELS["triton"]
    assert not probed


def test_a_store_that_cannot_be_written_is_a_warning(tmp_path, probed):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the calibration of the CPU is not kept"):
        calibrated(MODEL, torch.float32, TimingStore(tmp_path / "file" / "t.json"))


def test_the_probes_are_measured_for_real(store):
    found = calibrated(MODEL, torch.float32, store)
    assert dataclasses.replace(found, source="") != dataclasses.replace(MODEL, source="")
    assert len(store.read()) == len(PROBES)
    assert all(set(times) == {"dense", "torch"} for times in store.read().values())
