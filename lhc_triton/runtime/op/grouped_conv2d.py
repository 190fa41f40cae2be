"""``torch.ops.lhc.grouped_conv2d``: the only way into a kernel.

Importing this module registers the operator with its implementation (which picks the backend by name), its
fake kernel (torch.compile, torch.export), its refusal to differentiate, and its FLOP formula. Each of them
binds the arguments to one `Call`.

The implementation here serves every device that has no more specific one. Loading the native kernel brings
one for the CPU, in C++: it runs backend "native" itself, so that such a call costs microseconds, and hands
any other call, and any it finds fault with, to ``lhc::grouped_conv2d_python``, which is the implementation
here again.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from lhc_triton.planning.backends import BACKENDS
from lhc_triton.runtime.op import native_backend
from lhc_triton.runtime.op.backends import unavailable
from lhc_triton.runtime.op.call import Call
from lhc_triton.runtime.op.epilogue import ACTIVATIONS, in_format, pooled
from lhc_triton.runtime.op.quantise import quantise

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor[] tables, Tensor? bias, Tensor? residual, Tensor? scale, "
    "int out_channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "str activation, str pool, str backend, int[] config, Tensor? out_step=None) -> Tensor"
)
BACKEND = 13
"""The place of the backend's name among the arguments."""

BACKWARD_MESSAGE = (
    "lhc::grouped_conv2d is for inference only and has no backward; train the LHCConv2d model, "
    "or call the accelerated one under torch.inference_mode()"
)

torch.library.define("lhc::grouped_conv2d", SCHEMA)
torch.library.define("lhc::grouped_conv2d_python", SCHEMA)


def _bound(*arguments: Any) -> Call:
    """Bind the op's arguments for the backend that they name; ValueError if it cannot serve them here."""
    x, backend = arguments[0], arguments[BACKEND]
    reason = unavailable(backend, x.dtype, x.device)
    if reason is not None:
        raise ValueError(f"grouped_conv2d: {reason}")
    call = Call.bind(*arguments)
    if BACKENDS[backend].reads_host_tables:
        call.check_memory()
    return call


def _run(*arguments: Any) -> Tensor:
    """Run a call, its arguments in the schema's order, on the backend that it names."""
    register_flops()
    call = _bound(*arguments)
    backend, step = BACKENDS[call.backend], call.epilogue.out_step
    if step is not None and not (backend.writes_int8 and _activates(call)):
        return quantise(_run(*call.without(out_step=None).arguments()), step)
    if _activates(call):
        return backend.run(call)
    return _activated(call, backend.run(call.without(activation="none", pool="none")))


def _run_for_native(*arguments: Any) -> Tensor:
    """Run what the native kernel hands over: calls for other backends, and its own that do not fit."""
    if arguments[BACKEND] != "native":
        return _run(*arguments)
    call = _bound(*arguments)
    if _activates(call):
        native_backend.refuse(call)
    return _run(*arguments)


def _activates(call: Call) -> bool:
    """Return whether the call's backend applies its activation by itself."""
    offered = BACKENDS[call.backend].activations
    return offered is None or call.epilogue.activation in offered


def _activated(call: Call, y: Tensor) -> Tensor:
    y = ACTIVATIONS[call.epilogue.activation].in_place(y)
    return in_format(pooled(y, call.epilogue.pool), torch.channels_last)


torch.library.impl("lhc::grouped_conv2d", "default", _run)
torch.library.impl("lhc::grouped_conv2d_python", "default", _run_for_native)


@torch.library.register_fake("lhc::grouped_conv2d")
def _fake(*arguments: Any) -> Tensor:
    call = Call.bind(*arguments)
    return torch.empty(
        call.out_shape, dtype=call.out_dtype, device=call.x.device, memory_format=torch.channels_last
    )


def _refuse_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(BACKWARD_MESSAGE)


torch.library.register_autograd("lhc::grouped_conv2d", _refuse_backward)


def _flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    return Call.bind(*arguments, **named).flops


@functools.cache
def register_flops() -> None:
    """Tell torch.utils.flop_counter the operator's formula; further calls do nothing.

    Importing this module does so only where that one is loaded already: it imports Triton, which costs a
    CPU-only user time for nothing. The first call of the operator does, and whatever builds a module around
    the operator should, because a FlopCounterMode knows the formulas of the time when it was made.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    if torch.ops.lhc.grouped_conv2d not in flop_registry:
        register_flop_formula(torch.ops.lhc.grouped_conv2d, get_raw=True)(_flops)


if "torch.utils.flop_counter" in sys.modules:
    register_flops()
