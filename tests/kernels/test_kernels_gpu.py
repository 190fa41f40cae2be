"""The Triton kernels against the float64 dense answer, compiled and run on a GPU."""

import os
from dataclasses import replace

import pytest
import torch
from grouped_problems import (
    FLOATS,
    SPECIAL_CASES,
    TOLERANCE,
    VARIANT_CASES,
    Conv,
    cases_by_dtype,
    check,
    check_special_values,
    config,
    convs,
    launch_shape,
    make_problem,
    run,
)
from hypothesis import given, seed, settings
from oracle import norm_error

from lhc_kernels import KernelConfig, candidate_configs, config_problem, grouped_conv2d, launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets kernels"
    ),
]

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
NAMED = [pytest.param(conv, id=name) for name, conv in cases_by_dtype()]
LAYER = Conv(8, 256, 256, 28, 28, density=0.1, activation="relu", residual=True)


def skip_unless_served(conv: Conv) -> None:
    """Skip where this GPU has no tensor descriptors."""
    if conv.config and KernelConfig.from_list(conv.config).variant == "box":
        major, minor = torch.cuda.get_device_capability()
        if torch.version.hip or (major, minor) < (9, 0):
            pytest.skip("variant box needs compute capability 9.0")


@pytest.mark.parametrize("conv", NAMED)
def test_named_convolutions_match_the_dense_answer(conv: Conv) -> None:
    skip_unless_served(conv)
    check(conv, "cuda")


@pytest.mark.parametrize("part", range(15))  # each compiles ten kernels or so: for workers side by side
def test_random_convolutions_match_the_dense_answer(part: int) -> None:
    @seed(part)
    @settings(max_examples=10, deadline=None, database=None)
    @given(convs())
    def matches(conv: Conv) -> None:
        problem = make_problem(conv).to("cuda")
        shape = launch_shape(problem)
        if conv.config and config_problem(KernelConfig.from_list(conv.config), shape) is not None:
            conv = replace(conv, config=())  # a box on a GPU without them
        check(conv, "cuda")

    matches()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_width", [16, 64, 128, 256])
def test_layers_of_a_real_size_match_the_dense_answer(tile_width: int, dtype: torch.dtype) -> None:
    check(replace(LAYER, tile_width=tile_width, dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_width", [16, 128])
def test_every_candidate_matches_the_dense_answer(tile_width: int, dtype: torch.dtype) -> None:
    problem = make_problem(replace(LAYER, tile_width=tile_width, dtype=dtype))
    expected, moved = problem.expected(), problem.to("cuda")
    shape = launch_shape(moved)
    for candidate in candidate_configs(shape):
        moved.options["config"] = candidate.to_list()
        error = norm_error(run(moved), expected)
        assert error <= TOLERANCE[dtype], f"norm error {error:.3g} for {candidate}"


@pytest.mark.parametrize("splits", [2, 5, 16])
def test_a_split_layer_gives_the_same_bits_every_time(splits: int) -> None:
    conv = replace(LAYER, batch=1, height=7, width=7, density=1.0, dtype=torch.float16)
    problem = make_problem(replace(conv, config=config(64, 16, 32, 4, 3, 2, variant="split", splits=splits)))
    moved = problem.to("cuda")
    first = run(moved)
    assert norm_error(first, problem.expected()) <= TOLERANCE[torch.float16]
    assert all(torch.equal(run(moved), first) for _ in range(20))


REPLAYED = {
    "grid": (128, 16, 32, 4, 4, 2),
    "grid_wide": (128, 128, 32, 8, 3, 2),
    "grid_one_entry": (128, 64, 32, 4, 5, 1),
    "persistent": (128, 64, 32, 8, 4, 2),
    "resident": (64, 16, 32, 4, 4, 1),
    "split": (64, 64, 32, 4, 4, 2),
    "box": (64, 64, 32, 4, 4, 1),
}


@pytest.mark.parametrize("name", REPLAYED)
def test_a_thousand_replays_give_the_same_bits(name: str) -> None:
    """Triton 3.6.0 puts no proxy fence between asynchronous copies and wgmma: a race would show here."""
    block_n, kind = REPLAYED[name][1], name.split("_")[0]
    codes = config(*REPLAYED[name], variant=kind, splits=2 if kind == "split" else 1)
    conv = replace(LAYER, tile_width=block_n, dtype=torch.float16, density=0.3, config=codes)
    skip_unless_served(conv)
    problem = make_problem(conv)
    p = problem.to("cuda")
    expected = run(p)
    assert norm_error(expected, problem.expected()) <= TOLERANCE[torch.float16]
    expected = expected.to("cuda", memory_format=torch.channels_last)
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_conv2d(p.x, p.weight, p.tables, p.bias, p.residual, p.scale, out=out, **p.options)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out.fill_(float("nan"))
        graph.replay()
        wrong += (out != expected).any()
    assert int(wrong) == 0


@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_nan_and_infinity_spread_through_live_entries_only(name: str) -> None:
    skip_unless_served(SPECIAL_CASES[name])
    check_special_values(SPECIAL_CASES[name], "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_treat_nan_and_infinity_so_too(dtype: torch.dtype) -> None:
    check_special_values(replace(SPECIAL_CASES["plain_3x3"], dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", FLOATS)
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
    assert norm_error(run(problem.to("cuda")), problem.expected()) <= bound


@pytest.mark.parametrize("conv", [Conv(stride=(2, 1), residual=True), *VARIANT_CASES.values()])
def test_int64_offsets_give_the_same_bits(conv: Conv, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_served(conv)
    problem = make_problem(conv).to("cuda")
    expected = run(problem)
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 0)
    assert torch.equal(run(problem), expected)


def test_a_tensor_of_more_than_2_31_elements_is_indexed_right() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24e9:
        pytest.skip("needs 24 GB of memory")
    conv = Conv(1, 16, 16, 1, 1, (1, 1), padding=(0, 0, 0, 0), in_block=16, density=2.0, dtype=torch.float16)
    p = make_problem(conv).to("cuda")
    x = torch.zeros((1, 16, 2**14, 2**13 + 1), dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[..., -1:, -1:] = p.x
    y = grouped_conv2d(x, p.weight, p.tables, p.bias, **p.options)
    assert torch.equal(y[..., -1:, -1:].cpu(), run(p))


@pytest.mark.parametrize("name", ["plain", *VARIANT_CASES])
def test_a_launch_can_be_captured_in_a_cuda_graph(name: str) -> None:
    conv = VARIANT_CASES.get(name, Conv(dtype=torch.float16))
    skip_unless_served(conv)
    p = make_problem(conv).to("cuda")
    expected = run(p)
    graph = torch.cuda.CUDAGraph()
    out = torch.empty_like(expected, device="cuda", memory_format=torch.channels_last)
    with torch.cuda.graph(graph):
        grouped_conv2d(p.x, p.weight, p.tables, p.bias, p.residual, p.scale, out=out, **p.options)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out.cpu(), expected)
