"""Which launch config a layer gets: the user's store, a shipped table, the heuristic."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded_bench import CPU, HALF, layer_of, names_of

from lhc_triton.planning.backends import BACKENDS
from lhc_triton.runtime.choosing import launch_configs
from lhc_triton.runtime.choosing.launch_configs import (
    config_key,
    config_name,
    config_of,
    key_parts,
    look_up,
    pixel_bucket,
    table_path,
)
from lhc_triton.runtime.choosing.timing_store import STORE_VERSION, TimingStore, device_name
from lhc_triton.runtime.network.grouped import GroupedConv2d

LAYER = layer_of()
NAMES = names_of(LAYER)
KEY = config_key(LAYER, HALF, CPU, 64)
SIZE = (8, 8)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The user's store, empty."""
    monkeypatch.delenv(launch_configs.DETERMINISTIC, raising=False)
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path))
    return TimingStore()


@pytest.fixture
def tables(tmp_path):
    """A folder with a table for this device, which knows one config."""
    path = table_path(tmp_path / "tables", device_name(CPU))
    path.parent.mkdir()
    path.write_text(json.dumps({"version": STORE_VERSION, "records": {KEY: {NAMES[2]: 30.0}}}))
    return path.parent


def found(tune="cached", pixels=64, size=SIZE, tables=Path("/nowhere"), **options):
    return look_up(LAYER, HALF, CPU, pixels, size, tune=tune, tables=tables, **options)


def name(found):
    return config_name(found.config)


def test_the_user_s_measurement_comes_before_the_table_and_that_before_the_heuristic(store, tables):
    plain = found()
    assert (plain.source, plain.time_us, name(plain)) == ("heuristic", None, NAMES[0])
    shipped = found(tables=tables)
    assert (shipped.source, shipped.time_us, name(shipped)) == ("table", 30.0, NAMES[2])
    store.put(KEY, {NAMES[4]: 40.0, NAMES[5]: 50.0})
    own = found(tables=tables)
    assert (own.source, own.time_us, name(own)) == ("store", 40.0, NAMES[4])
    assert found(tune="full", tables=tables) == own


def test_no_table_ships_yet_for_a_device_that_was_not_measured(store):
    assert look_up(LAYER, HALF, CPU, 64, SIZE).source == "heuristic"


@pytest.mark.parametrize("how", ["off", "environment"])
def test_deterministic_mode_is_the_heuristic_alone(store, tables, monkeypatch, how):
    store.put(KEY, {NAMES[4]: 40.0})
    if how == "environment":
        monkeypatch.setenv(launch_configs.DETERMINISTIC, "1")
    assert found(tune="off" if how == "off" else "full", tables=tables).source == "heuristic"


def test_what_cannot_be_a_config_for_the_layer_is_passed_over(store):
    config = config_of(NAMES[1])
    tf32 = config_name(dataclasses.replace(config, precision="tf32").to_list())
    huge = config_name(dataclasses.replace(config, block_m=256, block_k=256, num_stages=8).to_list())
    odd = {"128,64": 1.0, "": 1.0, "a,b": 1.0, "1,1,1,1,1,1,9,9,9": 1.0, "dense": 1.0, tf32: 1.0, huge: 1.0}
    store.put(KEY, {**odd, NAMES[0]: "failed", NAMES[3]: 90.0})
    assert name(found()) == NAMES[3]
    store.put(KEY, {NAMES[3]: "failed as well"})
    assert found().source == "heuristic"


def test_a_damaged_table_is_skipped_with_a_warning(store, tmp_path):
    path = table_path(tmp_path / "damaged", device_name(CPU))
    path.parent.mkdir()
    path.write_text("[")
    with pytest.warns(UserWarning, match="is skipped"):
        assert found(tables=path.parent).source == "heuristic"


def test_a_table_is_named_after_its_device():
    assert table_path(Path("t"), "NVIDIA H100 80GB HBM3") == Path("t/nvidia-h100-80gb-hbm3.json")
    assert table_path(Path("t"), "../../x y/").name == "x-y.json"


@given(st.integers(0, 2**40))
def test_a_bucket_is_the_smallest_power_of_two_that_holds_its_pixels(pixels):
    bucket = pixel_bucket(pixels)
    assert bucket.bit_count() == 1
    assert bucket >= pixels
    assert bucket == 1 or bucket // 2 < pixels
    assert pixel_bucket(bucket) == bucket


@given(st.integers(0, 2**30), st.integers(0, 2**30))
def test_buckets_keep_the_order_of_their_pixels(a, b):
    assert (pixel_bucket(a) <= pixel_bucket(b)) or a > b


def test_the_key_tells_apart_what_decides_between_configs():
    def key(layer=LAYER, dtype=HALF, bucket=64):
        return config_key(layer, dtype, CPU, bucket)

    topology, geometry = LAYER.topology, LAYER.topology.geometry
    other_image = dataclasses.replace(geometry, height=geometry.height * 3, padding=(0, 0, 0, 0))
    same = dataclasses.replace(
        LAYER, topology=dataclasses.replace(topology, name="x", geometry=other_image), backend="dense"
    )
    assert key(same) == key()
    strided = dataclasses.replace(topology, geometry=dataclasses.replace(geometry, stride=(2, 2)))
    others = {
        key(dtype=torch.float32),
        key(bucket=128),
        key(dataclasses.replace(LAYER, topology=strided)),
        key(dataclasses.replace(LAYER, tile_width=64)),
        key(dataclasses.replace(LAYER, tiles=LAYER.tiles[:-1])),
        key(layer_of(density=0.1)),
        key(layer_of(in_channels=96)),
    }
    assert len(others) == 7
    assert key() not in others


