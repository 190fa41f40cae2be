"""Compile the kernels ahead of time, without a GPU, and read off what the compiler made of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .box_conv import grouped_conv2d_box_fwd_kernel
from .configs import KernelConfig, LaunchShape
from .constants import INTERPRETED, Specialisation
from .grouped_conv import grouped_conv2d_fwd_kernel, reduce_splits_kernel

TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "i8"}


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the sizes of a well-known product that configs are chosen by.

    Attributes:
        gpu: what Triton compiles for.
        product: whose sizes these are.
        processors: its multiprocessors.
        shared_bytes: shared memory that one program may use there.
        capability: CUDA compute capability times ten, 0 for other makes.
    """

    gpu: GPUTarget
    product: str
    processors: int
    shared_bytes: int
    capability: int

    def shape(self, shape: LaunchShape) -> LaunchShape:
        """Return ``shape`` as a launch on this GPU would see it."""
        return replace(
            shape, processors=self.processors, shared_bytes=self.shared_bytes, capability=self.capability
        )


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "A100", 108, 166912, 80),
    "sm_89": Target(GPUTarget("cuda", 89, 32), "RTX 4090", 128, 101376, 89),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "H100", 132, 232448, 90),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "B200", 148, 232448, 100),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "MI300X", 304, 65536, 0),
}


@dataclass(frozen=True)
class Loop:
    """Machine instructions of one step.

    Attributes:
        instructions: all of them.
        products: of tensor cores.
        barriers: at which all warps of a program meet.
        waits: for asynchronous copies and products.
        register_loads: of operands from shared memory into registers.
    """

    instructions: int
    products: int
    barriers: int
    waits: int
    register_loads: int


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
        mma: whether they run on matrix units at all.
        async_operands: shapes of the operands that reach shared memory by asynchronous copies, for example
            ("128x32", "32x16") for both; each occurs once per copy in the code (prologue and loop).
        async_bytes: the distinct sizes of the asynchronous copy instructions in bytes; 16 is the widest.
        copies_in_flight: asynchronous copies (one per operand and step) that the loop leaves running while it
            computes; 0 says that nothing is pipelined that way.
        bulk_copies: whether operands arrive by bulk copies of a tensor descriptor.
        store_bytes: the distinct sizes of the global stores in bytes; 16 is the widest.
        assembly, ttgir, cubin: the code itself, for a closer look; the last one empty for other makes.
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
    bulk_copies: bool
    store_bytes: tuple[int, ...]
    assembly: str
    ttgir: str
    cubin: bytes = field(default=b"", repr=False)

    @property
    def loop(self) -> Loop:
        """What one step of the innermost loop with products consists of; CUDA only."""
        return _loop(_dumped("-sass", self.cubin))

    @property
    def async_copy(self) -> bool:
        """Whether both operands are copied asynchronously, which is what pipelines the loop."""
        config = self.config
        wanted = {f"{config.block_m}x{config.depth}", f"{config.depth}x{config.block_n}"}
        return self.bulk_copies or wanted <= set(self.async_operands)


