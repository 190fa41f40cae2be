"""Random grouped convolutions with their float64 answers, shared by the interpreter and the GPU lane."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import strategies as st
from oracle import masked_conv2d, norm_error
from torch import Tensor

import lhc_kernels
from lhc_kernels import KernelConfig, LaunchShape, launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.int8: 1e-5}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Conv:
    """The sizes and options of one random grouped convolution; every default is a plain 3x3."""

    batch: int = 2
    in_channels: int = 64
    out_channels: int = 32
    height: int = 6
    width: int = 7
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    in_block: int = 32
    tile_width: int = 16
    density: float = 0.3
    dtype: torch.dtype = torch.float32
    bias: bool = True
    scale: bool = False
    residual: bool = False
    activation: str = "none"
    channels_last: bool = True
    scattered: bool = True
    roll: int = 0
    config: tuple[int, ...] = ()
    seed: int = 0

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.int8 else self.dtype


@dataclass
class PackedProblem:
    """Packed tensors of a convolution beside the dense weight that holds the same live entries."""

    conv: Conv
    x: Tensor
    weight: Tensor
    tables: list[Tensor]
    bias: Tensor | None
    scale: Tensor | None
    residual: Tensor | None
    dense: Tensor
    live: Tensor
    options: dict[str, object] = field(default_factory=dict)

    def to(self, device: str) -> PackedProblem:
        """Return the problem with the kernel's arguments on ``device``; the dense answer stays here."""
        moved = {k: None if v is None else v.to(device) for k, v in vars(self).items() if _moves(k)}
        return PackedProblem(
            self.conv,
            tables=[t.to(device) for t in self.tables],
            dense=self.dense,
            live=self.live,
            options=self.options,
            **moved,
        )

    def out_size(self) -> tuple[int, int, int, int]:
        conv = self.conv
        size = [
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, before, after, d, k, s in (
                (conv.height, *conv.padding[:2], conv.dilation[0], conv.kernel[0], conv.stride[0]),
                (conv.width, *conv.padding[2:], conv.dilation[1], conv.kernel[1], conv.stride[1]),
            )
        ]
        return conv.batch, conv.out_channels, size[0], size[1]

    def expected(self) -> Tensor:
        """Return the float64 answer of the live weights."""
        conv = self.conv
        return masked_conv2d(
            self.x, self.dense, self.live, conv.stride, conv.padding, conv.dilation,
            self.bias, self.residual, self.scale, conv.activation,
        )  # fmt: skip


def _moves(name: str) -> bool:
    return name in ("x", "weight", "bias", "scale", "residual")


