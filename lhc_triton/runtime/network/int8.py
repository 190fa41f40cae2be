"""A planned sparse convolution in int8: weights with a step per filter, activations with one per tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lhc_triton.planning.schema import LayerPlan
from lhc_triton.runtime.network.grouped import GroupedConv2d
from lhc_triton.runtime.op.backends import unavailable
from lhc_triton.runtime.op.dense import FusedConv2d
from lhc_triton.runtime.op.packing import blocks_from_weight
from lhc_triton.runtime.op.quantise import LARGEST, step_of


class Int8Conv2d(GroupedConv2d):
    """A planned sparse convolution that multiplies int8 and sums in int32; made by ``quantised``.

    It takes float32, which it rounds to int8 first, or int8 in its own steps, from another layer of its kind;
    it gives float32, or int8 where ``out_step`` is set. What follows the sums is computed in float32.

    Attributes:
        blocks: the weights, int8, see ``GroupedConv2d``.
        scale: [O], what a filter's sum is multiplied with: weight step times input step.
        in_step: [], what 1 stands for in the input.
        out_step: [] or None, what 1 stands for in the output: of the layers that read it. A layer that adds
            a residual has none.
        reads_int8: whether another layer of its kind may hand it int8; see `connect`.
    """

    scale: Tensor
    in_step: Tensor
    out_step: Tensor | None
    reads_int8 = False

    def __init__(
        self,
        layer: LayerPlan,
        blocks: Tensor,
        bias: Tensor | None,
        *,
        scale: Tensor,
        in_step: Tensor,
        out_step: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer, blocks, bias, **options)
        self.register_buffer("scale", scale)
        self.register_buffer("in_step", in_step)
        self.register_buffer("out_step", out_step)

    @classmethod
    def of(cls, layer: LayerPlan, fused: FusedConv2d, backend: str, in_step: Tensor) -> Int8Conv2d:
        """Quantise a fused float32 convolution of groups=1.

        Args:
            layer: its plan.
            fused: dense or sparse.
            backend: who shall run it.
            in_step: [], what 1 shall stand for in its input.

        Raises:
            ValueError: the backend does not serve int8 on the weight's device.
        """
        weight = fused.weight
        assert isinstance(weight, Tensor)
        steps = step_of(weight.detach().flatten(1))
        integers = (weight.detach() / steps.view(-1, 1, 1, 1)).round_().clamp_(-LARGEST, LARGEST)
        made = cls(
            layer,
            blocks_from_weight(layer.topology, integers.to(torch.int8)),
            fused.bias,
            scale=steps * in_step,
            in_step=in_step,
            backend=backend,
            activation=fused.activation,
            pool=fused.pool,
            tune=getattr(fused, "tune", "cached"),
        )
        made.keeps_format = fused.keeps_format
        return made

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations outside: float32."""
        return torch.float32

    def dense_weight(self) -> Tensor:
        """Return the weight [O, I, kh, kw] in float32 that the integers stand for."""
        return super().dense_weight() * (self.scale / self.in_step).view(-1, 1, 1, 1)

    def takes(self, dtype: torch.dtype) -> bool:
        """Return whether inputs may have this type: int8 from such a layer alone, in steps of ``in_step``."""
        return dtype == torch.float32 or (dtype == torch.int8 and self.reads_int8)

    def check_move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ValueError if the backend could not run int8 on this device, or floats become others."""
        if device.type == "meta":
            return
        reason = unavailable(self.backend, torch.int8, device)
        if dtype != torch.float32:
            reason = "beside its int8 weights it computes in float32"
        if reason is not None:
            raise ValueError(
                f"layer {self.layer.name!r} in int8 cannot move to {device} in {dtype}: {reason}; call "
                "accelerate() on the model there instead"
            )

    def _operand(self, x: Tensor) -> Tensor:
        if x.dtype == torch.int8:
            return x
        y: Tensor = torch.ops.lhc.quantise(x, self.in_step)
        return y

    def _steps(self) -> tuple[Tensor | None, Tensor | None]:
        return self.scale, self.out_step


def int8_of(network: fx.GraphModule, node: fx.Node) -> Int8Conv2d | None:
    """Return the int8 layer that a node calls, or None."""
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Int8Conv2d) else None


def connect(network: nn.Module) -> None:
    """Let the int8 layers of a graph take int8 where another one writes it, and nowhere else."""
    for module in network.modules():
        if isinstance(module, Int8Conv2d):
            module.reads_int8 = False
    if not isinstance(network, fx.GraphModule):
        return
    for node in network.graph.nodes:
        writer = int8_of(network, node)
        if writer is not None and writer.out_step is not None:
            for reader in filter(None, (int8_of(network, user) for user in node.users)):
                reader.reads_int8 = True