def compile_config(
    config: KernelConfig,
    target: str = "sm_90",
    facts: Specialisation | None = None,
    *,
    box: tuple[int, int, int] | None = None,
    ones: tuple[str, ...] = ("pad_top", "pad_left"),
) -> CompileReport:
    """Compile the convolution that ``config`` names for a GPU that need not be there.

    Pointers count as 16-byte aligned, ``out_channels`` as a multiple of 16 where it is one, and the
    arguments named in ``ones`` as the constant 1: what a real launch specialises on.

    Args:
        config: how the launch is cut up; its variant picks the kernel.
        target: a key of TARGETS.
        facts: the layer's compile-time facts; None takes the defaults.
        box: with variant "box", the (images, rows, columns) of a program; None takes rows of 16 pixels.
        ones: integer arguments of the kernel whose value is 1.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are not compiled.
        ValueError: an unknown dtype or target.
    """
    facts = facts or Specialisation()
    if facts.dtype not in TYPES:
        raise ValueError(f"dtype is {facts.dtype!r}: supported are {', '.join(TYPES)}")
    item = TYPES[facts.dtype]
    types = {"x_ptr": f"*{item}", "w_ptr": f"*{item}", "y_ptr": f"*{TYPES[facts.out_dtype]}"}
    if config.variant == "box":
        box = box or (1, config.block_m // 16, 16)
        a, b = [*box, config.block_k], [config.block_k, config.block_n]
        types |= {
            name: f"tensordesc<{item}[{','.join(map(str, block))}]>"
            for name, block in (("x_desc", a), ("w_desc", b))
        }
        constants = facts.box_constants(config, box)
        return _compile(grouped_conv2d_box_fwd_kernel, config, target, facts, types, constants, ones)
    if config.variant == "split":
        types["y_ptr"] = _sums(facts)
    constants = facts.pointer_constants(config)
    return _compile(grouped_conv2d_fwd_kernel, config, target, facts, types, constants, ones)


def compile_reduce(
    config: KernelConfig, target: str = "sm_90", facts: Specialisation | None = None
) -> CompileReport:
    """Compile the kernel that adds the parts of a "split" config; see ``compile_config``."""
    facts = facts or Specialisation()
    types = {"sums_ptr": _sums(facts), "y_ptr": f"*{TYPES[facts.out_dtype]}"}
    config = KernelConfig(config.block_m, config.block_n, variant="split", splits=config.splits)
    return _compile(reduce_splits_kernel, config, target, facts, types, facts.reduce_constants(config), ())


def _sums(facts: Specialisation) -> str:
    return "*i32" if facts.dtype == "int8" else "*fp32"


def _compile(
    kernel: Any,
    config: KernelConfig,
    target: str,
    facts: Specialisation,
    types: dict[str, str],
    constants: dict[str, Any],
    ones: tuple[str, ...],
) -> CompileReport:
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted; unset it to compile them")
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}: supported are {', '.join(TARGETS)}")
    types = types | dict.fromkeys(("tile_ptr", "entries_ptr", "filters_ptr"), "*i32")
    types |= {"bias_ptr": "*fp32", "scale_ptr": "*fp32", "residual_ptr": f"*{TYPES[facts.out_dtype]}"}
    names = kernel.arg_names
    constants = constants | dict.fromkeys((name for name in ones if name in names), 1)
    absent = {"bias_ptr": not facts.bias, "scale_ptr": not facts.scale, "residual_ptr": not facts.residual}
    constants |= {name: None for name, missing in absent.items() if missing}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    if facts.out_channels % 16 == 0:
        aligned.append("out_channels")
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=TARGETS[target].gpu, options=config.options())
    return _report(compiled, kernel, config, target)


def _report(compiled: Any, kernel: Any, config: KernelConfig, target: str) -> CompileReport:
    ttgir = compiled.asm["ttgir"]
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        text = compiled.asm["ptx"]
        registers, stack = resources_of(compiled.asm["cubin"])
    stores = re.findall(r"st\.global\.(?:v(\d)\.)?b(\d+)", text)
    return CompileReport(
        kernel=kernel.__name__,
        config=config,
        target=target,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        wgmma="wgmma.mma_async" in text,
        mma=re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma", text) is not None,
        async_operands=tuple(re.findall(r"async_copy_global_to_local.*?tensor<([\dx]+)x!tt", ttgir)),
        async_bytes=tuple(sorted({int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\..*?\], (\w+)", text)})),
        copies_in_flight=max((int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", text)), default=0),
        bulk_copies="cp.async.bulk.tensor" in text,
        store_bytes=tuple(sorted({int(v or 1) * int(b) // 8 for v, b in stores})),
        assembly=text,
        ttgir=ttgir,
        cubin=b"" if target.startswith("gfx") else compiled.asm["cubin"],
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _dumped(option: str, cubin: bytes) -> str:
    """Return what Triton's bundled cuobjdump says of a kernel."""
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        return subprocess.run(
            [_tool("cuobjdump"), option, path], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(path)


def resources_of(cubin: bytes) -> tuple[int, int]:
    """Return a kernel's registers and stack bytes per thread."""
    text = _dumped("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {text.strip()[:200]!r}")
    return int(found[1]), int(found[2])


def _loop(sass: str) -> Loop:
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    loops = []
    for at, text in lines:
        back = re.search(r"BRA\S* .*?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            body = [text for place, text in lines if int(back[1], 16) <= place <= at]
            if any(re.search("MMA|FFMA", text) for text in body):
                loops.append(body)
    step = min(loops, key=len, default=[])

    def count(pattern: str) -> int:
        return sum(re.search(pattern, text) is not None for text in step)

    return Loop(len(step), count("MMA"), count(r"BAR\.SYNC"), count("DEPBAR"), count("LDSM"))
