"""The native CPU kernel in half types: prepared weights, rounding, SiLU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_problems import TOLERANCE, Problem
from oracle import norm_error

from lhc_kernels.cpu import problem
from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.op.packing import pack

pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))
HALVES = (torch.float16, torch.bfloat16)
GEOMETRY = ConvGeometry(2, 40, 30, 9, 7)


def prepared(case: Problem) -> torch.Tensor:
    """Pack as a layer of this type does: weights of that type first, then as the kernel reads them."""
    return pack(case.layer, case.weight.to(case.dtype), backend="native").weight


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("channels", "in_block"), [(40, 8), (40, 5), (39, 8), (37, 37), (2, 2), (1, 1)])
def test_weights_prepared_once_give_the_bits_of_those_prepared_at_each_call(channels, in_block, dtype):
    case = Problem(
        ConvGeometry(2, channels, 30, 9, 7), in_block=in_block, out_block=12, density=0.6, dtype=dtype,
        has_residual=True, activation="relu",
    )  # fmt: skip
    canonical = pack(case.layer, case.weight.to(dtype), backend="reference").weight
    assert canonical.dtype == dtype
    assert prepared(case).dtype == torch.float32 or prepared(case).dim() == 4
    y = case.run("native", weight=prepared(case))
    assert torch.equal(y, case.run("native", weight=canonical))
    assert norm_error(y, case.oracle()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 70), filters=st.integers(1, 70), in_block=st.sampled_from([1, 2, 6, 16, 32]),
    out_block=st.sampled_from([1, 4, 7, 16, 32]), groups=st.integers(1, 3), pool=st.booleans(),
    activation=st.sampled_from(["none", "relu", "silu"]), flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_layer_of_half_type_is_summed_in_float32(
    dtype, channels, filters, in_block, out_block, groups, pool, activation, flags, seed
):
    residual, scale, channels_last, shuffle = flags
    case = Problem(
        ConvGeometry(2, channels, filters, 6, 5, stride=(1, 2)), in_block, out_block, 0.4, groups, shuffle,
        dtype, channels_last, seed, has_residual=residual, has_scale=scale, activation=activation,
        pool="max2x2" if pool else "none",
    )  # fmt: skip
    assert norm_error(case.run("native", weight=prepared(case)), case.oracle()) < TOLERANCE[dtype]


def test_bfloat16_results_are_rounded_to_the_nearest_even():
    # One channel, weight 1: the result is residual + bias, summed in float32.
    case = Problem(
        ConvGeometry(1, 2, 64, 1, 64, (1, 1), (1, 1), (0, 0, 0, 0)), in_block=2, out_block=16, density=1.0,
        dtype=torch.bfloat16, has_residual=True,
    )  # fmt: skip
    case.x.zero_()
    case.residual[0, 0, 0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-39, 3.3e38])
    exact = case.residual.float() + case.bias.float().view(1, -1, 1, 1)
    y = case.run("native")
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.nan_to_num(), exact.bfloat16().nan_to_num())


def test_silu_is_as_exact_as_float32_can_be():
    # A layer of no entries, so that the residual alone is activated.
    values = torch.cat(
        [torch.linspace(-110, 110, 40000), torch.logspace(-44, 38, 10000), -torch.logspace(-44, 38, 10000)]
    )
    geometry = ConvGeometry(1, 4, 16, 1, values.numel() // 16, (1, 1), (1, 1), (0, 0, 0, 0))
    case = Problem(geometry, density=0.0, has_bias=False, activation="silu", has_residual=True)
    case.residual = values.view(1, 16, 1, -1)
    y, exact = case.run("native").double(), F.silu(case.residual.double())
    error = (y - exact).abs() / exact.abs().clamp(min=1e-30)  # exp(-x) overflows beyond
    assert float(error.max()) < 1e-6


def test_silu_of_special_values_is_torch_s():
    geometry = ConvGeometry(1, 4, 4, 1, 4, (1, 1), (1, 1), (0, 0, 0, 0))
    case = Problem(geometry, density=0.0, has_bias=False, activation="silu", has_residual=True)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    case.residual = special.expand(1, 4, 1, 4).contiguous()
    y, expected = case.run("native"), F.silu(case.residual)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_a_weight_in_pairs_is_for_bfloat16_alone():
    case = Problem(GEOMETRY, dtype=torch.float16)
    pairs = torch.zeros(case.packed().weight.shape[0], 4, 4, 2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16, x is torch.float16; pack it in x's type"):
        case.run("native", weight=pairs)
    with pytest.raises(ValueError, match=r"expected \[E, in_block, tile_width\]"):
        case.run("reference", weight=pairs)


def test_another_processor_s_weight_in_pairs_is_read_all_the_same():
    # Odd channels: no processor takes them in pairs, but they may have been packed so.
    case = Problem(ConvGeometry(1, 39, 20, 6, 6), in_block=8, out_block=4, dtype=torch.bfloat16, density=0.5)
    canonical = pack(case.layer, case.weight.bfloat16(), backend="reference").weight
    pairs = canonical.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
    assert torch.equal(case.run("native", weight=pairs), case.run("native", weight=canonical))
