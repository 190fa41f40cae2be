"""int8 activations and weights, and SiLU, through the one operator."""

import os

import pytest
import torch
from op_problems import Problem
from oracle import norm_error
from torch import Tensor

from lhc_triton.planning.schema import ConvGeometry

GEOMETRY = ConvGeometry(2, 12, 10, 9, 8, (3, 3), (2, 1), (1, 2, 0, 1))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.interpreter) if INTERPRETED else "torch",
]


def quantised(pool: str = "none") -> tuple[Problem, Tensor]:
    """Return a problem in int8 beside its answer from the same integers and scales in float64."""
    problem = Problem(GEOMETRY, has_scale=True, has_residual=True, activation="silu", pool=pool)
    problem.x = (problem.x * 40).clamp(-128, 127).to(torch.int8)
    problem.weight = (problem.weight * 60).clamp(-128, 127).to(torch.int8)
    assert problem.scale is not None
    problem.scale = problem.scale / 2000
    return problem, problem.oracle()


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_matches_the_dense_answer(backend: str) -> None:
    problem = Problem(GEOMETRY, has_residual=True, activation="silu", pool="max2x2")
    assert norm_error(problem.run(backend), problem.oracle()) <= 1e-5


@pytest.mark.parametrize("pool", ["none", "max2x2"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS[1:]] if INTERPRETED else ["reference"])
def test_int8_gives_float32_from_exact_sums(backend: str, pool: str) -> None:
    problem, oracle = quantised(pool)
    y = problem.run(backend)
    assert y.dtype == torch.float32
    assert norm_error(y, oracle) <= 1e-5


def test_int8_has_a_fake_kernel() -> None:
    problem, _ = quantised()
    torch.library.opcheck(torch.ops.lhc.grouped_conv2d, (), problem.arguments("reference"))


def test_int8_needs_a_scale() -> None:
    problem, _ = quantised()
    with pytest.raises(ValueError, match="x is int8 and scale is None, expected a factor for each filter"):
        problem.run("reference", scale=None)


def test_int8_is_refused_by_backends_that_lack_it() -> None:
    problem, _ = quantised()
    with pytest.raises(ValueError, match='backend "torch" does not serve int8; use one of float32'):
        problem.run("torch")


def test_int8_weights_are_packed_with_adjacent_input_channels() -> None:
    problem, _ = quantised()
    weight = problem.packed("triton").weight
    assert weight.transpose(1, 2).is_contiguous()
