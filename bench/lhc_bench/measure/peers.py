"""The dense convolutions a sparse one has to beat: eager in both layouts, compiled, and fused by cuDNN."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lhc_bench.measure.replayed import reason_of
from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.op import cudnn_fused
from lhc_triton.runtime.op.accuracy import norm_error

Call = Callable[[], Tensor]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # norm error against eager; other types: 2e-2
WARM_CALLS = 3


def layouts(device: str) -> dict[str, torch.memory_format]:
    """Return the memory formats to try on a device kind: both on "cpu", the only fast one on "cuda"."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return {"channels_last": torch.channels_last} if device == "cuda" else formats


class _ConvReLU(nn.Module):
    """One convolution with bias and ReLU on fixed parameters, for the compiler."""

    def __init__(self, geometry: ConvGeometry, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.stride, self.padding = geometry.stride, (geometry.padding[0], geometry.padding[2])
        self.dilation = geometry.dilation
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation).relu()


def dense_peers(
    geometry: ConvGeometry, x: Tensor, weight: Tensor, bias: Tensor, compiled: bool = False
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the dense forms of one layer with bias and ReLU, ready to be timed, and those left out.

    Args:
        geometry: the call's shapes; its padding must be symmetric.
        x: [N, C, H, W].
        weight: [O, I, kh, kw], of x's type and device.
        bias: [O].
        compiled: also compile each layout with torch.compile, which costs seconds a layer.

    Returns:
        Functions without arguments by name ("eager contiguous", "eager channels_last", "compiled ..."; on
        CUDA channels_last alone, and "fused channels_last", one kernel of cuDNN's), and the reason for each
        form that is left out.

    Raises:
        ValueError: the padding differs between opposite sides.
    """
    top, bottom, left, right = geometry.padding
    if (top, left) != (bottom, right):
        raise ValueError(
            f"padding={geometry.padding}: the dense peers need the same border on opposite sides"
        )
    calls: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    if compiled:
        reset_compiler()
    for name, layout in layouts(x.device.type).items():
        a, w = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)

        def eager(a: Tensor = a, w: Tensor = w) -> Tensor:
            return F.conv2d(a, w, bias, geometry.stride, (top, left), geometry.dilation).relu_()

        calls[f"eager {name}"] = eager
        if a.is_cuda:
            calls |= _fused(f"fused {name}", geometry, a, w, bias, skipped)
        if not compiled:
            continue
        model, reason = compiled_or_reason(_ConvReLU(geometry, w, bias), a)
        if model is None:
            skipped[f"compiled {name}"] = reason or ""
        else:
            calls[f"compiled {name}"] = _bound(model, a)
    if not compiled:
        skipped["compiled"] = "not asked for"
    return calls, skipped


def _fused(
    name: str, geometry: ConvGeometry, x: Tensor, weight: Tensor, bias: Tensor, skipped: dict[str, str]
) -> dict[str, Call]:
    """Return cuDNN's fused kernel by its name; where there is none, nothing, and why in ``skipped``."""
    if not cudnn_fused.serves(x.device, x.dtype):
        skipped[name] = "cuDNN does not fuse this type here, or not with the same results"
        return {}
    padding = geometry.padding[0], geometry.padding[2]
    options = (geometry.stride, padding, geometry.dilation, 1)
    return {name: lambda: cudnn_fused.convolve(x, weight, bias, None, *options)}


def network_peers(dense: nn.Module, example: Tensor) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return a dense network in its fastest forms, and the forms that do not run here with the reason.

    Args:
        dense: in eval mode; left as it is.
        example: what the forms will be called with, under ``torch.inference_mode()``.
    """
    peers: dict[str, nn.Module] = {"dense, eager": accelerate(dense, example, backend="dense", tune="off")}
    compiled, reason = compiled_or_reason(dense, example)
    if compiled is not None:
        peers["dense, compiled"] = compiled
    return peers, {} if reason is None else {"dense, compiled": reason}


def reset_compiler() -> None:
    """Forget what torch.compile made so far.

    All layers share one class, so a compiled layer would look through the guards of all earlier ones at each
    call, and after a few of them dynamo would compile no more.
    """
    import torch._dynamo

    torch._dynamo.reset()


def compiled_or_reason(model: nn.Module, example: Tensor) -> tuple[nn.Module | None, str | None]:
    """Compile a copy of a model for inference with frozen weights; never raises an Exception, never warns.

    The copy is put in eval mode, compiled by torch.compile with its weights as constants, called until
    warm, and compared with the eager model. Call it under ``torch.inference_mode()`` and with the
    example's shape: in another mode or shape it would compile again.

    Args:
        model: any module; left as it is.
        example: the input the model will be called with.

    Returns:
        (compiled copy, None), or (None, one line that says why there is none).
    """
    reason = _no_compiler(example.device)
    if reason is not None:
        return None, reason
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _compile(model, example)
    # Everything between here and machine code may fail, each with exceptions of its own.
    except Exception as error:
        return None, f"torch.compile failed: {reason_of(error)}"


def _compile(model: nn.Module, example: Tensor) -> tuple[nn.Module | None, str | None]:
    import torch._inductor.config

    options: dict[str, Any] = {"freezing": True}
    if example.is_cuda:
        options["max_autotune"] = True
    work = copy.deepcopy(model).eval()
    with torch.inference_mode(), torch._inductor.config.patch(options):
        expected = work(example)
        compiled = cast(nn.Module, torch.compile(work, dynamic=False, fullgraph=True))
        for _ in range(WARM_CALLS):
            found = compiled(example)
        error = norm_error(found, expected)
    tolerance = TOLERANCES.get(example.dtype, 2e-2)
    if not error <= tolerance:
        return None, f"torch.compile's output differs from eager's: norm error {error:.1e} > {tolerance:.0e}"
    return compiled, None


def _no_compiler(device: torch.device) -> str | None:
    """Say which compiler torch.compile would miss; None if there is one."""
    name = os.environ.get("CXX") or "g++"
    if device.type == "cpu" and shutil.which(name) is None:
        return f"no C++ compiler: {name} is not on the PATH"
    return None


def _bound(model: nn.Module, x: Tensor) -> Call:
    def call() -> Tensor:
        y: Tensor = model(x)
        return y

    return call
