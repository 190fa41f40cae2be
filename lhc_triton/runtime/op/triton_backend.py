"""Backend "triton": the kernels of lhc_kernels."""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from lhc_triton.planning.backends import Backend
from lhc_triton.planning.cost import TRITON
from lhc_triton.runtime.op.call import Call
from lhc_triton.runtime.op.epilogue import in_format


def run(call: Call) -> Tensor:
    """Run a call on the GPU, or in Triton's interpreter."""
    # Imported here because it imports Triton, which a CPU-only user never needs.
    import lhc_kernels

    geometry, epilogue = call.geometry, call.epilogue
    y: Tensor = lhc_kernels.grouped_conv2d(
        call.x,
        call.weight,
        call.tables,
        epilogue.bias,
        epilogue.residual,
        epilogue.scale,
        out_channels=geometry.out_channels,
        kernel_size=geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        activation=epilogue.activation,
        config=call.config,
    )
    if epilogue.pool == "max2x2":
        y = F.max_pool2d(y, 2)
    return in_format(y, torch.channels_last)


def _problem(device: str, dtype: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'backend "triton" needs the package triton, which is not installed; use "torch"'
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            'backend "triton" needs a CUDA device; on the CPU use "torch", or set TRITON_INTERPRET=1 '
            "before the process starts to run it in Triton's slow interpreter"
        )
    return None


BACKEND = Backend(
    "triton",
    devices=("cpu", "cuda"),
    dtypes=("float32", "float16", "bfloat16", "int8"),
    run=run,
    activations=("none", "relu", "silu"),
    problem=_problem,
    auto={"cuda": 1},
    price=TRITON,
    reads_host_tables=False,
    has_configs=True,
)
