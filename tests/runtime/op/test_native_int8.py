"""int8 in the native CPU kernel: exact sums against float64, for any layer, and int8 results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_problems import Problem, layers
from oracle import norm_error
from torch import Tensor

from lhc_kernels.cpu import problem
from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.op.backends import unavailable

missing = problem() or unavailable("native", torch.int8, "cpu")
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

ROOT = Path(__file__).resolve().parents[3]

# How integers are drawn: all over, as behind a ReLU, or at the ends of their range.
DRAWN = {
    "any": lambda shape, g: torch.randint(-128, 128, shape, generator=g),
    "non-negative": lambda shape, g: torch.randint(0, 128, shape, generator=g),
    "extreme": lambda shape, g: torch.randint(0, 2, shape, generator=g) * 255 - 128,
    "least": lambda shape, g: torch.full(shape, -128),
    "largest": lambda shape, g: torch.full(shape, 127),
}


def in_int8(case: Problem, inputs: str = "any", weights: str = "any") -> Problem:
    """Turn a problem's operands into integers, with scales that bring the sums near 1."""
    generator = torch.Generator().manual_seed(case.seed)
    x = DRAWN[inputs](case.x.shape, generator).to(torch.int8)
    case.x = x.contiguous(memory_format=torch.channels_last) if case.channels_last else x
    case.weight = DRAWN[weights](case.weight.shape, generator).to(torch.int8)
    fan_in = max(1.0, case.density * case.geometry.in_channels * case.geometry.taps)
    case.scale = (1 + torch.rand(case.geometry.out_channels, generator=generator)) / (5000 * fan_in**0.5)
    return case


def run(case: Problem, **changes: object) -> Tensor:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, or with the largest integer
    try:
        return case.run("native", **changes)
    finally:
        torch.use_deterministic_algorithms(False)


@settings(max_examples=300, deadline=None)
@given(layers(), st.sampled_from(sorted(DRAWN)), st.sampled_from(sorted(DRAWN)))
def test_any_layer_equals_the_dense_convolution_of_its_integers(case, inputs, weights):
    in_int8(case, inputs, weights)
    y, oracle = run(case), case.oracle()
    assert y.dtype == torch.float32
    assert y.shape == oracle.shape
    assert norm_error(y, oracle) < 1e-5


@settings(max_examples=200, deadline=None)
@given(layers(), st.sampled_from(sorted(DRAWN)))
def test_any_layer_rounds_its_result_to_int8(case, inputs):
    in_int8(case, inputs)
    step = torch.tensor(0.01)
    y, expected = run(case, out_step=step), case.run("reference", out_step=step)
    assert y.dtype == torch.int8
    assert y.is_contiguous(memory_format=torch.channels_last)
    off = (y.int() - expected.int()).abs()
    # The sums are the same, but what follows them is rounded once more or less: a tie may fall otherwise.
    assert int(off.max() if off.numel() else 0) <= 1
    assert int(off.sum()) <= 1 + off.numel() // 500


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("pool", ["none", "max2x2"])
def test_the_largest_sums_fit(value, pool):
    # 9 * 14563 products: the most that a call may sum
    geometry = ConvGeometry(1, 14563, 16, 3, 4, (3, 3), (1, 1), (1, 1, 1, 1))
    case = Problem(geometry, in_block=64, out_block=16, density=1.0, has_bias=False, pool=pool)
    in_int8(case)
    case.x.fill_(value), case.weight.fill_(value)
    assert norm_error(run(case), case.oracle()) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_more_products_than_int32_holds_are_refused(backend):
    case = in_int8(Problem(ConvGeometry(1, 14564, 4, 3, 3), in_block=64, density=0.01))
    with pytest.raises(ValueError, match="a sum of 131076 int8 products may exceed int32; up to 131071"):
        case.run(backend)


@pytest.mark.parametrize(("channels", "in_block"), [(34, 34), (34, 32), (33, 1), (7, 3), (64, 64)])
@pytest.mark.parametrize("width", [16, 12, 5, 1])
def test_prepared_weights_and_packed_ones_give_the_same(channels, in_block, width):
    case = in_int8(Problem(ConvGeometry(2, channels, 3 * width, 7, 7), in_block=in_block, out_block=width))
    packed = case.packed("reference").weight
    assert packed.dim() == 3
    assert torch.equal(run(case, weight=packed), run(case))


