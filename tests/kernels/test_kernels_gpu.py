"""The Triton kernel against the float64 dense answer, compiled and run on a GPU."""

import os
from dataclasses import replace

import pytest
import torch
from grouped_problems import (
    CASES,
    SPECIAL_CASES,
    TOLERANCE,
    Conv,
    check,
    check_special_values,
    config,
    convs,
    make_problem,
    relative_error,
    run,
)
from hypothesis import given, settings

from lhc_kernels import grouped_conv2d, launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets kernels"
    ),
]

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_named_convolutions_match_the_dense_answer(name: str, dtype: torch.dtype) -> None:
    check(replace(CASES[name], dtype=dtype), "cuda")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(convs())
def test_random_convolutions_match_the_dense_answer(conv: Conv) -> None:
    check(conv, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_width", [16, 64, 128, 256])
def test_layers_of_a_real_size_match_the_dense_answer(tile_width: int, dtype: torch.dtype) -> None:
    conv = Conv(4, 256, 256, 28, 28, tile_width=tile_width, density=0.1, dtype=dtype, activation="relu")
    check(conv, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_nan_and_infinity_spread_through_live_entries_only(name: str, dtype: torch.dtype) -> None:
    check_special_values(replace(SPECIAL_CASES[name], dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_keeps_nan(dtype: torch.dtype) -> None:
    problem = make_problem(Conv(dtype=dtype, activation="relu"))
    assert problem.bias is not None
    problem.bias[3] = float("nan")
    y = run(problem.to("cuda"))
    assert y[:, 3].isnan().all()
    assert (y[:, [f for f in range(32) if f != 3]] >= 0).all()


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 1e-3), ("tf32x3", 1e-5)])
def test_reduced_precision_of_float32_stays_in_its_bound(precision: str, bound: float) -> None:
    problem = make_problem(Conv(config=config(64, 16, 32, 4, 3, 1, precision=precision)))
    assert relative_error(run(problem.to("cuda")), problem.expected()) <= bound


def test_int64_offsets_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(Conv(stride=(2, 1), residual=True)).to("cuda")
    expected = run(problem)
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 0)
    assert torch.equal(run(problem), expected)


def test_a_launch_can_be_captured_in_a_cuda_graph() -> None:
    problem = make_problem(Conv(dtype=torch.float16)).to("cuda")
    expected = run(problem)
    graph = torch.cuda.CUDAGraph()
    p = problem
    out = torch.empty_like(expected, device="cuda", memory_format=torch.channels_last)
    with torch.cuda.graph(graph):
        grouped_conv2d(p.x, p.weight, p.tables, p.bias, out=out, **p.options)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out.cpu(), expected)
