"""How dispatch and accelerate use tuned launch configs; CUDA is only pretended."""

import dataclasses

import pytest
import torch
from recorded_bench import CPU, HALF, Recorded, layer_of, names_of
from runtime_networks import image, vgg

from lhc_triton.planning.backends import BACKENDS
from lhc_triton.runtime.choosing import dispatch, launch_configs
from lhc_triton.runtime.choosing.dispatch import choose_backend, launch_config
from lhc_triton.runtime.choosing.launch_configs import config_key, config_name
from lhc_triton.runtime.choosing.layer_tuner import tune_layer
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.network.accelerate import accelerate

LAYER = dataclasses.replace(layer_of(), backend="triton", reason="said the model")
NAMES = names_of(LAYER)
KEY = config_key(LAYER, HALF, CPU, 64)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv(launch_configs.DETERMINISTIC, raising=False)
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # "triton" then serves the CPU
    return TimingStore()


@pytest.fixture
def measured(monkeypatch):
    """Stand in for the measurement against dense; the list holds the configs it was asked for."""
    configs = []

    def fake(layer, dtype, device, backends, given):
        configs.append(config_name(given["triton"]))
        return {"triton": 10.0, "dense": 30.0}

    monkeypatch.setattr(dispatch, "measure", fake)
    return configs


def decide(tune, store):
    return choose_backend(LAYER, HALF, CPU, tune, store, candidates=("triton",))


def test_dense_is_compared_with_the_config_that_would_run(store, measured):
    assert decide("full", store).measured_us == {"triton": 10.0, "dense": 30.0}
    store.put(KEY, {NAMES[4]: 40.0})
    assert decide("full", store).backend == "triton"
    assert measured == [NAMES[0], NAMES[4]]
    decide("full", store)
    assert len(measured) == 2


def test_a_choice_made_for_another_config_is_not_taken_for_this_one(store, measured):
    decide("full", store)
    assert decide("cached", store).measured_us
    store.put(KEY, {NAMES[4]: 40.0})
    found = decide("cached", store)
    assert (found.backend, found.reason, found.measured_us) == ("triton", "said the model", {})


def test_deterministic_mode_is_the_cost_model_s_choice(store, measured, monkeypatch):
    decide("full", store)
    monkeypatch.setenv(launch_configs.DETERMINISTIC, "1")
    assert decide("full", store).reason == "said the model"
    assert len(measured) == 1


def test_a_layer_that_cannot_be_timed_keeps_the_plan_s_choice_with_a_warning(store, monkeypatch):
    def fails(*_):
        raise RuntimeError("triton channels_last cannot be timed: OutOfResources\nmore")

    monkeypatch.setattr(dispatch, "measure", fails)
    with pytest.warns(UserWarning, match="layer 'layer' is not timed: RuntimeError: triton channels_last"):
        assert decide("full", store).reason == "said the model"


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Let the names and limits of a GPU be told without one, and its tuning run on recorded times."""
    for module in ("launch_configs", "timing_store"):
        monkeypatch.setattr(f"lhc_triton.runtime.choosing.{module}.device_name", lambda device: "A GPU")
    monkeypatch.setattr("lhc_kernels.device_limits", lambda device: {})
    bench = Recorded({NAMES[6]: 20.0})

    def tuned(layer, dtype, device, store):
        return tune_layer(layer, dtype, device, store, benches=bench)

    monkeypatch.setattr(dispatch, "tune_layer", tuned)
    return bench


def test_full_tunes_on_a_gpu_and_cached_only_looks_up(store, pretended_gpu):
    assert config_name(launch_config(LAYER, HALF, CUDA, "cached")) == NAMES[0]
    assert pretended_gpu.prepared == []
    assert config_name(launch_config(LAYER, HALF, CUDA, "full")) == NAMES[6]
    assert pretended_gpu.prepared == NAMES
    assert config_name(launch_config(LAYER, HALF, CUDA, "cached")) == NAMES[6]
    assert config_name(launch_config(LAYER, HALF, CUDA, "off")) == NAMES[0]


def test_a_forced_backend_is_tuned_as_well(store, pretended_gpu, monkeypatch):
    here = dataclasses.replace(BACKENDS["triton"], problem=lambda device, dtype: None)
    monkeypatch.setitem(BACKENDS, "triton", here)
    dispatch.decide(LAYER, HALF, CUDA, "cached", "triton")
    assert pretended_gpu.prepared == []
    assert dispatch.decide(LAYER, HALF, CUDA, "full", "triton").backend == "triton"
    assert pretended_gpu.prepared == NAMES


def test_tuned_configs_that_cannot_be_stored_are_a_warning(tmp_path, store, pretended_gpu):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="tuned configs are not kept"):
        launch_config(LAYER, HALF, CUDA, "full", TimingStore(tmp_path / "file" / "t.json"))


def test_an_accelerated_network_keeps_its_layers_to_the_mode_it_was_made_in(monkeypatch, store):
    for tune, environment, kept in (("off", "0", "off"), ("cached", "0", "cached"), ("full", "1", "off")):
        monkeypatch.setenv(launch_configs.DETERMINISTIC, environment)
        fast = accelerate(vgg(), image(), tune=tune, backend="torch")
        modes = {layer.tune for layer in fast.fused_layers().values() if layer.backend == "torch"}
        assert modes == {kept}
