"""The grouped, structured-sparse convolution: its Triton kernel and the function that launches it."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import KernelConfig, LaunchShape, config_problem, heuristic_config

INT32_ELEMENTS = 2**31


@triton.jit
def grouped_conv2d_fwd_kernel(
    x_ptr,
    w_ptr,
    tile_ptr,
    entries_ptr,
    filters_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    tiles,
    height,
    width,
    out_height,
    out_width,
    out_channels,
    pad_top,
    pad_left,
    IN_CHANNELS: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_M output pixels of one filter tile (or of BLOCK_N filters of a wider one).

    K runs over the tile's entries, BLOCK_K input channels a step: an implicit GEMM that only visits live
    blocks. Layouts: x [N, H, W, IN_CHANNELS], y and residual [N, OH, OW, out_channels], w [entries, IN_BLOCK,
    TILE_WIDTH], filters [tiles, TILE_WIDTH], all contiguous in that order; tile_ptr [tiles + 1] delimits a
    tile's entries; entries has one padding element at its end, because it is read one step ahead.
    """
    N_BLOCKS: tl.constexpr = (TILE_WIDTH + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (IN_BLOCK + BLOCK_K - 1) // BLOCK_K
    IN_BLOCKS: tl.constexpr = (IN_CHANNELS + IN_BLOCK - 1) // IN_BLOCK
    RAGGED: tl.constexpr = IN_CHANNELS % IN_BLOCK != 0

    # Programs of the same pixels are neighbours, so that the filter tiles share activations in L2.
    pid = tl.program_id(0)
    pid_m = pid // (tiles * N_BLOCKS)
    pid_n = pid % (tiles * N_BLOCKS)
    tile = pid_n // N_BLOCKS
    offs_n = (pid_n % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX64:
        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < pixels

    row = offs_m // out_width
    iw = (offs_m % out_width) * STRIDE_W - pad_left
    ih = (row % out_height) * STRIDE_H - pad_top
    # Bit r says that kernel row r of this pixel lies inside the image, bit KERNEL_H + s the same of column s.
    inside = tl.zeros((BLOCK_M,), tl.int32)
    for r in tl.static_range(KERNEL_H):
        y_in = ih + r * DILATION_H
        inside |= ((y_in >= 0) & (y_in < height) & mask_m).to(tl.int32) << r
    for s in tl.static_range(KERNEL_W):
        x_in = iw + s * DILATION_W
        inside |= ((x_in >= 0) & (x_in < width)).to(tl.int32) << (KERNEL_H + s)
    x_offs = (((row // out_height) * height + ih) * width + iw)[:, None] * IN_CHANNELS + offs_k[None, :]

    first = tl.load(tile_ptr + tile)
    last = tl.load(tile_ptr + tile + 1)
    if INDEX64:
        w_first = first.to(tl.int64) * (IN_BLOCK * TILE_WIDTH)
    else:
        w_first = first * (IN_BLOCK * TILE_WIDTH)
    w_ptrs = w_ptr + w_first + offs_k[:, None] * TILE_WIDTH + offs_n[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    entry = tl.load(entries_ptr + first)
    for step in range(first * CHUNKS, last * CHUNKS):
        tap = entry // IN_BLOCKS
        block = entry % IN_BLOCKS
        chunk = step % CHUNKS
        # The next step's entry is loaded here: a load in front of its own use would cost pipeline stages.
        entry = tl.load(entries_ptr + (step + 1) // CHUNKS)
        tap_row = tap // KERNEL_W
        tap_col = tap % KERNEL_W
        channel = block * IN_BLOCK + chunk * BLOCK_K
        x_step = (tap_row * DILATION_H * width + tap_col * DILATION_W) * IN_CHANNELS + channel
        mask_x = (((inside >> tap_row) & (inside >> (KERNEL_H + tap_col)) & 1) != 0)[:, None]
        mask_w = offs_n[None, :] < TILE_WIDTH
        if CHUNKS * BLOCK_K != IN_BLOCK:
            mask_x = mask_x & (chunk * BLOCK_K + offs_k < IN_BLOCK)[None, :]
            mask_w = mask_w & (chunk * BLOCK_K + offs_k < IN_BLOCK)[:, None]
        if RAGGED:
            mask_x = mask_x & (channel + offs_k < IN_CHANNELS)[None, :]
        a = tl.load(x_ptr + (x_offs + x_step), mask=mask_x, other=0.0)
        b = tl.load(w_ptrs, mask=mask_w, other=0.0)
        if CHUNKS * BLOCK_K == IN_BLOCK:
            w_ptrs += BLOCK_K * TILE_WIDTH
        else:
            w_ptrs += tl.where(chunk == CHUNKS - 1, IN_BLOCK - (CHUNKS - 1) * BLOCK_K, BLOCK_K) * TILE_WIDTH
        if UPCAST:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    filters = tl.load(filters_ptr + tile * TILE_WIDTH + offs_n, mask=offs_n < TILE_WIDTH, other=-1)
    mask_n = filters >= 0
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + filters, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + filters, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_offs = offs_m[:, None] * out_channels + filters[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + y_offs, mask=mask_y, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # keeps NaN, as torch does; a maximum would drop it
    tl.store(y_ptr + y_offs, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


INTERPRETED = not isinstance(grouped_conv2d_fwd_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when this module was imported: kernels then run on the CPU."""


def _pair(name: str, values: Sequence[int], least: int) -> tuple[int, int]:
    if len(values) != 2 or any(v < least for v in values):
        raise ValueError(f"{name} is {list(values)}: expected two integers >= {least}")
    return values[0], values[1]


def _check_tensors(
    x: Tensor, weight: Tensor, tables: Sequence[Tensor], vectors: dict[str, Tensor | None], out_channels: int
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected [N, C, H, W]")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x is {x.dtype}: the Triton kernel supports float16, bfloat16 and float32")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}, x is {x.dtype}: they must be equal; cast one of them")
    if weight.dim() != 3 or 0 in weight.shape[1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [entries, in_block, tile_width]")
    if len(tables) != 3 or any(t.dtype != torch.int32 for t in tables):
        kinds = [str(t.dtype) for t in tables]
        raise ValueError(f"tables has dtypes {kinds}: expected int32 tile_ptr, entries and filters")
    tile_ptr, entries, filters = tables
    tiles = tile_ptr.numel() - 1
    expected = ((tiles + 1,), (weight.shape[0] + 1,), (tiles, weight.shape[2]))
    given = (tuple(tile_ptr.shape), tuple(entries.shape), tuple(filters.shape))
    if tiles < 0 or given != expected:
        raise ValueError(
            f"tables have shapes {given}: expected tile_ptr [T + 1], entries [E + 1], filters "
            f"[T, tile_width] for a weight of shape {tuple(weight.shape)}"
        )
    if out_channels < 1 or tiles * weight.shape[2] < out_channels:
        raise ValueError(
            f"out_channels is {out_channels}: {tiles} tiles of {weight.shape[2]} filters cannot hold it"
        )
    for name, vector in vectors.items():
        if vector is not None and (tuple(vector.shape) != (out_channels,) or not vector.is_floating_point()):
            raise ValueError(
                f"{name} is {vector.dtype} of shape {tuple(vector.shape)}: expected floating [{out_channels}]"
            )


def _check_devices(x: Tensor, others: Sequence[Tensor]) -> None:
    stray = {str(t.device) for t in others} - {str(x.device)}
    if stray:
        raise ValueError(f"x is on {x.device}, other arguments on {', '.join(sorted(stray))}: move them")
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "x is on the CPU: the Triton kernel needs a GPU, or TRITON_INTERPRET=1 set before the start"
        )


def launch_shape(
    x: Tensor, weight: Tensor, tiles: int, pixels: int, kernel_size: tuple[int, int]
) -> LaunchShape:
    """Return what the config is chosen for; reads the device's properties, never its data."""
    dtype = str(x.dtype).removeprefix("torch.")
    shape = LaunchShape(pixels, weight.shape[1], weight.shape[2], tiles, kernel_size, dtype)
    if x.device.type != "cuda":
        return shape
    properties = torch.cuda.get_device_properties(x.device)
    shared = getattr(properties, "shared_memory_per_block_optin", shape.shared_bytes)
    return LaunchShape(
        pixels,
        weight.shape[1],
        weight.shape[2],
        tiles,
        kernel_size,
        dtype,
        properties.multi_processor_count,
        shared,
    )


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    tables: Sequence[Tensor],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
    config: Sequence[int] = (),
    out: Tensor | None = None,
) -> Tensor:
    """Convolve with the live blocks only: ``y[n, f] = act(scale[f] * sum(w * x) + bias[f] + residual)``.

    Sums run over the entries of the filter's tile and are accumulated in float32; infinities and NaN in ``x``
    reach a filter only through them. A tile without entries gives ``act(bias + residual)``.

    Args:
        x: [N, C, H, W], float16, bfloat16 or float32; copied to channels_last where it is not.
        weight: [E, in_block, tile_width] of x's dtype: the tiles' entries, tile by tile; rows past C and
            columns past a tile's filters are zero.
        tables: int32 tensors: tile_ptr [T + 1]; entries [E + 1], each ``tap * in_blocks + block`` with
            ``tap = r * kw + s``, the last one padding; filters [T, tile_width], each output channel once,
            -1 where a tile is not full.
        bias: [out_channels], floating, added before the residual and the activation.
        residual: [N, out_channels, OH, OW] of x's dtype, added before the activation.
        scale: [out_channels], floating, multiplies the sums before the bias is added.
        out_channels: O.
        kernel_size: (kh, kw), kh + kw at most 31.
        stride: (vertical, horizontal).
        padding: zero border in pixels: (top, bottom, left, right).
        dilation: (vertical, horizontal).
        activation: "none" or "relu" (which keeps NaN, as torch does).
        config: ``KernelConfig.to_list()``; empty takes the heuristic.
        out: channels_last tensor [N, O, OH, OW] of x's dtype that takes the result.

    Returns:
        [N, out_channels, OH, OW] in x's dtype, channels_last.

    Raises:
        ValueError: sizes, devices, a config or an option that do not fit; names what is supported.
        TypeError: an unsupported dtype, or x and weight of different ones.
    """
    _check_tensors(x, weight, tables, {"bias": bias, "scale": scale}, out_channels)
    kernel = _pair("kernel_size", kernel_size, 1)
    strides = _pair("stride", stride, 1)
    dilations = _pair("dilation", dilation, 1)
    if len(padding) != 4 or any(p < 0 for p in padding):
        raise ValueError(f"padding is {list(padding)}: expected four integers >= 0: top, bottom, left, right")
    if activation not in ("none", "relu"):
        raise ValueError(f"activation is {activation!r}: supported are 'none' and 'relu'")
    top, bottom, left, right = padding
    batch, channels, height, width = x.shape
    out_height = (height + top + bottom - dilations[0] * (kernel[0] - 1) - 1) // strides[0] + 1
    out_width = (width + left + right - dilations[1] * (kernel[1] - 1) - 1) // strides[1] + 1
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"x of {height} x {width} pixels is smaller than the kernel: kernel_size {list(kernel)}, "
            f"dilation {list(dilations)}, padding {list(padding)}"
        )
    size = (batch, out_channels, out_height, out_width)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and (tuple(tensor.shape) != size or tensor.dtype != x.dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: expected {x.dtype} of shape {size}"
            )
    if out is not None and not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("out is not channels_last: allocate it with memory_format=torch.channels_last")
    _check_devices(x, [t for t in (weight, *tables, bias, scale, residual, out) if t is not None])

    tiles = tables[0].numel() - 1
    pixels = batch * out_height * out_width
    shape = launch_shape(x, weight, tiles, pixels, kernel)
    chosen = KernelConfig.from_list(config) if len(config) else heuristic_config(shape)
    problem = config_problem(chosen, shape)
    if problem is not None:
        raise ValueError(problem)

    if out is None:
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if pixels == 0:
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    widest = max(x.numel() + height * width * channels, out.numel(), weight.numel())
    n_blocks = -(-weight.shape[2] // chosen.block_n)
    grid = (-(-pixels // chosen.block_m) * tiles * n_blocks,)
    on_device = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        grouped_conv2d_fwd_kernel[grid](
            x,
            weight.contiguous(),
            tables[0],
            tables[1],
            tables[2].contiguous(),
            bias,
            scale,
            residual,
            out,
            pixels,
            tiles,
            height,
            width,
            out_height,
            out_width,
            out_channels,
            top,
            left,
            IN_CHANNELS=channels,
            IN_BLOCK=weight.shape[1],
            TILE_WIDTH=weight.shape[2],
            KERNEL_H=kernel[0],
            KERNEL_W=kernel[1],
            STRIDE_H=strides[0],
            STRIDE_W=strides[1],
            DILATION_H=dilations[0],
            DILATION_W=dilations[1],
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=activation == "relu",
            PRECISION=chosen.precision,
            INDEX64=widest >= INT32_ELEMENTS,
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_K=chosen.block_k,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    return out
