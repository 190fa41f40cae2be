"""Whole networks on the Triton backend, in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import norm_error
from runtime_networks import image, resnet

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2)], ids=str)
def test_a_resnet_runs_on_the_triton_backend(dtype: torch.dtype, tolerance: float) -> None:
    from lhc_triton.runtime.network.accelerate import accelerate

    model = resnet().to(dtype)
    x = image(batch=1, size=8).to(dtype)
    fast = accelerate(model, x, backend="triton", tune="off")
    rows = fast.report()["layers"]
    assert {row["backend"] for row in rows[1:]} == {"triton"}
    with torch.no_grad():
        assert norm_error(fast(x), copy.deepcopy(model).double()(x.double())) < tolerance
