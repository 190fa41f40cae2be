import math

import pytest
import torch

from lhc_triton.finite import all_finite, has_nan


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
)
@pytest.mark.parametrize("place", [0, 17, -1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_odd_value_anywhere_is_found(dtype, place, bad):
    values = torch.randn(4, 5, 6).to(dtype)
    assert all_finite(values)
    assert not has_nan(values)
    values.view(-1)[place] = bad
    assert not all_finite(values)
    assert has_nan(values) == math.isnan(bad)


def test_sums_that_overflow_or_cancel_say_nothing():
    assert all_finite(torch.full((64,), 3e38))
    assert all_finite(torch.full((64,), 6e4, dtype=torch.float16))
    both = torch.tensor([math.inf, 1.0, -math.inf])
    assert not all_finite(both)
    assert not has_nan(both)
    assert all_finite(torch.empty(0))
    assert all_finite(torch.arange(9))
    assert not has_nan(torch.empty(0))
