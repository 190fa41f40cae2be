"""Compile the kernels ahead of time, without a GPU, and read off what the compiler made of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configs import KernelConfig
from .grouped_conv2d import INTERPRETED, grouped_conv2d_fwd_kernel

TRITON_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class CompileReport:
    """What the compiler made of one kernel.

    Attributes:
        kernel: the kernel's name.
        config: the launch configuration.
        target: for example "sm_90".
        registers: per thread.
        stack_bytes: local memory per thread; anything above 0 is spilled or indexed registers.
        shared_bytes: shared memory of one program.
        wgmma: whether the products run as warp-group instructions (sm_90).
        mma: whether they run on tensor cores at all.
        async_copy: asynchronous global-to-shared copies, as bytes of each copy instruction in program order.
        ptx, ttgir: the code itself, for a closer look.
    """

    kernel: str
    config: KernelConfig
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: bool
    mma: bool
    async_copy: tuple[int, ...]
    ptx: str
    ttgir: str


def compile_config(
    config: KernelConfig,
    target: int = 90,
    dtype: str = "float16",
    *,
    in_channels: int = 256,
    in_block: int = 32,
    tile_width: int = 16,
    out_channels: int = 256,
    kernel_size: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    bias: bool = True,
    scale: bool = False,
    residual: bool = False,
    relu: bool = True,
    index64: bool = False,
) -> CompileReport:
    """Compile the grouped convolution for compute capability ``target`` / 10 without a GPU.

    Pointers count as 16-byte aligned, and so do sizes that are multiples of 16, as at a real launch.

    Args:
        config: how the launch is cut up.
        target: compute capability times ten: 80, 89, 90, 100, ...
        dtype: "float16", "bfloat16" or "float32".
        in_channels, in_block, tile_width, out_channels, kernel_size, stride, dilation: the layer.
        bias, scale, residual, relu: the epilogue.
        index64: compile the variant for tensors of 2^31 elements and more.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are not compiled.
        ValueError: an unknown dtype.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted; unset it to compile them")
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"dtype is {dtype!r}: supported are {', '.join(TRITON_DTYPES)}")
    element = "*" + TRITON_DTYPES[dtype]
    signature: dict[str, str] = {
        "x_ptr": element,
        "w_ptr": element,
        "tile_ptr": "*i32",
        "entries_ptr": "*i32",
        "filters_ptr": "*i32",
        "bias_ptr": "*fp32" if bias else "constexpr",
        "scale_ptr": "*fp32" if scale else "constexpr",
        "residual_ptr": element if residual else "constexpr",
        "y_ptr": element,
    }
    for name in ("pixels", "tiles", "height", "width", "out_height", "out_width", "out_channels"):
        signature[name] = "i32"
    signature |= {"pad_top": "i32", "pad_left": "i32"}
    constants: dict[str, Any] = {
        "IN_CHANNELS": in_channels,
        "IN_BLOCK": in_block,
        "TILE_WIDTH": tile_width,
        "KERNEL_H": kernel_size[0],
        "KERNEL_W": kernel_size[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "HAS_BIAS": bias,
        "HAS_SCALE": scale,
        "HAS_RESIDUAL": residual,
        "RELU": relu,
        "PRECISION": config.precision,
        "INDEX64": index64,
        "UPCAST": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    if out_channels % 16 == 0:
        aligned.append("out_channels")
    constants |= {name: None for name, kind in signature.items() if kind == "constexpr"}
    signature |= dict.fromkeys(constants, "constexpr")
    names = grouped_conv2d_fwd_kernel.arg_names
    signature = {name: signature[name] for name in names}
    source = ASTSource(
        grouped_conv2d_fwd_kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return CompileReport(
        kernel=grouped_conv2d_fwd_kernel.__name__,
        config=config,
        target=f"sm_{target}",
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx or "wgmma.mma_async" in ptx or "tcgen05.mma" in ptx,
        async_copy=tuple(
            int(n) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)", ptx)
        ),
        ptx=ptx,
        ttgir=compiled.asm["ttgir"],
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes per thread, as Triton's bundled cuobjdump reports them."""
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        text = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {text.strip()[:200]!r}")
    return int(found[1]), int(found[2])
