"""Compile the kernels ahead of time, without a GPU, and read off what the compiler made of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configs import KernelConfig
from .grouped_conv import INTERPRETED, grouped_conv2d_fwd_kernel, kernel_constants

TRITON_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
POINTERS = {
    "tile_ptr": "*i32",
    "entries_ptr": "*i32",
    "filters_ptr": "*i32",
    "bias_ptr": "*fp32",
    "scale_ptr": "*fp32",
}


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
        async_operands: shapes of the operands that reach shared memory by asynchronous copies, for example
            ("128x32", "32x16") for both; each occurs once per copy in the code (prologue and loop).
        async_bytes: the distinct sizes of the asynchronous copy instructions in bytes; 16 is the widest.
        copies_in_flight: asynchronous copies (one per operand and step) that the loop leaves running while it
            computes; 0 says that nothing is pipelined.
        store_bytes: the distinct sizes of the global stores in bytes; 16 is the widest.
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
    async_operands: tuple[str, ...]
    async_bytes: tuple[int, ...]
    copies_in_flight: int
    store_bytes: tuple[int, ...]
    ptx: str
    ttgir: str

    @property
    def async_copy(self) -> bool:
        """Whether both operands are copied asynchronously, which is what pipelines the loop."""
        config = self.config
        depth = config.block_k * config.entries
        wanted = {f"{config.block_m}x{depth}", f"{depth}x{config.block_n}"}
        return wanted <= set(self.async_operands)


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
    ones: tuple[str, ...] = ("pad_top", "pad_left"),
) -> CompileReport:
    """Compile the grouped convolution for a GPU that need not be there.

    Pointers count as 16-byte aligned, ``out_channels`` as a multiple of 16 where it is one, and the
    arguments named in ``ones`` as the constant 1: what a real launch specialises on.

    Args:
        config: how the launch is cut up.
        target: compute capability times ten: 80, 89, 90, 100, ...
        dtype: "float16", "bfloat16" or "float32".
        in_channels: I.
        in_block: input channels of an entry.
        tile_width: filters of a tile.
        out_channels: O.
        kernel_size: (kh, kw).
        stride: (vertical, horizontal).
        dilation: (vertical, horizontal).
        bias: add a bias.
        scale: multiply by a scale.
        residual: add a residual.
        relu: apply ReLU.
        index64: compile the variant for tensors of 2^31 elements and more.
        ones: integer arguments of the kernel whose value is 1.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are not compiled.
        ValueError: an unknown dtype.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted; unset it to compile them")
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"dtype is {dtype!r}: supported are {', '.join(TRITON_DTYPES)}")
    constants = kernel_constants(
        config,
        dtype,
        in_channels=in_channels,
        in_block=in_block,
        tile_width=tile_width,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        bias=bias,
        scale=scale,
        residual=residual,
        relu=relu,
        index64=index64,
    )
    constants |= dict.fromkeys(ones, 1)
    absent = {"bias_ptr": not bias, "scale_ptr": not scale, "residual_ptr": not residual}
    constants |= {name: None for name, missing in absent.items() if missing}
    names = grouped_conv2d_fwd_kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else POINTERS.get(name, "*" + TRITON_DTYPES[dtype])
        if name.endswith("_ptr")
        else "i32"
        for name in names
    }
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    if out_channels % 16 == 0:
        aligned.append("out_channels")
    source = ASTSource(
        grouped_conv2d_fwd_kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    stores = re.findall(r"st\.global\.(?:v(\d)\.)?b(\d+)", ptx)
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
        async_operands=tuple(re.findall(r"async_copy_global_to_local.*?tensor<([\dx]+)x!tt", ttgir)),
        async_bytes=tuple(sorted({int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\..*?\], (\w+)", ptx)})),
        copies_in_flight=max((int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)), default=0),
        store_bytes=tuple(sorted({int(v or 1) * int(b) // 8 for v, b in stores})),
        ptx=ptx,
        ttgir=ttgir,
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
