"""The kernels that ship, as rows: every config of some typical layers, compiled for every GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from .aot import TARGETS, CompileReport, compile_config, compile_reduce
from .choice import candidate_configs
from .configs import KernelConfig, LaunchShape, best_box
from .constants import Specialisation


@dataclass(frozen=True)
class Layer:
    """A typical layer: what a config is chosen for, and what its kernel is compiled with.

    Attributes:
        shape: of the launch, with the device's part left at its defaults.
        facts: of the kernel.
        precision: of float32 products.
    """

    shape: LaunchShape
    facts: Specialisation
    precision: str = "ieee"


def _layer(
    channels: int,
    side: int,
    tile_width: int,
    dtype: str = "float16",
    *,
    batch: int = 64,
    in_block: int = 32,
    kernel: int = 3,
    stride: int = 1,
    density: float = 0.1,
    precision: str = "ieee",
    activation: str = "relu",
    residual: bool = False,
) -> Layer:
    """Return a layer of as many filters as input channels, over square images of ``side`` output pixels."""
    tiles = -(-channels // tile_width)
    blocks = kernel * kernel * -(-channels // in_block)
    shape = LaunchShape(
        pixels=batch * side * side,
        in_channels=channels,
        in_block=in_block,
        tile_width=tile_width,
        tiles=tiles,
        kernel=(kernel, kernel),
        dtype=dtype,
        entries=tiles * max(1, round(density * blocks)),
        stride=(stride, stride),
        out_size=(side, side),
        residual=residual,
    )
    facts = Specialisation(
        dtype=dtype,
        in_channels=channels,
        in_block=in_block,
        tile_width=tile_width,
        out_channels=channels,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        border=kernel > 1,
        scale=dtype == "int8",
        residual=residual,
        activation=activation,
    )
    return Layer(shape, facts, precision)


LAYERS: Mapping[str, Layer] = {
    "3x3 of 16-filter tiles": _layer(256, 56, 16),
    "3x3 of 32-filter tiles": _layer(128, 28, 32),
    "3x3 of 64-filter tiles": _layer(256, 28, 64),
    "3x3 of 128-filter tiles": _layer(512, 28, 128),
    "3x3 with residual, bfloat16": _layer(256, 14, 128, "bfloat16", residual=True),
    "3x3 of stride 2, silu": _layer(256, 28, 64, stride=2, activation="silu"),
    "3x3 of few pixels, dense": _layer(512, 7, 128, batch=1, density=1.0),
    "1x1": _layer(256, 56, 64, in_block=64, kernel=1, density=0.25),
    "3x3 of odd channels": _layer(37, 56, 16, in_block=37, density=1.0),
    "3x3 in float32": _layer(256, 28, 64, "float32"),
    "3x3 in tf32": _layer(256, 28, 64, "float32", precision="tf32"),
    "3x3 in int8": _layer(256, 28, 64, "int8"),
}
"""Layers that together reach every dtype, variant and rule of the heuristic."""


def shipped(
    target: str, layers: Mapping[str, Layer] = LAYERS, limit: int = 12
) -> Iterator[tuple[str, KernelConfig, Layer, LaunchShape]]:
    """Yield name, config, layer and launch of each layer's candidates on ``target``, the heuristic's first.

    Args:
        target: a key of ``aot.TARGETS``.
        layers: by name.
        limit: candidates of a layer.
    """
    for name, layer in layers.items():
        shape = TARGETS[target].shape(layer.shape)
        for config in candidate_configs(shape, limit, layer.precision):
            yield name, config, layer, shape


def compile_shipped(
    config: KernelConfig, layer: Layer, shape: LaunchShape, target: str
) -> list[CompileReport]:
    """Compile the kernels of one launch: two for a "split", else one."""
    box = best_box(config.block_m, shape) if config.variant == "box" else None
    reports = [compile_config(config, target, layer.facts, box=box)]
    if config.variant == "split":
        reports.append(compile_reduce(config, target, layer.facts))
    return reports


def kernel_table(
    targets: Sequence[str] = tuple(TARGETS),
    limit: int = 12,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, object]]:
    """Compile every shipped config for every target, which needs no GPU, and say what came out.

    A kernel takes about a second to compile; results are kept in Triton's cache on disk.

    Args:
        targets: keys of ``aot.TARGETS``.
        limit: candidates of each typical layer; 1 compiles the heuristic's choices only.
        progress: called with the number of configs done and the number of all.

    Returns:
        One row per kernel: {"kernel", "layer", "dtype", "config" (an object), "target", "registers" (per
        thread), "stack_bytes", "shared_bytes", "wgmma", "async_copy"}.

    Raises:
        ValueError: an unknown target.
        RuntimeError: under TRITON_INTERPRET=1.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise ValueError(f"target is {unknown[0]!r}: supported are {', '.join(TARGETS)}")
    work = [(target, *launch) for target in targets for launch in shipped(target, limit=limit)]
    rows: list[dict[str, object]] = []
    for done, (target, name, config, layer, shape) in enumerate(work, 1):
        for report in compile_shipped(config, layer, shape, target):
            rows.append(
                {
                    "kernel": report.kernel,
                    "layer": name,
                    "dtype": layer.facts.dtype,
                    "config": asdict(report.config),
                    "target": target,
                    "registers": report.registers,
                    "stack_bytes": report.stack_bytes,
                    "shared_bytes": report.shared_bytes,
                    "wgmma": report.wgmma,
                    "async_copy": report.async_copy,
                }
            )
        if progress is not None:
            progress(done, len(work))
    return rows
