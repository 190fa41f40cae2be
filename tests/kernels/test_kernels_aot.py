"""What the compiler makes of the kernel for GPUs that need not be there: registers, copies, tensor cores."""

import os
from dataclasses import replace
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled only where TRITON_INTERPRET is unset", allow_module_level=True)

import triton

from lhc_kernels import KernelConfig, LaunchShape, choose_config
from lhc_kernels.aot import CompileReport, compile_config

pytestmark = pytest.mark.aot

MANY = 64 * 56 * 56
FEW = 7 * 7

SLACK = 1.0 if triton.__version__.startswith("3.7.") else 1.4
"""The ceilings are the pinned Triton's; 3.6 and 3.9 take up to 1.4 times the registers for the same code."""

CEILING = {16: 80, 32: 100, 64: 128, 128: 128}
"""Registers by filters of a program, on sm_90 without a residual; at 128 two programs of eight warps fit."""


def heuristic(dtype: str, in_block: int, tile_width: int, pixels: int, in_channels: int) -> KernelConfig:
    shape = LaunchShape(pixels, in_channels, in_block, tile_width, 256 // tile_width, (3, 3), dtype)
    return choose_config(shape)[0]


def compiled(
    dtype: str,
    in_block: int,
    tile_width: int,
    pixels: int = MANY,
    in_channels: int = 256,
    target: int = 90,
    **options: Any,
) -> CompileReport:
    return compile_config(
        heuristic(dtype, in_block, tile_width, pixels, in_channels),
        target,
        dtype,
        in_channels=in_channels,
        in_block=in_block,
        tile_width=tile_width,
        **options,
    )


@pytest.mark.parametrize("pixels", [MANY, FEW], ids=["many_pixels", "few_pixels"])
@pytest.mark.parametrize("tile_width", [16, 32, 64, 128])
@pytest.mark.parametrize("in_block", [16, 32, 64])
def test_half_precision_runs_on_wgmma_with_pipelined_wide_copies(
    in_block: int, tile_width: int, pixels: int
) -> None:
    report = compiled("float16", in_block, tile_width, pixels)
    assert report.wgmma
    assert report.async_copy
    assert report.copies_in_flight == 2 * (report.config.num_stages - 2)
    assert report.stack_bytes == 0
    assert report.registers <= SLACK * CEILING[tile_width]
    assert report.async_bytes[-1] == 16
    assert report.store_bytes == (2, 16)


@pytest.mark.parametrize("tile_width", [16, 128])
def test_bfloat16_compiles_as_float16_does(tile_width: int) -> None:
    bfloat, half = (compiled(dtype, 32, tile_width) for dtype in ("bfloat16", "float16"))
    assert bfloat.wgmma
    assert bfloat.async_copy
    assert (bfloat.registers, bfloat.stack_bytes) == (half.registers, half.stack_bytes)


@pytest.mark.parametrize("tile_width", [16, 32, 64, 128])
@pytest.mark.parametrize("in_block", [16, 32])
def test_float32_is_pipelined_without_tensor_cores(in_block: int, tile_width: int) -> None:
    report = compiled("float32", in_block, tile_width)
    assert not report.mma
    assert report.async_copy
    assert report.copies_in_flight == 2 * (report.config.num_stages - 2)
    assert report.stack_bytes == 0
    assert report.registers <= SLACK * 112


def test_tf32_runs_on_tensor_cores() -> None:
    config = replace(heuristic("float32", 32, 64, MANY, 256), precision="tf32")
    report = compile_config(config, 90, "float32", tile_width=64)
    assert report.wgmma
    assert report.stack_bytes == 0


@pytest.mark.parametrize("tile_width", [64, 128])
def test_a_residual_and_int64_offsets_do_not_spill(tile_width: int) -> None:
    for options in ({"residual": True, "scale": True}, {"index64": True}):
        report = compiled("float16", 32, tile_width, **options)
        assert report.stack_bytes == 0
        assert report.registers <= SLACK * 200


@pytest.mark.parametrize(
    ("in_block", "in_channels"), [(24, 96), (48, 96), (8, 64), (128, 256), (32, 40), (12, 36)]
)
def test_uneven_blocks_keep_asynchronous_copies(in_block: int, in_channels: int) -> None:
    report = compiled("float16", in_block, 64, in_channels=in_channels)
    assert report.wgmma
    assert report.async_copy
    assert report.stack_bytes == 0


@pytest.mark.parametrize("tile_width", [16, 64, 128])
@pytest.mark.parametrize(("in_block", "in_channels"), [(32, 37), (3, 3), (25, 100)])
def test_odd_channels_do_not_spill(in_block: int, in_channels: int, tile_width: int) -> None:
    report = compiled("float16", in_block, tile_width, in_channels=in_channels)
    assert not report.async_copy
    assert report.stack_bytes == 0
    assert report.registers <= SLACK * 128


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("target", [80, 89])
def test_older_gpus_get_asynchronous_copies_and_no_stack(target: int, dtype: str) -> None:
    report = compiled(dtype, 32, 64, target=target)
    assert report.target == f"sm_{target}"
    assert report.mma == (dtype == "float16")
    assert not report.wgmma
    assert report.async_copy
    assert report.stack_bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (1, 1)},
        {"kernel_size": (7, 7), "stride": (2, 2)},
        {"bias": False, "relu": False, "out_channels": 250},
        {"ones": ("pixels", "tiles", "height", "width", "out_height", "out_width", "pad_top", "pad_left")},
        {"ones": ("pixels", "height", "width", "out_height", "out_width"), "index64": True},
        {"ones": ("out_channels",), "out_channels": 1},
    ],
    ids=["1x1", "7x7", "no_epilogue", "all_ones", "ones_int64", "one_filter"],
)
def test_every_specialisation_of_a_launch_compiles(options: dict[str, Any]) -> None:
    report = compiled("float16", 32, 64, **options)
    assert report.wgmma
    assert report.async_copy
    assert report.stack_bytes == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_relu_compiles_to_nothing_that_drops_nan(dtype: str) -> None:
    ptx = compiled(dtype, 32, 64).ptx
    assert "max.f32" not in ptx
    assert "max.f16" not in ptx


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'float8': supported are float16, bfloat16, float32"):
        compile_config(KernelConfig(), dtype="float8")
