"""The backends of the host against a dense convolution in float64."""

import pytest
import torch
from hypothesis import assume, given, settings
from op_problems import TOLERANCE, Problem, problems
from oracle import norm_error

from lhc_triton.planning.backends import BACKENDS
from lhc_triton.planning.schema import ConvGeometry

HOST = ("reference", "torch", "native")
many = settings(max_examples=120, deadline=None)
some = settings(max_examples=40, deadline=None)


def check(problem: Problem, backend: str) -> None:
    y = problem.run(backend)
    oracle = problem.oracle()
    assert y.shape == oracle.shape
    assert y.dtype == problem.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert norm_error(y, oracle) <= TOLERANCE[problem.dtype]


@pytest.mark.parametrize("backend", HOST)
@many
@given(problem=problems((torch.float32, torch.float64)))
def test_any_layer_equals_the_dense_convolution(backend, problem):
    assume(str(problem.dtype).removeprefix("torch.") in BACKENDS[backend].dtypes)
    check(problem, backend)


@pytest.mark.parametrize("backend", HOST)
@some
@given(problem=problems((torch.float16, torch.bfloat16)))
def test_half_types_are_summed_in_float32(backend, problem):
    check(problem, backend)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(1, 64, 48, 56, 56),
        ConvGeometry(3, 96, 64, 29, 31, (3, 3), (2, 2)),
        ConvGeometry(2, 64, 64, 30, 30, (1, 1), (2, 2), (0, 0, 0, 0)),
        ConvGeometry(2, 64, 128, 28, 28, (1, 1), (1, 1), (0, 0, 0, 0)),
        ConvGeometry(2, 64, 32, 24, 25, (3, 3), (2, 2), (2, 2, 2, 2), (2, 2)),
        ConvGeometry(1, 70, 50, 40, 40, (7, 5), (2, 1), (3, 3, 2, 2)),
    ],
    ids=["3x3", "stride 2", "1x1 stride 2", "1x1", "dilated stride 2", "7x5"],
)
def test_realistic_layers_equal_the_dense_convolution(geometry, channels_last):
    for groups in (1, 2):
        problem = Problem(
            geometry, in_block=32, out_block=16, density=0.3, groups_per_tile=groups,
            channels_last=channels_last, activation="relu", has_residual=True,
        )  # fmt: skip
        check(problem, "torch")


def test_many_pixels_are_computed_in_chunks(monkeypatch):
    from lhc_triton.runtime.op import torch_backend

    monkeypatch.setattr(torch_backend, "CACHED_BYTES", 0)
    monkeypatch.setattr(torch_backend, "MIN_CHUNK", 37)
    for channels_last in (False, True):
        geometry = ConvGeometry(3, 12, 10, 11, 13)
        problem = Problem(geometry, groups_per_tile=2, shuffle=True, channels_last=channels_last)
        check(problem, "torch")


@pytest.mark.parametrize("backend", HOST)
def test_inputs_that_are_views_are_read_in_place(backend):
    problem = Problem(ConvGeometry(2, 8, 8, 9, 9, (1, 1), padding=(0, 0, 0, 0)))
    oracle = problem.oracle()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        wide = torch.zeros(4, 8, 9, 9).contiguous(memory_format=memory_format)
        wide[1:3] = problem.x
        assert norm_error(problem.run(backend, x=wide[1:3]), oracle) < 1e-5
        rows = torch.zeros(2, 8, 9, 18).contiguous(memory_format=memory_format)
        rows[..., ::2] = problem.x
        assert norm_error(problem.run(backend, x=rows[..., ::2]), oracle) < 1e-5


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_poisoned_channel_reaches_only_the_tiles_that_read_it(backend, poison):
    problem = Problem(ConvGeometry(1, 16, 16, 6, 6), density=0.2, seed=3)
    clean = problem.run(backend)
    blocks = problem.layer.topology.block_mask()
    block = next(b for b in range(blocks.shape[1]) if 0 < blocks[:, b].any((1, 2)).sum() < blocks.shape[0])
    x = problem.x.clone()
    x[:, block * 8] = poison
    y = problem.run(backend, x=x)
    for group in range(blocks.shape[0]):
        filters = slice(group * 4, group * 4 + 4)
        if blocks[group, block].any():
            assert not y[:, filters].isfinite().all()
        else:
            assert torch.equal(y[:, filters], clean[:, filters])


@pytest.mark.parametrize("backend", HOST)
def test_relu_keeps_nan(backend):
    problem = Problem(ConvGeometry(1, 8, 4, 3, 3), density=1.0, activation="relu")
    assert problem.run(backend, x=torch.full_like(problem.x, float("nan"))).isnan().all()


@pytest.mark.parametrize("backend", HOST)
def test_denormal_inputs_are_kept(backend):
    problem = Problem(ConvGeometry(1, 8, 4, 3, 3), density=1.0, has_bias=False)
    problem.x = problem.x * 1e-39
    assert norm_error(problem.run(backend), problem.oracle()) < 1e-4


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("backend", HOST)
def test_no_output_is_left_unwritten(backend, has_bias):
    problem = Problem(
        ConvGeometry(2, 12, 10, 7, 7),
        density=0.05,
        seed=1,
        groups_per_tile=2,
        shuffle=True,
        has_bias=has_bias,
    )
    assert any(not tile.entries for tile in problem.layer.tiles)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        y = problem.run(backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert norm_error(y, problem.oracle()) < 1e-5


@pytest.mark.parametrize("backend", HOST)
def test_the_same_call_gives_the_same_bits(backend):
    problem = Problem(ConvGeometry(2, 40, 24, 12, 12), in_block=32, out_block=8, groups_per_tile=2)
    first = problem.run(backend)
    assert all(torch.equal(first, problem.run(backend)) for _ in range(3))


@pytest.mark.parametrize("backend", HOST)
def test_inputs_are_left_as_they_were(backend):
    problem = Problem(ConvGeometry(2, 16, 12, 8, 8), has_residual=True, has_scale=True, activation="relu")
    arguments = problem.arguments(backend)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    torch.ops.lhc.grouped_conv2d(**arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())
