"""Plan, pack and run together: whatever tiles the planner forms, the numbers are the dense convolution's."""

import pytest
import torch
from hypothesis import assume, given, settings
from op_problems import TOLERANCE, Problem, problems
from oracle import norm_error

from lhc_triton.planning import COST_MODELS, ConvGeometry, plan_layer
from lhc_triton.planning.backends import BACKENDS
from lhc_triton.runtime.op.packing import pack


def planned(problem: Problem, priced: str) -> Problem:
    problem.layer = plan_layer(problem.layer.topology, COST_MODELS[priced])
    return problem


@pytest.mark.parametrize("priced", COST_MODELS)
@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@settings(max_examples=40, deadline=None)
@given(problem=problems((torch.float32, torch.float64, torch.bfloat16)))
def test_a_planned_layer_equals_the_dense_convolution(backend, priced, problem):
    assume(str(problem.dtype).removeprefix("torch.") in BACKENDS[backend].dtypes)
    y = planned(problem, priced).run(backend)
    assert norm_error(y, problem.oracle()) <= TOLERANCE[problem.dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(2, 64, 48, 28, 27),
        ConvGeometry(2, 70, 50, 29, 31, (3, 3), (2, 2)),
        ConvGeometry(2, 64, 64, 14, 14, (1, 1), (1, 1), (0, 0, 0, 0)),
        ConvGeometry(1, 33, 40, 24, 25, (5, 3), (1, 2), (2, 1, 0, 3), (2, 1)),
    ],
    ids=["3x3", "stride 2", "1x1", "odd"],
)
def test_a_gpu_gives_the_dense_convolution(backend, dtype, channels_last, geometry):
    problem = Problem(
        geometry, in_block=32, out_block=16, density=0.3, dtype=dtype, has_residual=True, activation="relu",
        pool="max2x2", channels_last=channels_last,
    )  # fmt: skip
    problem = planned(problem, "triton")
    packed = pack(problem.layer, problem.weight, device="cuda", backend=backend)
    there = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in problem.arguments(backend).items()
    }
    there |= {"weight": packed.weight, "tables": packed.tables}
    y = torch.ops.lhc.grouped_conv2d(**there)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert norm_error(y.cpu(), problem.oracle()) <= TOLERANCE[dtype]


@pytest.mark.interpreter
@pytest.mark.parametrize("pool", ["none", "max2x2"])
def test_the_operator_runs_triton_in_the_interpreter(pool):
    problem = Problem(
        ConvGeometry(1, 20, 12, 6, 5), in_block=16, out_block=8, has_residual=True, has_scale=True,
        activation="relu", pool=pool,
    )  # fmt: skip
    problem = planned(problem, "triton")
    y = problem.run("triton")
    assert y.stride() == problem.run("reference").stride()
    assert norm_error(y, problem.oracle()) <= 1e-5
