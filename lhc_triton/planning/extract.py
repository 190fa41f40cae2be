"""Reading a network: the topologies of its convolutions, in the order in which it calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lhc_triton.conversion import evaluating
from lhc_triton.errors import first_line
from lhc_triton.finite import has_nan
from lhc_triton.layers import LHCConv2d, convolves_plainly
from lhc_triton.takeover import weight_in_force
from lhc_triton.tf32 import tf32_allowed
from lhc_triton.watching import Watch

from .cost import CostModel, itemsize_of
from .patterns import infer_blocks
from .remainder import Remainder
from .schema import ConvGeometry, LayerTopology, OtherWork
from .zeros import describe_zeros

# Wider blocks of a mask are split: no tile has room for more filters, and no kernel wants longer entries.
MAX_BLOCK = 128
DENSE_BLOCK = (128, 16)  # channels and filters of a block where every weight lives
NO_ZEROS = "no zeros"


@dataclass(frozen=True)
class Reading:
    """What planning needs to know of a network.

    Attributes:
        topologies: of the convolutions to plan, in calling order.
        skipped: (name, reason) of the others.
        dense: those of the skipped that merely have no zeros, as topologies in which every block lives.
        others: what else the network computes, by kind, not priced; empty unless it was asked for.
        geometries: of every nn.Conv2d with groups=1 that was called, by name.
        shapes: of every convolution's first input, by name, in calling order.
        cost: the cost model of the input's device kind, or the one given.
        dtype: of the weights, as in "float32".
    """

    topologies: tuple[LayerTopology, ...]
    skipped: tuple[tuple[str, str], ...]
    cost: CostModel
    dtype: str
    dense: tuple[LayerTopology, ...] = ()
    others: tuple[OtherWork, ...] = ()
    geometries: Mapping[str, ConvGeometry] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def read_model(
    model: nn.Module,
    example_input: Any,
    cost: CostModel | None = None,
    backend: str = "auto",
    whole: bool = False,
    watch: Watch | None = None,
    run: Callable[..., Any] | None = None,
) -> Reading:
    """Run a network once and read the topology of every convolution.

    A convolution that is called several times is planned for its first call. Weights that are computed from
    others (torch.nn.utils.prune, parametrisations) are read as the next call in eval mode would use them.

    Args:
        model: LHCConv2d layers bring their masks, nn.Conv2d layers their structured zeros.
        example_input: a tensor, or a tuple of the positional arguments.
        cost: prices the choices; by default the model of ``backend`` on the example's device kind.
        backend: who will run the plan.
        whole: look at everything else that the network computes, too.
        watch: looks on instead, in a reading that is not of the whole.
        run: is called in the model's place, and calls its convolutions.

    Raises:
        ValueError: if the model has no convolution, does not run on the example, or has NaN in the weight of
            a convolution; if the example is empty; if there is no cost model for the device, or for the type
            of the weights.
        TypeError: if an argument has another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    inputs = example_input if isinstance(example_input, tuple | list) else (example_input,)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not tensors:
        raise TypeError(
            f"example_input is a {type(example_input).__name__}: give a tensor or a tuple of them"
        )
    if any(value.numel() == 0 for value in tensors):
        raise ValueError("example_input is empty: give at least one image")
    convs = {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    if not any(isinstance(conv, nn.Conv2d) for conv in convs.values()):
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d: there is nothing to plan")
    cost = cost or CostModel.for_device(tensors[0].device.type, backend, tf32_allowed())
    remainder = Remainder(inputs) if whole else None
    reading = _read_convs(model, convs, _input_shapes(model, convs, inputs, remainder or watch, run), cost)
    if remainder is None:
        return reading
    others = remainder.works(without={topology.name for topology in reading.topologies})
    return replace(reading, others=others)


def reread_model(model: nn.Module, earlier: Reading) -> Reading:
    """Read a network again that has lost filters and channels since: it is not run, and ``others`` is empty.

    Args:
        model: calls the same convolutions as before, on images of the same size.
        earlier: what was read of it then; layers that kept all of their channels are taken from there.

    Raises:
        ValueError: see `read_model`.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    shapes = {}
    for name, shape in earlier.shapes.items():
        place = len(shape) - 1 - len(convs[name].kernel_size)
        shapes[name] = (*shape[:place], convs[name].in_channels, *shape[place + 1 :])
    return _read_convs(model, convs, shapes, earlier.cost, earlier)


def _read_convs(
    model: nn.Module,
    convs: Mapping[str, _ConvNd],
    shapes: Mapping[str, tuple[int, ...]],
    cost: CostModel,
    earlier: Reading | None = None,
) -> Reading:
    """Read the topologies of convolutions from the shapes of their first inputs."""
    known = {} if earlier is None else {one.name: one for one in (*earlier.topologies, *earlier.dense)}
    topologies: list[LayerTopology] = []
    skipped: list[tuple[str, str]] = []
    dense: list[LayerTopology] = []
    with evaluating(model):  # to read a weight under spectral norm in training mode changes its state
        dtypes = {name: str(conv.weight.dtype).removeprefix("torch.") for name, conv in convs.items()}
        dtype = next(dtypes[name] for name, conv in convs.items() if isinstance(conv, nn.Conv2d))
        itemsize_of(dtype)
        for name in [*shapes, *(name for name in convs if name not in shapes)]:
            if name not in shapes:
                found: LayerTopology | str = "not called on the example input"
            elif dtypes[name] != dtype:
                found = f"its weight is {dtypes[name]}, the plan is for {dtype}"
            elif name in known and _has_channels_of(convs[name], known[name]):
                found = known[name]
            else:
                found = _read_layer(name, convs[name], shapes[name])
            if isinstance(found, str):
                skipped.append((name, found))
            elif found.density == 1 and not isinstance(convs[name], LHCConv2d):
                skipped.append((name, NO_ZEROS))
                dense.append(found)
            else:
                topologies.append(found)
    mixing = {name: conv for name, conv in convs.items() if conv.groups == 1}
    geometries = _geometries(mixing, shapes)
    return Reading(
        tuple(topologies), tuple(skipped), cost, dtype, tuple(dense), geometries=geometries, shapes=shapes
    )


def _has_channels_of(conv: _ConvNd, topology: LayerTopology) -> bool:
    geometry = topology.geometry
    return (conv.in_channels, conv.out_channels) == (geometry.in_channels, geometry.out_channels)


def call_geometries(
    model: nn.Module,
    example_input: Any,
    watch: Watch | None = None,
    run: Callable[..., Any] | None = None,
) -> dict[str, ConvGeometry]:
    """Run a network once and return the shapes of each nn.Conv2d's first call, in calling order.

    Args:
        model: the network.
        example_input: a tensor, or a tuple of the positional arguments.
        watch: looks on.
        run: is called in the model's place, and calls its convolutions.

    Raises:
        ValueError: the model does not run on the example.
    """
    inputs = example_input if isinstance(example_input, tuple | list) else (example_input,)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    return _geometries(convs, _input_shapes(model, convs, inputs, watch, run))


def _geometries(
    convs: Mapping[str, _ConvNd], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ConvGeometry]:
    return {
        name: _geometry(conv, shape)
        for name, shape in shapes.items()
        if isinstance(conv := convs.get(name), nn.Conv2d)
    }


def _input_shapes(
    model: nn.Module,
    convs: dict[str, _ConvNd],
    inputs: Sequence[Any],
    watch: Watch | None = None,
    run: Callable[..., Any] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each convolution's first input, in calling order; ``watch`` looks on."""
    seen: dict[str, tuple[int, ...]] = {}

    def recording(name: str, conv: _ConvNd) -> Callable[..., Any]:
        original = conv.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            value = args[0] if args else kwargs.get("input")
            if isinstance(value, Tensor):
                seen.setdefault(name, tuple(value.shape))
            if watch is None:
                return original(*args, **kwargs)
            with watch.convolution():
                output = original(*args, **kwargs)
            watch.convolved(name, conv, value, output)
            return output

        return forward

    # Not by hooks: a network may call ``layer.forward(x)``.
    own = {conv: vars(conv).get("forward") for conv in convs.values()}
    for name, conv in convs.items():
        vars(conv)["forward"] = recording(name, conv)
    try:
        given = [value.clone() if isinstance(value, Tensor) else value for value in inputs]  # to write to
        with evaluating(model), watch or nullcontext():
            (run or model)(*given)
    except Exception as error:  # the model's code is not ours: whatever it raises becomes one line
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor))
        line = first_line(error)
        raise ValueError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {line}"
        ) from error
    finally:
        for conv, forward in own.items():
            vars(conv).pop("forward")
            if forward is not None:
                vars(conv)["forward"] = forward
    return seen


