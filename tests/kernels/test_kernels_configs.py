"""Launch configs: the round trip, the validity predicate, and what the heuristic may return."""

import re
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lhc_kernels import (
    KernelConfig,
    LaunchShape,
    candidate_configs,
    choose_config,
    config_problem,
    cost_sheet,
    heuristic_config,
    source_digest,
    store_run,
)
from lhc_kernels.configs import best_box, box_count

SHAPE = LaunchShape(
    pixels=64 * 56 * 56,
    in_channels=256,
    in_block=32,
    tile_width=64,
    tiles=4,
    kernel=(3, 3),
    dtype="float16",
    out_size=(56, 56),
)


BOX = KernelConfig(variant="box")


def test_configs_survive_the_round_trip_through_integers() -> None:
    for config in (KernelConfig(), KernelConfig(64, 128, 16, 8, 3, 2, "tf32x3", "split", 4, 128)):
        values = config.to_list()
        assert all(type(value) is int for value in values)
        assert KernelConfig.from_list(values) == config


@pytest.mark.parametrize(
    "values", [[128], [128, 16, 32, 4, 4, 1, 3, 0, 1, 0], [128, 16, 32, 4, 4, 1, 0, 9, 1, 0], [0] * 9]
)
def test_other_integers_are_no_config(values: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^config is .*: expected nothing, or block_m"):
        KernelConfig.from_list(values)


def test_configs_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        KernelConfig().block_m = 64  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "shape", "words"),
    [
        (KernelConfig(block_m=96), SHAPE, "block_m is 96: supported are the powers of two from 16 to 256"),
        (KernelConfig(block_n=8), SHAPE, "block_n is 8"),
        (KernelConfig(block_k=512), SHAPE, "block_k is 512"),
        (KernelConfig(num_warps=3), SHAPE, "num_warps is 3"),
        (KernelConfig(num_stages=0), SHAPE, "num_stages is 0"),
        (KernelConfig(entries=3), SHAPE, "entries is 3 with block_k 32"),
        (KernelConfig(block_k=16, entries=2), SHAPE, "entries is 2 with block_k 16"),
        (KernelConfig(precision="tf16"), SHAPE, "precision is 'tf16'"),
        (KernelConfig(), replace(SHAPE, dtype="float64"), "dtype is float64"),
        (KernelConfig(), replace(SHAPE, kernel=(16, 16)), r"kernel_size is \[16, 16\]"),
        (KernelConfig(256, 256, 32, 8), SHAPE, "256 accumulators a thread"),
        (KernelConfig(128, 128, 64, 8, 8), SHAPE, "262144 bytes of shared memory: the device has 232448"),
        (
            KernelConfig(variant="rows"),
            SHAPE,
            "variant is 'rows': supported are grid, persist",
        ),
        (KernelConfig(variant="split"), SHAPE, "splits is 1 with variant split: supported are 2 to 16"),
        (KernelConfig(splits=2), SHAPE, "splits is 2 with variant grid: supported are 1 to 1"),
        (KernelConfig(max_registers=100), SHAPE, "max_registers is 100: supported are 0, 64, 72"),
        (KernelConfig(max_registers=128), replace(SHAPE, capability=0), "max_registers is 128: this make"),
        (BOX, replace(SHAPE, capability=80), "capability is 8.0: variant box needs 9.0 or more"),
        (BOX, replace(SHAPE, stride=(2, 1)), r"stride is \[2, 1\]: variant box supports \[1, 1\]"),
        (BOX, replace(SHAPE, dtype="float32"), "dtype is float32: variant box supports float16"),
        (
            BOX,
            replace(SHAPE, in_channels=36),
            "in_channels is 36 and tile_width 64: variant box",
        ),
        (BOX, replace(SHAPE, in_block=24), "block_k is 32 with 1 entries a step: variant box supports one"),
        (BOX, replace(SHAPE, entries=0), "variant box needs a known output size and at least one entry"),
    ],
)
def test_the_predicate_names_what_is_wrong(config: KernelConfig, shape: LaunchShape, words: str) -> None:
    reason = config_problem(config, shape)
    assert reason is not None
    assert "\n" not in reason
    assert re.search(words, reason)