def test_weights_and_scales_are_read_anew_at_every_call():
    case = in_int8(Problem(ConvGeometry(1, 64, 32, 9, 9), in_block=32, out_block=16))
    arguments = case.arguments("native")
    first = torch.ops.lhc.grouped_conv2d(**arguments)
    arguments["weight"].zero_()
    assert torch.equal(
        torch.ops.lhc.grouped_conv2d(**arguments), case.bias.view(1, -1, 1, 1).expand_as(first)
    )


WRONG = {
    "scale": (lambda c: {"scale": None}, ValueError, "x is int8 and scale is None"),
    "double scale": (
        lambda c: {"scale": c.scale.double()},
        TypeError,
        "scale is torch.float64 .* expected torch.float32",
    ),
    "int8 bias": (
        lambda c: {"bias": c.bias.to(torch.int8)},
        TypeError,
        "bias is torch.int8 .* expected torch.float32",
    ),
    "two steps": (
        lambda c: {"out_step": torch.ones(2)},
        ValueError,
        "out_step is torch.float32 of shape .2,., expected one",
    ),
    "float weight": (
        lambda c: {"weight": c.packed().weight.float()},
        TypeError,
        "weight is torch.float32, x is torch.int8",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_operands_are_refused(wrong):
    changes, kind, message = WRONG[wrong]
    case = in_int8(Problem(ConvGeometry(1, 8, 8, 5, 5)))
    with pytest.raises(kind, match=message):
        case.run("native", **changes(case))


def test_floats_do_not_become_int8():
    case = Problem(ConvGeometry(1, 8, 8, 5, 5))
    with pytest.raises(
        ValueError, match=r"out_step is given and x is torch\.float32; only int8 can stay int8"
    ):
        case.run("native", out_step=torch.ones(1))


VALUES = torch.tensor(
    [0.5, 1.5, -0.5, -1.5, 2.49, 126.6, 127.6, -400.0, float("inf"), -float("inf"), float("nan"), 1e-40]
)


@pytest.mark.parametrize("shape", [(1, 12, 1, 1), (1, 3, 2, 2), (1, 1, 3, 4), (0, 5, 3, 3)])
def test_quantise_rounds_to_the_nearest_and_ties_to_even(shape):
    # loading the native kernel has replaced the implementation of every CPU tensor
    x = VALUES[: torch.Size(shape).numel()].view(shape) * 0.25
    expected = torch.tensor([0, 2, 0, -2, 2, 127, 127, -127, 127, -127, 0, 0])[: x.numel()].view(shape)
    y = torch.ops.lhc.quantise(x, torch.tensor(0.25))
    assert y.dtype == torch.int8
    assert torch.equal(y.long(), expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 40)] * 4), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_quantise_is_what_its_definition_says(shape, dtype, last):
    from lhc_triton.runtime.op.quantise import quantise

    x = torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    step = torch.rand(()) / 20 + 1e-3
    assert torch.equal(torch.ops.lhc.quantise(x, step), quantise(x, step))


def test_quantise_reads_any_layout():
    x = torch.randn(3, 40, 18, 22)[:, ::2, 1::3].transpose(2, 3)
    expected = torch.ops.lhc.quantise(x.contiguous(), torch.tensor(0.1))
    assert torch.equal(torch.ops.lhc.quantise(x, torch.tensor(0.1)), expected)
    torch.library.opcheck(torch.ops.lhc.quantise, (x, torch.tensor(0.1)))


def test_without_vnni_it_is_refused_in_one_line():
    code = (
        "import torch\n"
        "from lhc_triton.runtime.op.backends import unavailable\n"
        "print(unavailable('native', torch.float32, 'cpu'), unavailable('native', torch.int8, 'cpu'))\n"
    )
    # the flags of a build that another test makes
    environment = {**os.environ, "LHC_TRITON_NATIVE_FLAGS": "-O1 -mavx2 -mfma", "OMP_NUM_THREADS": "1"}
    environment.pop("LHC_TRITON_CACHE", None)
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        'None backend "native" does not serve int8 here: the processor (or its flags) has no VNNI\n'
    )
