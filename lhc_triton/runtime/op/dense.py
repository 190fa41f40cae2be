"""A convolution with its epilogue as a module: what every kind of it shares, and the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lhc_triton.planning.schema import out_size
from lhc_triton.runtime.op import cudnn_fused, prepacked
from lhc_triton.runtime.op.epilogue import ACTIVATIONS, POOLS, in_format, is_channels_last, pooled


class FusedConv2d(nn.Module):
    """A convolution for inference with its epilogue: ``pool(act(conv(x) + bias + residual))``.

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in nn.Conv2d, except
            that padding is (top, bottom, left, right).
        activation: "none", "relu" or "silu"; pool: "none" or "max2x2".
        bias: [O] or None, a parameter without gradient; batch norm is already folded into it.
        keeps_format: whether the output has the memory format that nn.Conv2d would give it, which follows its
            input's; for networks whose own code reads the output.
    """

    backend = "dense"
    keeps_format = False
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        bias: Tensor | None,
        activation: str,
        pool: str,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("activation", activation, ACTIVATIONS),
            ("pool", pool, POOLS),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}, expected one of {tuple(choices)}")
        if bias is not None and tuple(bias.shape) != (out_channels,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_channels},)")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride)
        self.padding = tuple(padding)
        self.dilation = tuple(dilation)
        self.groups = groups
        self.activation = activation
        self.pool = pool
        self.bias = None if bias is None else frozen(bias.detach().clone())
        super().train(False)

    def train(self, mode: bool = True) -> FusedConv2d:
        """Stay in eval mode: there is nothing to train in an accelerated convolution."""
        return super().train(False)

    def check_move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ValueError if the layer could not run on this device in this type."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            input: [N, C, H, W], or [C, H, W], in the layer's type; under autocast in any.
            residual: [N, O, OH, OW], added before the activation; None for none.

        Raises:
            TypeError: ``input`` is no tensor.
            ValueError: ``input`` has other dimensions, another number of channels, or another type.
        """
        x: Any = input
        if not isinstance(x, Tensor):
            expected = f"a tensor [N, {self.in_channels}, H, W] of {self.dtype}"
            raise TypeError(f"the input is a {type(x).__name__}, expected {expected}")
        if x.layout != torch.strided:
            raise ValueError(f"the input is {x.layout}, expected torch.strided: call to_dense() on it")
        if x.dim() == 3:
            with_batch = None if residual is None else residual.unsqueeze(0)
            return self.forward(x.unsqueeze(0), with_batch).squeeze(0)
        tracing = (
            torch.jit.is_tracing()
        )  # sizes are tensors then: what compares them becomes no part of a trace
        if x.dim() != 4 or (not tracing and x.shape[1] != self.in_channels):
            raise ValueError(f"the input has shape {tuple(x.shape)}, expected [N, {self.in_channels}, H, W]")
        if not self.takes(x.dtype) and not autocasts(x):
            raise ValueError(f"the input is {x.dtype}, the layer computes in {self.dtype}; convert the input")
        if residual is not None and not tracing and residual.shape != self._sum_shape(x):
            # equal on the example, but not here: the addition broadcasts, which no epilogue does
            y = self._convolve(x, None, "none", "none") + residual
            return self._finish(y, None, self.activation, self.pool)
        y = self._convolve(x, residual, self.activation, self.pool)
        if self.keeps_format and not is_channels_last(x):
            y = in_format(y, torch.contiguous_format)
        return y

    @property
    def dtype(self) -> torch.dtype:
        """The type that the layer's weights have."""
        raise NotImplementedError

    def takes(self, dtype: torch.dtype) -> bool:
        """Return whether inputs may have this type, autocast aside."""
        return dtype == self.dtype

    def _convolve(self, x: Tensor, residual: Tensor | None, activation: str, pool: str) -> Tensor:
        raise NotImplementedError

    def _finish(self, y: Tensor, residual: Tensor | None, activation: str, pool: str) -> Tensor:
        """Run an epilogue on ``y``, which it may overwrite."""
        if residual is not None:
            y = y.add_(residual)
        return pooled(ACTIVATIONS[activation].in_place(y), pool)

    def _sum_shape(self, x: Tensor) -> tuple[Any, ...]:
        size = out_size(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        return (x.shape[0], self.out_channels, *size)

    def extra_repr(self) -> str:
        """Say the sizes, as nn.Conv2d does, and the epilogue."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, activation={self.activation}, pool={self.pool}"
        )


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a parameter without gradient: what ``next(network.parameters())`` should find."""
    return nn.Parameter(tensor, requires_grad=False)


def autocasts(x: Tensor) -> bool:
    """Return whether operations on ``x`` run in autocast's type."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


class DenseConv2d(FusedConv2d):
    """A dense convolution with its epilogue; for the layers that sparsity would not speed up.

    Args:
        weight: [O, I / groups, kh, kw], batch norm folded in.
        bias: [O] or None.
        stride, dilation, groups: as in nn.Conv2d, pairs.
        padding: (top, bottom, left, right).
        activation, pool: the epilogue, see FusedConv2d.
    """

    weight: nn.Parameter

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0, 0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        activation: str = "none",
        pool: str = "none",
    ) -> None:
        out_channels, in_channels, kh, kw = weight.shape
        super().__init__(
            in_channels * groups,
            out_channels,
            (kh, kw),
            stride,
            padding,
            dilation,
            groups,
            bias,
            activation,
            pool,
        )
        with torch.inference_mode(False):  # a tensor made in inference mode could not be kept prepacked
            kept = weight.detach().clone(memory_format=torch.channels_last)
            self.weight = frozen(kept)
        self._prepacked: tuple[Tensor, tuple[int, int], Tensor] | None = None
        self._fused: tuple[tuple[torch.device, torch.dtype], bool] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type that the layer's weights have."""
        return self.weight.dtype

    def _convolve(self, x: Tensor, residual: Tensor | None, activation: str, pool: str) -> Tensor:
        top, bottom, left, right = self.padding
        border: tuple[int, int] = (top, left)
        if (top, left) != (bottom, right):
            x, border = F.pad(x, (left, right, top, bottom)), (0, 0)
        x = x.contiguous(memory_format=torch.channels_last)
        options = (self.stride, border, self.dilation, self.groups)
        if prepacked.serves(x) and not self._differentiates(x):
            y = prepacked.convolve(x, self._in_onednn_order(x, border), self.bias, *options)
        elif activation == "relu" and self._fuses(x):
            y = cudnn_fused.convolve(x, self.weight, self.bias, residual, *options)
            residual, activation = None, "none"
        else:
            y = F.conv2d(x, self.weight, self.bias, *options)
        return self._finish(y, residual, activation, pool)

    def _differentiates(self, x: Tensor) -> bool:
        """Return whether somebody wants gradients: torch's own convolution has them, faster forms do not."""
        wanted = (
            x.requires_grad,
            self.weight.requires_grad,
            self.bias is not None and self.bias.requires_grad,
        )
        return torch.is_grad_enabled() and any(wanted)

    def _fuses(self, x: Tensor) -> bool:
        """Return whether cuDNN's fused kernel takes over; found out at the first call on a device."""
        if not x.is_cuda or torch.compiler.is_compiling() or autocasts(x) or self._differentiates(x):
            return False
        place = (x.device, x.dtype)
        if self._fused is None or self._fused[0] != place:
            if torch.cuda.is_current_stream_capturing():
                return False
            self._fused = (place, cudnn_fused.serves(*place))
        return self._fused[1]

    def _in_onednn_order(self, x: Tensor, border: tuple[int, int]) -> Tensor:
        """Return the prepacked weight, made again whenever the weight is another one or was written to."""
        weight, kept = self.weight, self._prepacked
        # A tensor of inference mode does not tell when it was written to.
        state = None if weight.is_inference() else (weight._version, weight.data_ptr())
        if state is not None and kept is not None and kept[0] is weight and kept[1] == state:
            return kept[2]
        packed = prepacked.prepack(weight, self.stride, border, self.dilation, self.groups, x.shape)
        if state is not None:
            self._prepacked = (weight, state, packed)
        return packed

    @property
    def prepacked_weight(self) -> Tensor | None:
        """The weight in oneDNN's order, once a call has needed it."""
        return None if self._prepacked is None else self._prepacked[2]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the prepacked weight out of copies: it is opaque, and made again."""
        return {**super().__getstate__(), "_prepacked": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # assign=True brings the file's format, and another format may round otherwise
        self.weight = frozen(self.weight.detach().contiguous(memory_format=torch.channels_last))