def test_a_good_config_has_no_problem() -> None:
    assert config_problem(KernelConfig(128, 64, 32, 4, 4, 2), SHAPE) is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.builds(
        LaunchShape,
        pixels=st.integers(1, 2**31),
        in_channels=st.integers(1, 4096),
        in_block=st.integers(1, 512),
        tile_width=st.integers(1, 512),
        tiles=st.integers(1, 256),
        kernel=st.tuples(st.integers(1, 15), st.integers(1, 15)),
        dtype=st.sampled_from(("float16", "bfloat16", "float32", "int8")),
        processors=st.integers(1, 200),
        shared_bytes=st.sampled_from((65536, 101376, 166912, 232448)),
    ),
    st.sampled_from(("ieee", "tf32", "tf32x3")),
)
def test_the_heuristic_is_always_valid(shape: LaunchShape, precision: str) -> None:
    config, reasons = choose_config(shape, precision)
    assert config_problem(config, shape) is None
    assert config.precision == precision
    assert reasons
    assert heuristic_config(shape, precision) == config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "tensor cores; two entries a step"),
        ({"dtype": "float32"}, "float32: FMA, small blocks"),
        ({"in_block": 64}, "tensor cores"),
        ({"tile_width": 200}, "tile split into 128 filters"),
        ({"in_channels": 37}, "odd channels"),
        ({"in_block": 25, "in_channels": 100}, "odd channels"),
        ({"pixels": 64, "entries": 4}, "few pixels"),
        ({"pixels": 64}, "few programs, many entries: split"),
        ({"shared_bytes": 101376}, "fewer stages"),
    ],
)
def test_the_heuristic_names_its_reasons(change: dict[str, object], reason: str) -> None:
    assert reason in choose_config(replace(SHAPE, **change))[1]  # type: ignore[arg-type]


def test_store_runs_need_aligned_rows() -> None:
    assert store_run(256, 16, "float16") == 8
    assert store_run(256, 16, "float32") == 4
    assert store_run(250, 16, "float16") == 1
    assert store_run(256, 12, "float16") == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(
        LaunchShape,
        pixels=st.integers(1, 2**24),
        in_channels=st.integers(1, 1024),
        in_block=st.sampled_from((3, 16, 24, 32, 64, 128)),
        tile_width=st.integers(1, 300),
        tiles=st.integers(1, 64),
        kernel=st.sampled_from(((1, 1), (3, 3), (7, 7))),
        dtype=st.sampled_from(("float16", "bfloat16", "float32", "int8")),
        entries=st.none() | st.integers(0, 5000),
        stride=st.sampled_from(((1, 1), (2, 2))),
        out_size=st.sampled_from(((0, 0), (14, 14), (56, 56))),
    ),
    st.integers(1, 12),
)
def test_candidates_are_valid_distinct_and_led_by_the_heuristic(shape: LaunchShape, limit: int) -> None:
    candidates = candidate_configs(shape, limit)
    assert candidates[0] == heuristic_config(shape)
    assert 1 <= len(candidates) <= limit
    assert len(set(candidates)) == len(candidates)
    assert candidates == candidate_configs(shape, limit)
    for config in candidates:
        assert config_problem(config, shape) is None
        sheet = cost_sheet(config, shape)
        assert sheet.occupancy > 0
        assert sheet.computed_macs >= sheet.useful_macs
        assert sheet.predicted_us > 0


def test_candidates_span_block_sizes_and_pipelines() -> None:
    candidates = candidate_configs(SHAPE)
    assert len(candidates) == 12
    for name in ("block_m", "block_n", "num_stages", "variant"):
        assert len({getattr(config, name) for config in candidates}) > 1


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="limit is 0: expected at least 1"):
        candidate_configs(SHAPE, 0)


def test_the_cost_sheet_counts_what_a_launch_moves_and_computes() -> None:
    shape = replace(SHAPE, pixels=1000, tile_width=48, tiles=2, entries=9)
    sheet = cost_sheet(KernelConfig(128, 32, 32, 4, 4), shape)
    assert sheet.programs == 8 * 2 * 2
    assert sheet.useful_macs == 1000 * 9 * 32 * 48
    assert sheet.computed_macs == 32 * 5 * 128 * 32 * 32
    assert sheet.memory_bytes == 2 * (1000 * 256 + 9 * 32 * 48 + 1000 * 96)
    assert sheet.l2_bytes == 32 * 5 * 32 * (128 + 32) * 2 + 2 * 1000 * 96


def test_the_digest_of_the_sources_is_short_and_stable() -> None:
    assert re.fullmatch(r"[0-9a-f]{16}", source_digest())
    assert source_digest() == source_digest()


def test_a_box_covers_the_output_in_as_few_programs_as_can_be() -> None:
    assert best_box(128, SHAPE) == (2, 8, 8)
    assert best_box(64, SHAPE) == (1, 1, 64)
    assert best_box(64, replace(SHAPE, pixels=64 * 28 * 28, out_size=(28, 28))) != (1, 1, 64)
    assert best_box(128, replace(SHAPE, pixels=4 * 64 * 64, out_size=(64, 64))) == (1, 2, 64)
    assert best_box(128, replace(SHAPE, pixels=100, out_size=(1, 1))) == (128, 1, 1)
    assert box_count((2, 8, 8), SHAPE) == 32 * 7 * 7


def test_a_split_is_chosen_only_where_the_sheet_says_it_pays() -> None:
    few = replace(SHAPE, pixels=49, entries=4 * 72)
    assert heuristic_config(few).variant == "split"
    assert heuristic_config(replace(few, entries=4 * 4)).variant == "grid"
    assert heuristic_config(SHAPE).variant == "grid"
