"""Backend "native": the kernel in C++ of lhc_kernels.cpu.

Once it is loaded, the dispatcher calls it without Python in between; what is here runs the first call of a
process, and tells what is wrong with a call that the kernel hands back.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from lhc_triton.planning.backends import Backend
from lhc_triton.planning.cost import NATIVE
from lhc_triton.runtime.op.call import Call
from lhc_triton.runtime.op.packing import check_tables


def run(call: Call) -> Tensor:
    """Run a call on the CPU, with the kernel that asking for the backend has loaded."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    y: Tensor = torch.ops.lhc.grouped_conv2d.default.redispatch(keys, *call.arguments())
    return y


def refuse(call: Call) -> NoReturn:
    """Raise ValueError that says why the kernel does not take a call."""
    tile_ptr, entries, filters = (table.tolist() for table in call.tables)
    check_tables(tile_ptr, entries, filters, call.entries, call.geometry.out_channels)
    raise ValueError(
        'grouped_conv2d: backend "native" takes dense tensors in host memory, of sizes below 2**30'
    )


def _problem(device: str, dtype: str) -> str | None:
    # Only a build tells whether a compiler works; it is kept, so that later processes merely load it.
    from lhc_kernels.cpu import problem

    reason = problem()
    if reason is not None:
        return f'backend "native" is not available: {reason}; or use "torch"'
    if dtype == "int8" and not torch.ops.lhc.native_int8():
        return 'backend "native" does not serve int8 here: the processor (or its flags) has no VNNI'
    return None


def _prepare(weight: Tensor, in_channels: int) -> Tensor:
    from lhc_kernels.cpu import loaded  # here, for importing this file shall load no kernels

    if not loaded():
        return weight
    prepared: Tensor = torch.ops.lhc.native_weight(weight, in_channels)
    return prepared


def _prepared(weight: Tensor, dtype: torch.dtype) -> tuple[int, int] | None:
    if weight.dim() == 4 and weight.dtype == torch.bfloat16 and weight.shape[3] == 2:
        return weight.shape[1] * 2, weight.shape[2]  # in pairs of channels, see lhc::native_weight
    if weight.dim() == 4 and weight.dtype == torch.int8 and weight.shape[3] == 4 and dtype == torch.int8:
        return (weight.shape[1] - 1) * 4, weight.shape[2]  # in fours, and their sums
    if weight.dim() == 3 and weight.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16):
        return weight.shape[1], weight.shape[2]
    return None


BACKEND = Backend(
    "native",
    devices=("cpu",),
    dtypes=("float32", "float16", "bfloat16", "int8"),
    run=run,
    activations=("none", "relu", "silu"),
    writes_int8=True,
    problem=_problem,
    auto={"cpu": 2},
    price=NATIVE,
    prepare=_prepare,
    prepared=_prepared,
)
