"""What the launcher refuses: each wrong argument gets one line that says what is supported. Needs no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouped_problems import Conv, PackedProblem, make_problem

from lhc_kernels import INTERPRETED, KernelConfig, grouped_conv2d

Change = Callable[[PackedProblem], None]


def call(p: PackedProblem, **changes: Any) -> torch.Tensor:
    arguments = {"bias": p.bias, "residual": p.residual, "scale": p.scale, **p.options, **changes}
    return grouped_conv2d(p.x, p.weight, p.tables, **arguments)


def half_weight(p: PackedProblem) -> None:
    p.weight = p.weight.half()


def three_dimensions(p: PackedProblem) -> None:
    p.x = p.x[0]


def double_input(p: PackedProblem) -> None:
    p.x = p.x.double()
    p.weight = p.weight.double()


def no_channels(p: PackedProblem) -> None:
    p.x = p.x[:, :0]


def flat_weight(p: PackedProblem) -> None:
    p.weight = p.weight.flatten()


def two_tables(p: PackedProblem) -> None:
    p.tables = p.tables[:2]


def long_tables(p: PackedProblem) -> None:
    p.tables = [t.long() for t in p.tables]


def unpadded_entries(p: PackedProblem) -> None:
    p.tables[1] = p.tables[1][:-1]


def narrow_filters(p: PackedProblem) -> None:
    p.tables[2] = p.tables[2][:, :8]


def no_tiles(p: PackedProblem) -> None:
    p.tables = [p.tables[0][:1], p.tables[1], p.tables[2][:0]]


def int8_without_scale(p: PackedProblem) -> None:
    p.x, p.weight = p.x.to(torch.int8), p.weight.to(torch.int8)


def int8_with_half_residual(p: PackedProblem) -> None:
    int8_without_scale(p)
    p.scale, p.residual = torch.ones(32), torch.zeros(p.out_size(), dtype=torch.float16)


def weight_elsewhere(p: PackedProblem) -> None:
    p.weight = p.weight.to("meta")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (three_dimensions, ValueError, r"x has shape \(64, 6, 7\): expected \[N, C, H, W\]"),
        (no_channels, ValueError, "at least one channel"),
        (double_input, TypeError, "x is float64: supported are float16, bfloat16, float32, int8; cast it"),
        (half_weight, TypeError, "weight is float16, x is float32: cast one of them"),
        (flat_weight, ValueError, r"expected \[entries, in_block, tile_width\]"),
        (two_tables, ValueError, "tables are int32, int32: expected int32 tile_ptr, entries and filters"),
        (long_tables, ValueError, "tables are int64, int64, int64: expected int32"),
        (unpadded_entries, ValueError, r"expected tile_ptr \[T \+ 1\], entries \[E \+ 1\]"),
        (narrow_filters, ValueError, r"filters \[T, tile_width\] for a weight"),
        (no_tiles, ValueError, "tables have shapes"),
        (int8_without_scale, ValueError, "x is int8 and no scale is given: expected a floating scale"),
        (int8_with_half_residual, ValueError, "residual is float16 .*: expected float32 of shape"),
        (weight_elsewhere, ValueError, "x is on cpu, other tensors on meta: move them"),
    ],
)
def test_wrong_tensors_are_refused(change: Change, error: type[Exception], words: str) -> None:
    problem = make_problem(Conv())
    change(problem)
    with pytest.raises(error, match=words) as caught:
        call(problem)
    assert "\n" not in str(caught.value)


VECTOR = "expected a floating tensor of shape \\(32,\\)"
IMAGE = "expected float32 of shape \\(2, 32, 6, 7\\)"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out_channels": 33}, "out_channels is 33: 2 tiles hold 1 to 32 filters"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"kernel_size": (3,)}, r"kernel_size is \[3\]: expected two integers >= 1"),
        ({"kernel_size": (16, 16), "padding": (9, 9, 9, 9)}, "supported are kh [+] kw up to 31"),
        ({"stride": (0, 1)}, r"stride is \[0, 1\]: expected two integers >= 1"),
        ({"dilation": (1, 1, 1)}, "dilation is"),
        ({"padding": (1, 1)}, r"padding is \[1, 1\]: expected four integers >= 0"),
        ({"padding": (1, 1, -1, 1)}, "top, bottom, left, right"),
        ({"kernel_size": (9, 3)}, "x of 6 x 7 pixels is smaller than the kernel"),
        ({"activation": "gelu"}, "activation is 'gelu': supported are 'none', 'relu', 'silu'"),
        ({"bias": torch.zeros(31)}, f"bias is float32 of shape \\(31,\\): {VECTOR}"),
        ({"scale": torch.zeros(32, dtype=torch.int32)}, f"scale is int32 of shape \\(32,\\): {VECTOR}"),
        ({"residual": torch.zeros(2, 32, 6, 6)}, f"residual is float32 .*: {IMAGE}"),
        ({"residual": torch.zeros(2, 32, 6, 7).half()}, f"residual is float16 .*: {IMAGE}"),
        ({"out": torch.zeros(2, 32, 6, 8)}, f"out is float32 .*: {IMAGE}"),
        ({"out": torch.zeros(2, 32, 6, 7)}, "out is not channels_last: allocate it with memory_format"),
        ({"config": (128, 16)}, r"config is \[128, 16\]: expected nothing, or block_m"),
        ({"config": tuple(KernelConfig(variant="box").to_list())}, "dtype is float32: variant box supports"),
        ({"config": tuple(KernelConfig(splits=3).to_list())}, "splits is 3 with variant grid"),
        ({"config": tuple(KernelConfig(block_m=100).to_list())}, "block_m is 100: supported are the powers"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call(make_problem(Conv()), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 lets kernels run on the CPU")
def test_the_cpu_is_refused_outside_the_interpreter() -> None:
    with pytest.raises(
        ValueError, match="x is on the CPU: the Triton kernel needs a GPU, or TRITON_INTERPRET=1"
    ):
        call(make_problem(Conv()))
