"""One planned layer on random data of its planned shapes: what is timed when a layer is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import lhc_triton.runtime.op.grouped_conv2d  # noqa: F401  (registers torch.ops.lhc)
from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.op.dense import DenseConv2d
from lhc_triton.runtime.op.packing import blocks_from_weight, pack, weight_from_blocks
from lhc_triton.runtime.op.quantise import LARGEST

Call = Callable[[], Tensor]


class Workload:
    """A layer with bias and ReLU, ready to run dense or sparse on the same channels_last data.

    Args:
        layer: the plan.
        dtype: of activations and weights. In int8 all of them are whole numbers, so that both sides compute
            the same: the dense side in float32, and the sparse one rounds its input, as in a network.
        device: where they lie.
    """

    def __init__(self, layer: LayerPlan, dtype: torch.dtype, device: torch.device) -> None:
        geometry = layer.topology.geometry
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            if dtype == torch.int8:
                return (values * 32).round_().clamp_(-LARGEST, LARGEST)
            return values.to(dtype)

        self.layer, self.dtype = layer, dtype
        self.weight = random(geometry.out_channels, geometry.in_channels, *geometry.kernel)
        x = random(geometry.batch, geometry.in_channels, geometry.height, geometry.width)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.bias = random(geometry.out_channels)

    def dense(self) -> Call:
        """Return the dense convolution that a network would run, with all its weights."""
        geometry = self.layer.topology.geometry
        conv = DenseConv2d(
            self.weight,
            self.bias,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            activation="relu",
        )
        return partial(conv, self.x)

    def sparse(self, backend: str, config: Sequence[int] = ()) -> Call:
        """Return the planned convolution by a backend, with a launch config or its own."""
        geometry = self.layer.topology.geometry
        packed = pack(self.layer, self.weight, self.dtype, self.x.device, backend)
        x, numbers = self.x, list(config)
        rounds, step = self.dtype == torch.int8, torch.ones_like(self.bias[:1])
        scale = torch.ones_like(self.bias) if rounds else None

        def call() -> Tensor:
            return torch.ops.lhc.grouped_conv2d(
                torch.ops.lhc.quantise(x, step) if rounds else x, packed.weight, packed.tables, self.bias,
                None, scale, geometry.out_channels, geometry.kernel, geometry.stride, geometry.padding,
                geometry.dilation, "relu", "none", backend, numbers,
            )  # fmt: skip

        return call

    def expected(self) -> Tensor:
        """Return what the planned convolution of the first image should give, in float64: [1, O, OH, OW]."""
        topology = self.layer.topology
        geometry = topology.geometry
        weight = weight_from_blocks(topology, blocks_from_weight(topology, self.weight))
        top, bottom, left, right = geometry.padding
        x = F.pad(self.x[:1].double(), (left, right, top, bottom))
        bias = self.bias.double()
        return F.conv2d(x, weight.double(), bias, geometry.stride, 0, geometry.dilation).relu_()
