import dataclasses

import numpy as np
import pytest
from planning_cases import CPU, CUDA, layer

from lhc_triton.planning import ConvGeometry, CostModel, LayerTopology, Tile
from lhc_triton.planning.cost import itemsize_of

PLAIN = CostModel(
    device="cpu",
    sparse_backend="torch",
    source="a test",
    dense_gmacs=((4, 100.0),),
    sparse_gmacs=((4, ((16, 10.0), (32, 20.0))),),
    memory_gbs=1.0,
    entry_gbs=2.0,
    sum_gbs=4.0,
    launch_us=7.0,
    dense_launch_us=5.0,
    tile_us=3.0,
    entry_us=0.5,
    overlap=False,
    pads_tiles=False,
    copies_input=False,
)
GEOMETRY = ConvGeometry(1, 64, 32, 10, 10, (1, 1), padding=(0, 0, 0, 0))


def test_dense_time_is_the_longer_of_arithmetic_and_memory():
    macs = 64 * 32 * 100
    moved = (64 * 100 + 32 * 100 + 64 * 32) * 4
    assert PLAIN.dense_us(GEOMETRY) == pytest.approx(5 + max(macs / 100e3, moved / 1e3))
    fast_memory = dataclasses.replace(PLAIN, memory_gbs=1e6)
    assert fast_memory.dense_us(GEOMETRY) == pytest.approx(5 + macs / 100e3)


def test_sparse_time_by_hand():
    topology = layer([[0, 1], [1]], size=10)
    tiles = (Tile((0,), (0, 1)), Tile((1,), (1,)))
    entry = 0.5 + 100 * 32 * 4 / 2e3 + 100 * 16 * 2 * 4 / 4e3 + 100 * 32 * 16 / 10e3
    moved = (64 * 100 + 32 * 100 + 3 * 32 * 16) * 4 / 1e3
    assert PLAIN.sparse_us(topology, tiles, 16) == pytest.approx(7 + 2 * 3 + 3 * entry + moved)


def test_overlapping_parts_count_the_longest():
    topology = layer([[0, 1], [1]], size=10)
    tiles = (Tile((0,), (0, 1)), Tile((1,), (1,)))
    hidden = dataclasses.replace(PLAIN, overlap=True)
    entry = 0.5 + max(100 * 32 * 4 / 2e3, 100 * 16 * 2 * 4 / 4e3, 100 * 32 * 16 / 10e3)
    moved = (64 * 100 + 32 * 100 + 3 * 32 * 16) * 4 / 1e3
    assert hidden.sparse_us(topology, tiles, 16) == pytest.approx(7 + max(2 * 3 + 3 * entry, moved))


def test_rates_between_the_widths_are_interpolated_and_narrow_tiles_cost_as_the_narrowest():
    free = dataclasses.replace(PLAIN, entry_us=0.0, entry_gbs=1e9, sum_gbs=1e9)
    times = free.entry_times(GEOMETRY, 32, [8, 16, 24, 32, 64], 64)
    expected = [16 / 10, 16 / 10, 24 / 15, 32 / 20, 64 / 20]
    assert times == pytest.approx([3200 * width / 1e3 for width in expected], rel=1e-3)


def test_padded_tiles_cost_their_full_width():
    padded = dataclasses.replace(PLAIN, pads_tiles=True)
    first, last = padded.entry_times(GEOMETRY, 32, [1, 32], 32)
    assert first == last == PLAIN.entry_times(GEOMETRY, 32, [32], 32)[0]


def test_short_entries_cost_the_least_block():
    least = dataclasses.replace(PLAIN, min_block=16)
    assert least.entry_times(GEOMETRY, 8, [16], 16)[0] == PLAIN.entry_times(GEOMETRY, 16, [16], 16)[0]


def test_a_copied_input_costs_its_border():
    geometry = ConvGeometry(1, 8, 16, 10, 10)
    copied = dataclasses.replace(PLAIN, copies_input=True)
    assert copied.layer_us(geometry) > PLAIN.layer_us(geometry)
    assert copied.entry_times(geometry, 8, [16], 16)[0] > PLAIN.entry_times(geometry, 8, [16], 16)[0]