def draw_values(size: tuple[int, ...], dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """Draw normal values, or the whole range of int8."""
    if dtype == torch.int8:
        return torch.randint(-128, 128, size, generator=gen, dtype=dtype)
    return torch.randn(size, generator=gen).to(dtype)


def make_problem(conv: Conv, patterns: list[list[int]] | None = None) -> PackedProblem:
    """Draw a problem: a random pattern per tile (or the given ones), random filters in each tile."""
    gen = torch.Generator().manual_seed(conv.seed)
    taps = conv.kernel[0] * conv.kernel[1]
    in_blocks = -(-conv.in_channels // conv.in_block)
    tiles = -(-conv.out_channels // conv.tile_width)
    order = torch.arange(conv.out_channels).roll(conv.roll)
    if conv.scattered:
        order = torch.randperm(conv.out_channels, generator=gen)
    filters = torch.full((tiles, conv.tile_width), -1, dtype=torch.int32)
    dense = torch.zeros(conv.out_channels, conv.in_channels, *conv.kernel, dtype=torch.float64)
    live = torch.zeros(dense.shape, dtype=torch.bool)
    starts, entries, blocks = [0], [], []
    for tile in range(tiles):
        mine = order[tile * conv.tile_width : (tile + 1) * conv.tile_width]
        filters[tile, : len(mine)] = mine.int()
        drawn = torch.rand(taps * in_blocks, generator=gen) < conv.density
        for entry in drawn.nonzero().flatten().tolist() if patterns is None else patterns[tile]:
            (r, s), first = divmod(entry // in_blocks, conv.kernel[1]), entry % in_blocks * conv.in_block
            channels = min(conv.in_block, conv.in_channels - first)
            block = torch.zeros(conv.in_block, conv.tile_width, dtype=conv.dtype)
            values = draw_values((channels, len(mine)), conv.dtype, gen)
            block[:channels, : len(mine)] = values if conv.dtype == torch.int8 else values / 8
            live[mine, first : first + channels, r, s] = True
            dense[mine, first : first + channels, r, s] = block[:channels, : len(mine)].double().T
            entries.append(entry)
            blocks.append(block)
        starts.append(len(entries))
    weight = torch.zeros(0, conv.in_block, conv.tile_width, dtype=conv.dtype)
    x = draw_values((conv.batch, conv.in_channels, conv.height, conv.width), conv.dtype, gen)
    problem = PackedProblem(
        conv,
        x=x.contiguous(memory_format=torch.channels_last) if conv.channels_last else x,
        weight=torch.stack(blocks) if blocks else weight,
        tables=[torch.tensor(t, dtype=torch.int32) for t in (starts, [*entries, 0])] + [filters],
        bias=torch.randn(conv.out_channels, generator=gen) if conv.bias else None,
        scale=torch.randn(conv.out_channels, generator=gen)
        if conv.scale or conv.dtype == torch.int8
        else None,
        residual=None,
        dense=dense,
        live=live,
    )
    if conv.residual:
        problem.residual = torch.randn(problem.out_size(), generator=gen).to(conv.out_dtype)
    problem.options = {
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "activation": conv.activation,
        "config": conv.config,
    }
    return problem


def launch_shape(problem: PackedProblem) -> LaunchShape:
    """Return what a config for the problem is chosen for, on its device."""
    conv, weight = problem.conv, problem.weight
    batch, _, *out_size = problem.out_size()
    return LaunchShape(
        pixels=batch * out_size[0] * out_size[1],
        in_channels=conv.in_channels,
        in_block=weight.shape[1],
        tile_width=weight.shape[2],
        tiles=len(problem.tables[2]),
        kernel=conv.kernel,
        dtype=str(conv.dtype).removeprefix("torch."),
        entries=weight.shape[0],
        stride=conv.stride,
        out_size=tuple(out_size),
        residual=conv.residual,
        **launch.device_limits(problem.x.device),
    )


def run(problem: PackedProblem) -> Tensor:
    """Run the kernel into an output full of NaN, so that an element left unwritten shows."""
    p = problem
    out = torch.full(p.out_size(), float("nan"), dtype=p.conv.out_dtype, device=p.x.device)
    out = out.contiguous(memory_format=torch.channels_last)
    y = lhc_kernels.grouped_conv2d(p.x, p.weight, p.tables, p.bias, p.residual, p.scale, out=out, **p.options)
    assert y is out
    return y.cpu()


def check(conv: Conv, device: str = "cpu", patterns: list[list[int]] | None = None) -> None:
    """Run ``conv`` on ``device`` and compare it with the float64 dense answer."""
    problem = make_problem(conv, patterns)
    error = norm_error(run(problem.to(device)), problem.expected())
    assert error <= TOLERANCE[conv.dtype], f"norm error {error:.3g} for {conv}"


def check_special_values(conv: Conv, device: str = "cpu") -> None:
    """Strew NaN and infinities over the input and compare where they arrive."""
    problem = make_problem(conv)
    gen = torch.Generator().manual_seed(conv.seed + 1)
    for value in (float("nan"), float("inf"), -float("inf")):
        problem.x[torch.rand(problem.x.shape, generator=gen) < 1 / 400] = value
    y, expected = run(problem.to(device)).double(), problem.expected()
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert expected.isfinite().any()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()])
    finite = expected.isfinite()
    assert norm_error(y[finite], expected[finite]) <= TOLERANCE[conv.dtype]


def config(*args: int, **kwargs: object) -> tuple[int, ...]:
    """Return a KernelConfig as the integers of the ``config`` argument."""
    return tuple(KernelConfig(*args, **kwargs).to_list())


CASES = {
    "plain_3x3": Conv(),
    "batch_of_one_pixel": Conv(batch=3, height=1, width=1, density=0.8),
    "odd_channels": Conv(in_channels=37, out_channels=21, density=0.5),
    "in_block_not_a_power_of_two": Conv(in_channels=48, in_block=24, density=0.5),
    "in_block_of_three_chunks": Conv(in_channels=96, in_block=48, density=0.3),
    "in_block_of_several_steps": Conv(in_channels=192, in_block=128, density=0.4),
    "tiny_in_block": Conv(in_channels=10, in_block=3, density=0.5),
    "in_block_wider_than_the_input": Conv(in_channels=5, in_block=16, density=0.5),
    "tile_not_a_power_of_two": Conv(out_channels=40, tile_width=24),
    "tile_of_one_filter": Conv(out_channels=3, tile_width=1),
    "tile_wider_than_a_program": Conv(out_channels=80, tile_width=80, config=config(32, 32, 32, 4, 2)),
    "tile_wider_than_the_output": Conv(out_channels=5, tile_width=32),
    "even_kernel": Conv(kernel=(2, 4), padding=(0, 1, 2, 1)),
    "kernel_1x1": Conv(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "kernel_7x7": Conv(kernel=(7, 7), padding=(3, 3, 3, 3), in_channels=32, density=0.2),
    "kernel_with_rows_only": Conv(kernel=(9, 1), padding=(4, 4, 0, 0)),
    "stride_2": Conv(stride=(2, 2), height=9),
    "stride_beyond_the_kernel": Conv(kernel=(1, 1), stride=(3, 2), padding=(0, 0, 0, 0), density=0.7),
    "uneven_stride_and_dilation": Conv(stride=(2, 1), dilation=(1, 2), padding=(1, 0, 2, 3)),
    "padding_wider_than_the_image": Conv(height=2, width=2, padding=(4, 3, 3, 4)),
    "dense": Conv(density=2.0),
    "no_live_entry_at_all": Conv(density=0.0, residual=True, activation="relu"),
    "no_epilogue": Conv(bias=False),
    "whole_epilogue": Conv(scale=True, residual=True, activation="relu"),
    "filters_in_aligned_runs": Conv(scattered=False, residual=True, activation="relu"),
    "aligned_runs_beside_scattered": Conv(scattered=False, out_channels=32, tile_width=12, residual=True),
    "runs_off_alignment": Conv(scattered=False, roll=4, residual=True),
    "contiguous_input": Conv(channels_last=False),
    "two_entries_a_step": Conv(config=config(64, 16, 32, 4, 3, 2)),
    "two_entries_of_odd_channels": Conv(
        in_channels=50, in_block=16, tile_width=32, config=config(32, 32, 16, 4, 3, 2)
    ),
    "no_padding": Conv(padding=(0, 0, 0, 0)),
    "1x1_of_stride_2": Conv(kernel=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0), density=0.6),
    "silu": Conv(residual=True, activation="silu"),
    "one_stage": Conv(config=config(16, 16, 16, 1, 1)),
}
"""Named convolutions that together reach every branch of the kernel."""


def variant(name: str, *args: int, **kwargs: object) -> tuple[int, ...]:
    """Return a small config of a variant as integers, of few pixels and 16 filters unless told."""
    few = 16 if name in ("persistent", "resident") else 32
    return config(*(args or (few, 16, 32, 8, 3)), variant=name, **kwargs)


HALF = Conv(dtype=torch.float16, residual=True, activation="silu", height=7, width=10)
VARIANT_CASES = {
    "persistent": Conv(batch=3, out_channels=40, config=variant("persistent")),
    "persistent_two_entries": Conv(batch=3, config=variant("persistent", 16, 16, 32, 8, 3, 2)),
    "persistent_wide_tiles": Conv(out_channels=60, tile_width=30, config=variant("persistent")),
    "split_in_two": Conv(residual=True, activation="silu", config=variant("split", splits=2)),
    "split_in_more_parts_than_entries": Conv(density=0.1, config=variant("split", splits=7)),
    "split_two_entries": Conv(config=variant("split", 16, 16, 32, 4, 3, 2, splits=3)),
    "split_without_entries": Conv(density=0.0, residual=True, config=variant("split", splits=2)),
    "split_wide_odd_tiles": Conv(
        in_channels=37, out_channels=50, tile_width=25, scattered=False, config=variant("split", splits=3)
    ),
    "split_1x1_of_stride_2": Conv(
        kernel=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0), density=0.8, config=variant("split", splits=2)
    ),
    "resident": Conv(batch=3, out_channels=40, residual=True, config=variant("resident")),
    "resident_two_entries": Conv(
        batch=3, out_channels=70, config=variant("resident", 16, 16, 32, 8, 3, 2), activation="relu"
    ),
    "resident_wide_tiles": Conv(stride=(2, 1), out_channels=60, tile_width=30, config=variant("resident")),
    "box": replace(HALF, config=variant("box")),
    "box_of_one_row": replace(HALF, width=16, config=variant("box", 16, 16, 32, 8, 3)),
    "box_of_several_images": replace(HALF, batch=5, height=2, width=2, config=variant("box", 32)),
    "box_of_one_pixel": replace(HALF, height=1, width=1, density=0.8, config=variant("box")),
    "box_dilated_with_uneven_padding": replace(
        HALF, dilation=(1, 2), padding=(0, 2, 3, 1), config=variant("box")
    ),
    "box_1x1": replace(HALF, kernel=(1, 1), padding=(0, 0, 0, 0), density=0.7, config=variant("box")),
    "box_without_padding": replace(HALF, padding=(0, 0, 0, 0), config=variant("box")),
    "box_past_the_last_channel": replace(HALF, in_channels=40, config=variant("box")),
    "box_of_several_steps": replace(HALF, in_channels=128, in_block=64, config=variant("box")),
    "box_wide_odd_tiles": replace(HALF, out_channels=60, tile_width=24, config=variant("box")),
}
"""Convolutions that force each variant of the kernel beyond the plain grid."""


def cases_by_dtype() -> list[tuple[str, Conv]]:
    """Return every named convolution in every dtype that it supports, with readable names."""
    dtypes = {"box": (torch.float16, torch.bfloat16)}
    return [
        (f"{name}-{str(dtype).removeprefix('torch.')}", replace(conv, dtype=dtype))
        for name, conv in (CASES | VARIANT_CASES).items()
        for dtype in dtypes.get(name[:3], TOLERANCE)
    ]


@contextmanager
def few_processors(count: int = 1) -> Iterator[None]:
    """Pretend that the device has few multiprocessors, so that persistent programs take several turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "device_limits", lambda device: {"processors": count})
        launch.limits.cache_clear()
        yield
    launch.limits.cache_clear()


SPECIAL_CASES = {
    "plain_3x3": Conv(density=0.15, bias=False),
    "odd_channels": Conv(in_channels=37, density=0.15, residual=True),
    "padded_block": Conv(in_channels=72, in_block=24, density=0.15),
    "two_entries_a_step": Conv(density=0.15, config=config(64, 16, 32, 4, 3, 2)),
    "no_border": Conv(density=0.15, padding=(0, 0, 0, 0)),
    "silu": Conv(density=0.15, activation="silu"),
    "persistent": Conv(batch=3, density=0.15, config=variant("persistent")),
    "resident": Conv(batch=3, density=0.15, config=variant("resident", 16, 16, 32, 4, 3, 2)),
    "two_entries_without_a_border": Conv(
        density=0.15, padding=(0, 0, 0, 0), config=config(64, 16, 32, 4, 3, 2)
    ),
    "two_entries_of_a_7x7": Conv(
        density=0.05, kernel=(7, 7), padding=(3, 3, 3, 3), config=config(64, 16, 32, 4, 3, 2)
    ),
    "two_entries_of_a_1x1": Conv(
        density=0.7, kernel=(1, 1), padding=(0, 0, 0, 0), config=config(64, 16, 32, 4, 3, 2)
    ),
    "split": Conv(density=0.15, config=variant("split", splits=3)),
    "box": Conv(density=0.15, dtype=torch.float16, config=variant("box")),
    "box_past_the_last_channel": Conv(
        density=0.15, in_channels=40, dtype=torch.float16, config=variant("box")
    ),
}
"""Convolutions whose masked reads touch foreign channels or entries: NaN there must not spread."""


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    """Draw a small convolution: sizes, options, dtype and variant at random, at least one output pixel."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.one_of(st.just((0, 0, 0, 0)), st.tuples(*[st.integers(0, 3)] * 4)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    conv = Conv(
        batch=draw(st.integers(1, 2)),
        in_channels=draw(st.integers(1, 70)),
        out_channels=draw(st.integers(1, 40)),
        height=draw(st.integers(max(1, reach[0] - padding[0] - padding[1]), 9)),
        width=draw(st.integers(max(1, reach[1] - padding[2] - padding[3]), 9)),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        in_block=draw(st.sampled_from((4, 8, 16, 20, 32, 64))),
        tile_width=draw(st.sampled_from((4, 8, 16, 20, 32))),
        density=draw(st.sampled_from((0.0, 0.1, 0.3, 1.0))),
        dtype=draw(st.sampled_from(tuple(TOLERANCE))),
        bias=draw(st.booleans()),
        scale=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(("none", "relu", "silu"))),
        channels_last=draw(st.booleans()),
        scattered=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    name = draw(st.sampled_from(("heuristic", "persistent", "resident", "split", "box")))
    if name == "heuristic":
        return conv
    if name != "box":
        return replace(conv, config=variant(name, splits=3 if name == "split" else 1))
    return replace(
        conv,
        in_channels=draw(st.sampled_from((8, 24, 40, 64))),
        stride=(1, 1),
        in_block=draw(st.sampled_from((16, 32, 64))),
        tile_width=draw(st.sampled_from((8, 16, 24, 32))),
        density=1.0,
        dtype=draw(st.sampled_from((torch.float16, torch.bfloat16))),
        config=variant("box", 16, 16, 16, 4, 3),
    )
