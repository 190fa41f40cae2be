"""The Triton kernel against the float64 dense answer, in Triton's CPU interpreter."""

import os

import pytest
from oracle import norm_error

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted only under TRITON_INTERPRET=1", allow_module_level=True)

from dataclasses import replace

import numpy as np
import torch
import triton
from grouped_problems import (
    FLOATS,
    SPECIAL_CASES,
    TOLERANCE,
    VARIANT_CASES,
    Conv,
    cases_by_dtype,
    check,
    check_special_values,
    convs,
    few_processors,
    launch_shape,
    make_problem,
    run,
)
from hypothesis import given, settings

from lhc_kernels import KernelConfig, candidate_configs, cost_sheet, grouped_conv2d, launch
from lhc_kernels.grouped_conv import grouped_conv2d_fwd_kernel

OLD_TRITON = triton.__version__.startswith("3.6.")
NEW_NUMPY = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(OLD_TRITON and NEW_NUMPY, reason="Triton 3.6 interprets loops with numpy < 2.4 only"),
]

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in FLOATS]
NAMED = [pytest.param(conv, id=name) for name, conv in cases_by_dtype()]


@pytest.mark.parametrize("conv", NAMED)
def test_named_convolutions_match_the_dense_answer(conv: Conv) -> None:
    with few_processors():
        check(conv)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convs())
def test_random_convolutions_match_the_dense_answer(conv: Conv) -> None:
    with few_processors():
        check(conv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_candidates_match_the_dense_answer(dtype: torch.dtype) -> None:
    conv = Conv(1, 64, 64, 9, 8, tile_width=32, density=0.2, residual=True, activation="silu", dtype=dtype)
    problem = make_problem(conv)
    shape, expected = launch_shape(problem), problem.expected()
    for candidate in candidate_configs(shape, 6):
        problem.options["config"] = candidate.to_list()
        error = norm_error(run(problem), expected)
        assert error <= TOLERANCE[dtype], f"norm error {error:.3g} for {candidate}"


def test_persistent_programs_take_several_turns() -> None:
    problem = make_problem(VARIANT_CASES["persistent"])
    with few_processors():
        shape = launch_shape(problem)
    config = KernelConfig.from_list(VARIANT_CASES["persistent"].config)
    sheet = cost_sheet(config, shape)
    assert sheet.programs > 2 * sheet.occupancy * shape.processors


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_without_entries_gives_the_epilogue_of_zero(dtype: torch.dtype) -> None:
    check(Conv(dtype=dtype, scale=True, residual=True, activation="relu"), patterns=[[], [0, 4, 17]])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, on inf - inf
@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_nan_and_infinity_spread_through_live_entries_only(name: str) -> None:
    with few_processors():
        check_special_values(SPECIAL_CASES[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_keeps_nan(dtype: torch.dtype) -> None:
    problem = make_problem(Conv(dtype=dtype, activation="relu"))
    assert problem.bias is not None
    problem.bias[3] = float("nan")
    y = run(problem)
    assert y[:, 3].isnan().all()
    assert (y[:, [f for f in range(32) if f != 3]] >= 0).all()


def test_denormals_are_kept() -> None:
    conv = Conv(in_channels=1, in_block=1, out_channels=1, tile_width=1, kernel=(1, 1), padding=(0, 0, 0, 0))
    problem = make_problem(replace(conv, bias=False), patterns=[[0]])
    problem.x.fill_(1e-40)
    problem.weight.fill_(1.0)
    assert torch.equal(run(problem), torch.full(problem.out_size(), 1e-40))


@pytest.mark.parametrize("conv", [Conv(stride=(2, 1), residual=True), *VARIANT_CASES.values()])
def test_int64_offsets_give_the_same_bits(conv: Conv, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(conv)
    expected = run(problem)
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 0)
    assert torch.equal(run(problem), expected)


def test_an_output_is_allocated_channels_last_and_runs_repeat_bit_for_bit() -> None:
    problem = make_problem(Conv())
    p = problem
    y = grouped_conv2d(p.x, p.weight, p.tables, p.bias, **p.options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, run(problem))


def test_an_empty_batch_gives_an_empty_output() -> None:
    p = make_problem(Conv())
    y = grouped_conv2d(p.x[:0], p.weight, p.tables, p.bias, **p.options)
    assert y.shape == (0, 32, 6, 7)


def test_strided_arguments_are_read_by_value() -> None:
    problem = make_problem(Conv(scale=True, residual=True))
    expected = run(problem)
    p = problem
    assert p.bias is not None
    assert p.scale is not None
    p.bias = torch.stack([p.bias, -p.bias], 1)[:, 0]
    p.scale = torch.stack([p.scale, -p.scale], 1)[:, 0]
    p.weight = p.weight.transpose(0, 2).contiguous().transpose(0, 2)
    p.tables = [torch.stack([t, -t], -1)[..., 0] for t in p.tables]
    assert torch.equal(run(problem), expected)


def test_the_kernel_under_test_is_the_interpreted_one() -> None:
    assert type(grouped_conv2d_fwd_kernel).__name__ == "InterpretedFunction"