def test_layers_that_differ_in_which_entries_live_share_a_key():
    rolled = tuple(
        dataclasses.replace(tile, entries=tuple(sorted((e + 1) % 18 for e in tile.entries)))
        for tile in LAYER.tiles
    )
    assert rolled != LAYER.tiles
    assert config_key(dataclasses.replace(LAYER, tiles=rolled), HALF, CPU, 64) == KEY


def test_other_kernels_make_other_keys(monkeypatch):
    monkeypatch.setattr("lhc_kernels.source_digest", lambda: "another")
    assert config_key(LAYER, HALF, CPU, 64) != KEY


def test_a_key_can_be_taken_apart():
    parts = key_parts(KEY)
    assert (parts.dtype, parts.tile_width, parts.pixels) == ("float16", LAYER.tile_width, "64 pixels")
    assert key_parts("cpu | torch 2 | float32 | 0123") is None


@pytest.fixture
def configs_run(monkeypatch):
    """Stand in for the kernel; the list holds the configs it was given."""
    configs = []

    def write_down(call):
        configs.append(list(call.config))
        return torch.empty(call.out_shape, dtype=call.out_dtype, memory_format=torch.channels_last)

    monkeypatch.setitem(BACKENDS, "triton", dataclasses.replace(BACKENDS["triton"], run=write_down))
    return configs


@pytest.fixture
def module(store, configs_run, monkeypatch):
    """A layer of the Triton backend."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    g = LAYER.topology.geometry
    weight = torch.zeros(g.out_channels, g.in_channels, 3, 3, dtype=HALF)
    return GroupedConv2d.from_weight(LAYER, weight, None, backend="triton")


@pytest.fixture
def looked_up(monkeypatch):
    """Count the look-ups; the list holds their buckets."""
    calls = []

    def counting(layer, dtype, device, pixels, size, **options):
        calls.append(pixels)
        return look_up(layer, dtype, device, pixels, size, **options)

    monkeypatch.setattr("lhc_triton.runtime.network.grouped.look_up", counting)
    return calls


def test_a_layer_looks_its_config_up_once_for_each_bucket_and_measures_nothing(store, module, looked_up):
    store.put(KEY, {NAMES[4]: 40.0})
    assert config_name(module._config(64, 8, 8)) == NAMES[4]
    store.put(KEY, {NAMES[5]: 1.0})
    assert config_name(module._config(64, 8, 8)) == NAMES[4]
    assert config_name(module._config(128, 8, 8)) == names_of(layer_of(128))[0]
    assert looked_up == [64, 128]


def test_a_layer_looks_again_when_its_type_changes_and_keeps_configs_out_of_its_state(module, looked_up):
    module._config(64, 8, 8)
    assert not [key for key in module.state_dict() if "config" in key]
    module.float()
    module._config(64, 8, 8)
    assert looked_up == [64, 64]


def test_tune_off_keeps_a_layer_to_the_heuristic(store, module):
    store.put(KEY, {NAMES[4]: 40.0})
    module.tune = "off"
    assert config_name(module._config(64, 8, 8)) == NAMES[0]


def test_the_kernel_gets_the_config_of_its_bucket_and_another_batch_of_it_the_same(
    store, module, configs_run, looked_up
):
    store.put(config_key(LAYER, HALF, CPU, 256), {NAMES[4]: 40.0})
    for images in (3, 4, 8):
        module(torch.zeros(images, 64, 8, 8, dtype=HALF))
    assert [config_name(config) for config in configs_run] == [NAMES[4], NAMES[4], names_of(layer_of(512))[0]]
    assert looked_up == [256, 512]


def test_compiled_for_a_dynamic_batch_a_layer_is_compiled_once_for_each_bucket(module, configs_run):
    import torch._dynamo.testing

    compiler = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    for images in (1, 2, 3, 4, 5, 6, 7, 8):
        compiled(torch.zeros(images, 64, 8, 8, dtype=HALF))
    assert configs_run == [module._config(pixel_bucket(64 * n), 8, 8) for n in range(1, 9)]
    assert compiler.frame_count <= 4
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_for_dynamic_sizes_a_layer_is_compiled_for_each_size_of_image(module, configs_run, dynamic):
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=dynamic)
    sizes = ((8, 8), (12, 10), (8, 8), (16, 16), (10, 12))
    for height, width in sizes:
        compiled(torch.zeros(3, 64, height, width, dtype=HALF))
    assert configs_run == [module._config(pixel_bucket(3 * h * w), h, w) for h, w in sizes]
    torch._dynamo.reset()


def test_importing_the_runtime_does_not_import_triton():
    import subprocess

    code = "import sys, lhc_triton.runtime.choosing.tuning_jobs; sys.exit('triton' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_products_follow_torch_s_own_setting(monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    found = {dtype: look_up(LAYER, dtype, CPU, 64, (8, 8), tune="off") for dtype in (torch.float32, HALF)}
    precisions = {dtype: config_of(config_name(f.config)).precision for dtype, f in found.items()}
    assert precisions == {torch.float32: "tf32" if allowed else "ieee", HALF: "ieee"}