@pytest.mark.parametrize("cost", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_wider_values_are_never_faster(cost, itemsize):
    geometry = ConvGeometry(8, 256, 256, 28, 28)
    assert cost.dense_us(geometry, itemsize) <= cost.dense_us(geometry, 2 * itemsize)
    narrow, wide = (cost.entry_times(geometry, 32, [64], 64, size)[0] for size in (itemsize, 2 * itemsize))
    assert narrow <= wide


# Work on 512 -> 512 channels at 28 x 28, batch 64, fp16, density 0.1.
LARGE = ConvGeometry(64, 512, 512, 28, 28)


def useful_tflops(width):
    """Arithmetic rate of tiles of one width, apart from launch and memory."""
    us = CUDA.entry_times(LARGE, 32, [width], width, 2)[0]
    return 2 * LARGE.out_pixels * 32 * width / us / 1e6


def test_the_gpu_model_has_the_roofs_it_was_made_from():
    assert useful_tflops(16) == pytest.approx(78.2, rel=0.01)
    assert useful_tflops(64) == pytest.approx(234.7, rel=0.01)
    assert useful_tflops(128) == pytest.approx(352, rel=0.01)


@pytest.mark.parametrize(("tf32", "rate"), [(True, 140e3), (False, 23e3)])
def test_float32_on_a_gpu_is_priced_as_it_runs(tf32, rate):
    cost = CostModel.for_device("cuda", tf32=tf32)
    geometry = ConvGeometry(64, 256, 256, 28, 28)
    assert cost.dense_us(geometry, 4) >= geometry.macs / (rate * 1e3)
    # Whatever the tiles, the arithmetic alone takes this long.
    assert cost.entry_times(geometry, 32, [128], 128, 4)[0] >= geometry.out_pixels * 32 * 128 / (rate * 1e3)
    assert (
        cost.entry_times(geometry, 32, [128], 128, 2)[0] == CUDA.entry_times(geometry, 32, [128], 128, 2)[0]
    )


def test_an_unknown_device_has_no_model():
    with pytest.raises(ValueError, match="no cost model for device 'mps'; supported: cpu, cuda"):
        CostModel.for_device("mps")


def test_an_unknown_type_has_no_size():
    with pytest.raises(ValueError, match="dtype 'complex64' is not supported; choose one of float64"):
        itemsize_of("complex64")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"launch_us": -1.0}, "launch_us = -1.0"),
        ({"tile_us": float("nan")}, "tile_us = nan"),
        ({"memory_gbs": 0.0}, "memory_gbs = 0.0"),
        ({"margin": 0.0}, "margin = 0.0"),
        ({"dense_gmacs": ()}, "rates must not be empty"),
        ({"dense_gmacs": ((4, 0.0),)}, "each one above 0"),
        ({"sparse_gmacs": ((4, ((32, 1.0), (16, 1.0))),)}, r"tile widths \[32, 16\]: expected rising"),
        ({"sparse_gmacs": ((4, ()),)}, "expected rising widths"),
    ],
)
def test_impossible_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)


def test_few_pixels_do_not_keep_all_cores_busy():
    shared = dataclasses.replace(PLAIN, entry_us=0.0, entry_gbs=1e9)
    full = shared.entry_times(GEOMETRY, 32, [16], 16)[0]
    for pixels, times in ((100, 1.0), (150, 1.5), (1000, 2.0)):
        few = dataclasses.replace(shared, spread_pixels=pixels)
        assert few.entry_times(GEOMETRY, 32, [16], 16)[0] == pytest.approx(times * full, rel=1e-3)


def test_an_image_that_needs_no_border_is_not_copied():
    copied = dataclasses.replace(PLAIN, copies_input=True)
    assert copied.layer_us(GEOMETRY) == PLAIN.layer_us(GEOMETRY)
    strided = dataclasses.replace(GEOMETRY, stride=(2, 2))
    assert copied.layer_us(strided) > PLAIN.layer_us(strided)


# Measured on 2 cores, in us: (in, out channels, size, kernel, in_block, filters, entries), sparse, dense.
MEASURED = [
    ((256, 256, 56, 3, 32, 64, 7), 2464, 8552),
    ((512, 512, 28, 3, 32, 128, 14), 2681, 10429),
    ((512, 512, 14, 3, 128, 64, 4), 974, 2734),
    ((128, 128, 28, 3, 64, 32, 2), 373, 562),
    ((64, 64, 56, 3, 32, 16, 5), 632, 566),
    ((256, 1024, 14, 1, 32, 16, 1), 678, 323),
]


