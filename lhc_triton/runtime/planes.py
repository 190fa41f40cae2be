"""Small dense layers whose output only native layers read: the native kernel runs them, too.

The native kernel reads planes. torch's dense convolution is at its best on channels_last, and writes planes a
good deal slower: on two CPU cores 3 -> 64 channels on 224x224 pixels took 0.8 ms and 1.7 ms. The native
kernel with every weight live takes 1.0 ms, and writes planes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import fx, nn

from lhc_triton.planning.cost import CostModel
from lhc_triton.planning.planner import plan_layer
from lhc_triton.planning.schema import ConvGeometry, LayerPlan, LayerTopology
from lhc_triton.runtime.fusion import border
from lhc_triton.runtime.graph import Site, direct_readers
from lhc_triton.runtime.tracing import Shapes

MAX_WEIGHTS = 1 << 18  # beyond a core's second-level cache the native kernel falls behind at density 1
SLOWER = 1.5  # torch's dense convolution on planes takes about this many times as long as on channels_last
OUT_BLOCK = 16
REASON = "dense, but only native layers read it: they want planes"


def plan_plane_writers(
    traced: fx.GraphModule,
    sites: Sequence[Site],
    shapes: Shapes,
    backends: Mapping[str, str],
    cost: CostModel,
) -> dict[str, LayerPlan]:
    """Plan the dense layers that the native kernel shall run, by name.

    Args:
        traced: the traced network.
        sites: its calls of convolutions.
        shapes: of every node's tensor.
        backends: by layer, who runs it.
        cost: prices the native kernel.
    """
    readers = direct_readers(traced, sites)
    nodes = {node.name: node for node in traced.graph.nodes}
    calls = Counter(site.layer for site in sites)
    plans: dict[str, LayerPlan] = {}
    for site in sites:
        read_by = {backends[name] for name in readers[site.module]}
        conv = traced.get_submodule(site.layer)
        assert isinstance(conv, nn.Conv2d)
        small = conv.weight.numel() <= MAX_WEIGHTS and conv.groups == 1
        if backends[site.layer] != "dense" or read_by != {"native"} or not small or calls[site.layer] > 1:
            continue
        source = nodes[site.nodes[0]].all_input_nodes[0]
        plan = _full_plan(site.layer, conv, shapes[source.name][0], cost)
        if plan.predicted_us["native"] < SLOWER * plan.predicted_us["dense"]:
            plans[site.layer] = plan
    return plans


def _full_plan(name: str, conv: nn.Conv2d, size: torch.Size, cost: CostModel) -> LayerPlan:
    """Plan a convolution with every weight live."""
    kh, kw = conv.kernel_size
    geometry = ConvGeometry(
        size[0], size[1], conv.out_channels, size[2], size[3], (kh, kw), _pair(conv.stride), border(conv),
        _pair(conv.dilation),
    )  # fmt: skip
    mask = np.ones((-(-conv.out_channels // OUT_BLOCK), 1, kh, kw), dtype=bool)
    topology = LayerTopology.from_mask(name, geometry, conv.in_channels, OUT_BLOCK, mask)
    return plan_layer(topology, cost, backend="native")


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])
