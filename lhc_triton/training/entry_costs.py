"""What one live weight of each layer costs, for a penalty that knows what the network will run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor, nn

from lhc_triton.conversion import lhc_layers, output_pixels
from lhc_triton.layers import LHCConv2d
from lhc_triton.planning.cost import CostModel, itemsize_of
from lhc_triton.planning.extract import read_model
from lhc_triton.planning.grouping import candidate_widths

CostKind = Literal["weights", "macs", "latency"]


def entry_costs(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    kind: CostKind = "weights",
    *,
    cost: CostModel | None = None,
) -> Mapping[str, float] | None:
    """Return what one live weight of each LHC layer costs, for `TopologySchedule(entry_costs=...)`.

    Args:
        model: a converted network; it is run once on the example, and left as it was.
        example_input: its input, or the tuple of its inputs. Batch and image size should be those of the
            network in use: what is cheap at one size need not be so at another.
        kind: "weights", all alike: the method's own penalty. "macs": the output pixels of the batch, each of
            which multiplies the weight once. "latency": the predicted us of one entry of a filter group,
            by the planner's cost model, shared among the entry's weights; the layer's launch and what it
            moves whatever its topology is are not in it, nor what batches of equal patterns save.
        cost: predicts the latency; by default the model of the fastest sparse backend of the example's kind
            of device.

    Returns:
        The costs by layer name, in the order of `lhc_layers`; None for "weights". A layer that the example
        does not reach costs nothing.

    Raises:
        ValueError: the kind is unknown, the model has no LHCConv2d or does not run on the example, or there
            is no cost model for the device or the type of the weights.
        TypeError: model or example is of another type.
    """
    if kind not in get_args(CostKind):
        raise ValueError(f"penalty {kind!r} is not supported: choose 'weights', 'macs' or 'latency'")
    layers = lhc_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LHCConv2d: call convert() first")
    if kind == "weights":
        return None
    if kind == "macs":
        pixels = output_pixels(model, example_input, (LHCConv2d,))
        return {name: float(pixels[name]) for name in layers}
    reading = read_model(model, example_input, cost)
    itemsize = itemsize_of(reading.dtype)
    costs = dict.fromkeys(layers, 0.0)
    for topology in reading.topologies:
        if topology.name in costs:
            in_block = min(topology.in_block, topology.geometry.in_channels)
            filters = min(topology.out_block, topology.geometry.out_channels)
            width = candidate_widths(topology.out_block, topology.geometry.out_channels)[0]
            times = reading.cost.entry_times(topology.geometry, in_block, [filters], width, itemsize)
            costs[topology.name] = float(times[0]) / (in_block * filters)
    return costs