def _read_layer(name: str, conv: _ConvNd, shape: tuple[int, ...]) -> LayerTopology | str:
    """Return a layer's topology, or why it is not planned."""
    if not isinstance(conv, nn.Conv2d):
        return f"is a {type(conv).__name__}; only nn.Conv2d is planned"
    if not convolves_plainly(conv):
        return f"is a {type(conv).__name__}, with behaviour of its own"
    if conv.groups != 1:
        return f"groups={conv.groups}; only groups=1 is planned"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}; only 'zeros' is planned"
    geometry = _geometry(conv, shape)
    weight = weight_in_force(conv)
    if has_nan(weight):
        raise ValueError(f"layer {name!r} has NaN in its weight; repair the model first")
    if isinstance(conv, LHCConv2d):
        mask: np.ndarray = conv.block_mask().bool().cpu().numpy()
        config = conv.config
        topology = LayerTopology.from_mask(name, geometry, config.in_block, config.out_block, mask)
        return topology.split(MAX_BLOCK)
    live: np.ndarray = (weight != 0).cpu().numpy()
    if live.all():
        grid = (-(-conv.out_channels // DENSE_BLOCK[1]), -(-conv.in_channels // DENSE_BLOCK[0]))
        mask = np.ones((*grid, *conv.kernel_size), dtype=bool)
        return LayerTopology.from_mask(
            name, geometry, min(conv.in_channels, DENSE_BLOCK[0]), DENSE_BLOCK[1], mask
        )
    blocks = infer_blocks(live)
    if blocks is None:
        return describe_zeros(live)
    return LayerTopology.from_mask(name, geometry, blocks.in_block, blocks.out_block, blocks.mask)


def _geometry(conv: nn.Conv2d, shape: tuple[int, ...]) -> ConvGeometry:
    (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
    if conv.padding == "valid":
        padding = (0, 0, 0, 0)
    elif conv.padding == "same":
        down, across = dh * (kh - 1), dw * (kw - 1)
        padding = (down // 2, down - down // 2, across // 2, across - across // 2)
    else:
        vertical, horizontal = (int(p) for p in conv.padding)
        padding = (vertical, vertical, horizontal, horizontal)
    *batch, _, height, width = shape  # [N, I, H, W], or [I, H, W]
    sh, sw = conv.stride
    return ConvGeometry(
        batch[0] if batch else 1,
        conv.in_channels,
        conv.out_channels,
        height,
        width,
        (kh, kw),
        (sh, sw),
        padding,
        (dh, dw),
    )
