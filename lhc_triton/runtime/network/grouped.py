"""The planned sparse convolution of an accelerated network: one layer with its epilogue."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lhc_triton.runtime.op.grouped_conv2d  # noqa: F401  (registers torch.ops.lhc)
from lhc_triton.planning.backends import BACKENDS
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.choosing.launch_configs import look_up, pixel_bucket
from lhc_triton.runtime.op.backends import unavailable
from lhc_triton.runtime.op.dense import FusedConv2d, autocasts, frozen
from lhc_triton.runtime.op.packing import blocks_from_weight, pack_blocks, weight_from_blocks
from lhc_triton.tf32 import tf32_allowed

_PACKED = ("packed", "tile_ptr", "entries", "filters")


class GroupedConv2d(FusedConv2d):
    """A planned sparse convolution with its epilogue, run by one of the backends.

    Kept in the state_dict are ``blocks`` [pairs, out_block, in_block], the live weights independent of any
    tiling, and ``bias``. What the backend reads is packed from them and not stored; it is packed again when
    the device or the type changes and after ``load_state_dict``. The launch config is looked up once for each
    bucket of output pixels and image size, and kept; nothing is measured.

    Args:
        layer: the plan; its tiles decide the packing.
        blocks: canonical blocks, see ``packing``.
        bias: [O] or None.
        backend: a name of `planning.backends.BACKENDS`.
        activation, pool: the epilogue, see FusedConv2d.
        tune: "off" takes the kernels' heuristic config, "cached" and "full" a measured one where known.

    Raises:
        ValueError: the backend cannot serve the blocks' type and device, or sizes do not fit the plan.
    """

    blocks: nn.Parameter
    packed: Tensor
    tile_ptr: Tensor
    entries: Tensor
    filters: Tensor

    def __init__(
        self,
        layer: LayerPlan,
        blocks: Tensor,
        bias: Tensor | None,
        *,
        backend: str,
        activation: str = "none",
        pool: str = "none",
        tune: str = "cached",
    ) -> None:
        geometry = layer.topology.geometry
        super().__init__(
            geometry.in_channels,
            geometry.out_channels,
            geometry.kernel,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            1,
            bias,
            activation,
            pool,
        )
        self.layer = layer
        self.backend = backend
        self.tune = tune
        self._configs: dict[tuple[int, int, int, bool], list[int]] = {}
        self.blocks = frozen(blocks.detach().clone())
        for name in _PACKED:
            self.register_buffer(name, None, persistent=False)
        self.check_move(blocks.device, self.dtype)
        self._pack()

    @classmethod
    def from_weight(
        cls, layer: LayerPlan, weight: Tensor, bias: Tensor | None, **options: Any
    ) -> GroupedConv2d:
        """Build the layer from a dense weight [O, I, kh, kw]; weights outside the topology are dropped."""
        return cls(layer, blocks_from_weight(layer.topology, weight), bias, **options)

    def dense_weight(self) -> Tensor:
        """Return the weight [O, I, kh, kw], zero outside the topology."""
        return weight_from_blocks(self.layer.topology, self.blocks)

    @property
    def weight(self) -> Tensor:
        """``dense_weight()``, for a network's code that asks a convolution for its weight's type or shape."""
        return self.dense_weight()

    @property
    def dtype(self) -> torch.dtype:
        """The type that the layer's weights have."""
        return self.blocks.dtype

    def check_move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ValueError if the backend could not run on this device in this type."""
        if device.type == "meta":
            return
        reason = unavailable(self.backend, dtype, device)
        if reason is not None:
            raise ValueError(
                f"layer {self.layer.name!r} cannot move to {device} in {dtype}: {reason}; call accelerate() "
                "on the model there instead"
            )

    def check_moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise ValueError, before anything has moved, if the layer cannot follow ``fn``."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.blocks.device))
        self.check_move(probe.device, probe.dtype)

    def _convolve(self, x: Tensor, residual: Tensor | None, activation: str, pool: str) -> Tensor:
        if autocasts(x):
            # Dense layers run in autocast's type; this one's weights are packed in its own.
            result = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                x = x if self.takes(x.dtype) else x.to(self.dtype)
                residual = None if residual is None else residual.to(self.dtype)
                own = self._convolve(x, residual, activation, pool)
                return own.to(result) if own.is_floating_point() else own
        # AOTInductor's packages hand an empty list on as None; backends without configs read none of it.
        has_configs = BACKENDS[self.backend].has_configs
        config: list[int] = [0] if torch.compiler.is_exporting() and not has_configs else []
        if has_configs:
            images, _, height, width = self._sum_shape(x)
            # Under torch.compile the size of an image is no symbol: a config is chosen for this very one.
            height, width = operator.index(height), operator.index(width)
            config = self._config(pixel_bucket(images * height * width), height, width)
        scale, out_step = self._steps()
        y: Tensor = torch.ops.lhc.grouped_conv2d(
            self._operand(x),
            self.packed,
            [self.tile_ptr, self.entries, self.filters],
            self.bias,
            residual,
            scale,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            activation,
            pool,
            self.backend,
            config,
            out_step,
        )
        return y

    def _operand(self, x: Tensor) -> Tensor:
        """Return an input as the operator takes it."""
        return x

    def _steps(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the operator's scale and out_step."""
        return None, None

    def _config(self, bucket: int, height: int, width: int) -> list[int]:
        """Return the launch config for so many output pixels, of images of OH x OW."""
        place = (bucket, height, width, tf32_allowed())
        if place not in self._configs:
            home = self.packed
            found = look_up(self.layer, home.dtype, home.device, bucket, (height, width), tune=self.tune)
            self._configs[place] = list(found.config)
        return self._configs[place]

    # torch.compile calls it once and takes its answer for a constant. torch.compiler.assume_constant_result
    # sets the same mark, but would import Triton together with this module.
    _config._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _pack(self) -> None:
        if self.blocks.device.type == "meta":
            return  # no values to pack yet: load_state_dict(assign=True) brings them
        self._configs.clear()
        packed = pack_blocks(self.layer, self.blocks, backend=self.backend)
        for name, tensor in zip(_PACKED, (packed.weight, *packed.tables), strict=True):
            setattr(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedConv2d:
        self.check_moved(fn)
        super()._apply(fn, recurse)
        self._pack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def extra_repr(self) -> str:
        """Say the sizes, the backend and the density."""
        return f"{super().extra_repr()}, backend={self.backend}, density={self.layer.topology.density:.3f}"


def check_move(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise ValueError, before anything has moved, if a layer of ``model`` cannot follow ``fn``."""
    for module in model.modules():
        if isinstance(module, GroupedConv2d):
            module.check_moved(fn)
