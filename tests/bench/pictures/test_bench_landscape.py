"""The landscape of launch configs: read off a store, and drawn."""

import math

import pytest

from lhc_bench.pictures.config_landscape import draw_landscapes, is_store, landscapes
from lhc_triton.runtime.choosing.launch_configs import KeyParts, config_name
from lhc_triton.runtime.choosing.timing_store import TimingStore


def name(block_m, block_n, stages, warps=4):
    from lhc_kernels import KernelConfig

    return config_name(KernelConfig(block_m, block_n, num_warps=warps, num_stages=stages).to_list())


def key(convolution, width=64, **parts):
    plain = KeyParts("A GPU", "kernels 01", "triton 3.7.1", "float16", "", "", "64 pixels")
    plain = plain._replace(convolution=convolution, tiles=f"4 tiles of {width}, in_block 32", **parts)
    return " | ".join(plain)


@pytest.fixture
def store(tmp_path):
    store = TimingStore(tmp_path / "times.json")
    store.put(key("64->64"), {name(64, 16, 2): 40.0, name(64, 16, 2, warps=8): 20.0})
    store.put(key("64->64"), {name(128, 16, 2): 10.0, name(64, 32, 3): "failed"})
    store.put(key("64->128"), {name(64, 16, 2): 30.0, name(128, 16, 2): 60.0})
    store.put(key("64->64", width=16), {name(64, 16, 2): 5.0})
    store.put("cpu | torch 2.13 | float32 | 0123", {"torch": 1.0, "dense": 2.0})
    return store


def test_a_cell_is_the_mean_over_layers_of_its_best_config_over_the_layer_s_best(store):
    (found,) = landscapes(store)
    assert (found.device, found.dtype, found.layers) == ("A GPU", "float16", {64: 2, 16: 1})
    assert found.slowdown[64, 2, 64, 16] == pytest.approx(math.sqrt(2.0 * 1.0))
    assert found.slowdown[64, 2, 128, 16] == pytest.approx(math.sqrt(1.0 * 2.0))
    assert found.slowdown[16, 2, 64, 16] == 1.0
    assert found.wins == {(64, 2, 128, 16): 1, (64, 2, 64, 16): 1, (16, 2, 64, 16): 1}
    assert found.failed == {(64, 3, 64, 32)}
    assert (found.configs, found.failures) == (7, 1)


def test_each_device_and_type_gets_its_picture_and_the_best_known_kernels_the_place(store, tmp_path):
    store.put(key("64->64", dtype="bfloat16"), {name(64, 16, 2): 5.0})
    store.put(key("64->64", kernels="kernels 02"), {name(64, 16, 2): 5.0})
    assert [found.kernels for found in landscapes(store)] == ["kernels 01", "kernels 01", "kernels 02"]
    paths = draw_landscapes(store.path, tmp_path / "out")
    assert sorted(path.name for path in paths) == [
        "landscape-a-gpu-bfloat16.png", "landscape-a-gpu-float16.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_one_cell_and_many_widths_can_be_drawn(tmp_path):
    store = TimingStore(tmp_path / "times.json")
    for width in (16, 32, 48, 64, 128, 256):
        store.put(key("64->64", width), {name(64, 16, 2): 5.0})
    assert len(draw_landscapes(store.path, tmp_path)) == 1


def test_a_store_without_configs_is_refused_and_nothing_is_made(tmp_path):
    path = tmp_path / "times.json"
    TimingStore(path).put("cpu | torch", {"torch": 1.0})
    with pytest.raises(ValueError, match="holds no measured config: run lhc-triton tune"):
        draw_landscapes(path, tmp_path / "out")
    path.write_text('{"version": 1, "records": {}}')
    with pytest.raises(ValueError, match=r"times\.json is not a store of .*: not a timing store of version"):
        draw_landscapes(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b'{"version": 2, "records": {}}', True), (b'{"rows": []}', False), (b"[]", False), (b"\xff{", False)],
)
def test_a_store_is_told_from_a_results_file(tmp_path, content, expected):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    assert is_store(path) is expected
    assert is_store(tmp_path / "missing.json") is False
