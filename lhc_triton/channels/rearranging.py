"""Layers whose channels are taken in another order, or in part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lhc_triton.layers import LHCConv2d
from lhc_triton.topology import block_means


def settle(module: nn.Module) -> None:
    """Make what torch.nn.utils.prune has masked in a layer 0 for good."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


@torch.no_grad()
def take_channels(module: nn.Module, outputs: Tensor | None, inputs: Tensor | None = None) -> None:
    """Give a layer the channels of these numbers, in place; its parameters stay the same objects.

    The topology of an LHCConv2d comes along: a filter group lives wherever one of its filters lived, and what
    did not live is 0 in the weight.

    Args:
        module: a settled convolution, transposed convolution, linear layer, batch norm or nn.PReLU.
        outputs: int64, the filters (or channels of a layer without inputs of its own) to take; None for all.
        inputs: int64, the input channels to take; None for all.
    """
    dims = (1, 0) if isinstance(module, nn.ConvTranspose2d) else (0, 1)
    if isinstance(module, LHCConv2d):
        _take_topology(module, outputs, inputs)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or name in ("effects", "topology", "rigid") or tensor.dim() == 0:
            continue
        taken = tensor.detach()
        if outputs is not None:
            taken = taken.index_select(dims[0] if tensor.dim() > 1 else 0, outputs.to(tensor.device))
        if inputs is not None and name == "weight":
            taken = taken.index_select(dims[1], inputs.to(tensor.device))
        _assign(tensor, taken)
    _count(module, outputs, inputs)


def _assign(tensor: Tensor, values: Tensor) -> None:
    form = torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format
    tensor.data = values.clone(memory_format=form)
    tensor.grad = None


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def _take_topology(layer: LHCConv2d, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Rearrange topology and effects, and make dead weights 0; the weight itself is taken later."""
    config = layer.config
    layer.weight.copy_(layer.masked_weight())
    mask = layer.mask()
    home = layer.weight.device
    rows = torch.arange(layer.out_channels, device=home) if outputs is None else outputs.to(home)
    columns = torch.arange(layer.in_channels, device=home) if inputs is None else inputs.to(home)
    taken = block_means(mask[rows][:, columns], config.in_block, config.out_block) > 0
    groups = rows[:: config.out_block] // config.out_block
    blocks = columns[:: config.in_block] // config.in_block
    _assign(layer.effects, layer.effects.detach()[groups][:, blocks])
    _assign(layer.topology, taken)


def _count(module: nn.Module, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Tell a layer how many channels it has."""
    names: Sequence[tuple[Tensor | None, str, str]] = (
        (outputs, "out_channels", "out_features"),
        (inputs, "in_channels", "in_features"),
    )
    for taken, channels, features in names:
        for name in (channels, features):
            if taken is not None and hasattr(module, name):
                setattr(module, name, len(taken))
    if outputs is None:
        return
    for name in ("num_features", "num_parameters"):
        if hasattr(module, name):
            setattr(module, name, len(outputs))
    if isinstance(module, nn.Conv2d) and module.groups > 1:  # depthwise: it reads what it writes
        module.in_channels = module.groups = len(outputs)


@torch.no_grad()
def add_to_bias(module: nn.Module, shift: Tensor) -> None:
    """Add [O] to a layer's bias, which it may not have had; it is rounded to the weight's type once."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    bias = module.bias
    if isinstance(bias, Tensor):
        bias.copy_((bias.double() + shift.to(bias.device)).to(bias.dtype))
        return
    fresh = shift.to(weight.device, weight.dtype)
    module.bias = nn.Parameter(fresh, requires_grad=weight.requires_grad)


def summed_taps(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the sum over the taps of a layer's weights to some input channels, float64 [O, len(inputs)]."""
    weight = module.masked_weight() if isinstance(module, LHCConv2d) else module.weight
    assert isinstance(weight, Tensor)
    chosen = weight.detach().index_select(1, inputs.to(weight.device)).double()
    return chosen.flatten(2).sum(2) if chosen.dim() > 2 else chosen