@pytest.mark.parametrize(("shape", "sparse_us", "dense_us"), MEASURED)
def test_the_cpu_model_is_near_what_was_measured(shape, sparse_us, dense_us):
    channels, filters, size, kernel, in_block, width, entries = shape
    geometry = ConvGeometry(1, channels, filters, size, size, (kernel, kernel), padding=(kernel // 2,) * 4)
    rng = np.random.default_rng(0)
    rows = np.zeros((filters // width, kernel * kernel * (channels // in_block)), dtype=bool)
    for row in rows:
        row[rng.choice(rows.shape[1], entries, replace=False)] = True
    mask = rows.reshape(len(rows), kernel, kernel, -1).transpose(0, 3, 1, 2)
    topology = LayerTopology.from_mask("a", geometry, in_block, width, mask)
    tiles = [Tile((group,), topology.pattern_of(group)) for group in range(topology.groups)]
    predicted, dense = CPU.sparse_us(topology, tiles, width), CPU.dense_us(geometry)
    assert predicted == pytest.approx(sparse_us, rel=0.3)
    assert dense == pytest.approx(dense_us, rel=0.3)
    assert (predicted < CPU.margin * dense) == (sparse_us < dense_us)


def test_taps_outside_the_image_cost_nothing_where_the_backend_skips_them():
    skipping = dataclasses.replace(PLAIN, skips_border=True)
    inner = ConvGeometry(
        2, 64, 32, 10, 12, (3, 3), padding=(0, 0, 0, 0)
    )  # without a border every tap is inside
    assert skipping.entry_times(inner, 32, [16], 16) == PLAIN.entry_times(inner, 32, [16], 16)
    small = ConvGeometry(2, 64, 32, 2, 2, (3, 3), padding=(1, 1, 1, 1))
    share = 16 / 36  # of two rows and columns, each sees two of three taps
    pixels = ConvGeometry(2, 64, 32, 2, 2, (1, 1), padding=(0, 0, 0, 0))
    expected = PLAIN.entry_us + share * (PLAIN.entry_times(pixels, 32, [16], 16) - PLAIN.entry_us)
    plain = dataclasses.replace(PLAIN, spread_pixels=0)
    assert dataclasses.replace(plain, skips_border=True).entry_times(small, 32, [16], 16) == pytest.approx(
        expected
    )


# (in, out channels, size, kernel, stride), native at density 0.1 in blocks of 32x16, dense: us on 2 cores.
NATIVE_MEASURED = [
    ((64, 64, 56, 3, 1), 126, 1068),
    ((64, 128, 56, 3, 2), 68, 553),
    ((1024, 256, 14, 1, 1), 65, 499),
    ((256, 256, 56, 3, 1), 1906, 16040),
    ((512, 512, 14, 3, 1), 436, 4027),
]


@pytest.mark.parametrize(("shape", "sparse_us", "dense_us"), NATIVE_MEASURED)
def test_the_native_model_is_near_what_was_measured(shape, sparse_us, dense_us):
    channels, filters, size, kernel, stride = shape
    geometry = ConvGeometry(
        1, channels, filters, size, size, (kernel, kernel), (stride, stride), (kernel // 2,) * 4
    )
    native = CostModel.for_device("cpu", "native")
    grid = (filters // 16, channels // 32, kernel, kernel)
    live = max(1, round(0.1 * np.prod(grid[1:])))
    mask = np.zeros((grid[0], int(np.prod(grid[1:]))), dtype=bool)
    for row in mask:
        row[np.random.default_rng(0).choice(len(row), live, replace=False)] = True
    topology = LayerTopology.from_mask("a", geometry, 32, 16, mask.reshape(grid))
    tiles = [Tile((group,), topology.pattern_of(group)) for group in range(topology.groups)]
    assert native.sparse_us(topology, tiles, 16) == pytest.approx(sparse_us, rel=0.4)
    assert native.dense_us(geometry) == pytest.approx(dense_us, rel=0.4)
