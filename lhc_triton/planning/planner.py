"""From topologies to a plan: tile width, tiles and backend of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from .backends import check_backend
from .cost import CostModel, itemsize_of
from .grouping import candidate_widths, form_tiles
from .network_plan import Plan
from .schema import LayerPlan, LayerTopology, OtherWork, Tile

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .extract import Reading

BackendName = Literal["auto", "dense", "reference", "torch", "native", "triton"]


def choose_tiles(
    topology: LayerTopology,
    cost: CostModel,
    itemsize: int = 4,
    form: Callable[[LayerTopology, CostModel, int, int], tuple[Tile, ...]] = form_tiles,
) -> tuple[int, tuple[Tile, ...], float]:
    """Return (tile width, tiles, predicted us) of the cheapest candidate width, as ``form`` tiles each.

    Where memory hides the tiles' own time, the width with the least of that wins, and then the narrowest.
    """
    choices = []
    for width in candidate_widths(topology.out_block, topology.geometry.out_channels):
        tiles = form(topology, cost, width, itemsize)
        predicted = cost.sparse_us(topology, tiles, width, itemsize)
        work = cost.tiles_us(topology, tiles, width, itemsize)
        choices.append(((predicted, work, width), tiles))
    (predicted, _, width), tiles = min(choices, key=lambda choice: choice[0])
    return width, tiles, predicted


def plan_layer(
    topology: LayerTopology, cost: CostModel, *, backend: str = "auto", dtype: str = "float32"
) -> LayerPlan:
    """Plan one layer: tiles, their width, and the backend.

    Args:
        topology: which weights live.
        cost: the device's cost model.
        backend: "auto" takes the cheaper of the device's sparse backend and "dense"; another name is kept.
        dtype: compute type.

    Raises:
        ValueError: for an unknown backend or dtype.
    """
    check_backend(backend)
    itemsize = itemsize_of(dtype)
    width, tiles, _ = choose_tiles(topology, cost, itemsize)
    planned = price_tiles(topology, tiles, width, cost, itemsize)
    if backend != "auto":
        return replace(planned, backend=backend, reason="forced")
    return planned


def price_tiles(
    topology: LayerTopology, tiles: tuple[Tile, ...], width: int, cost: CostModel, itemsize: int = 4
) -> LayerPlan:
    """Plan one layer whose tiles are given: the cheaper of the model's sparse backend and "dense"."""
    sparse = cost.sparse_us(topology, tiles, width, itemsize)
    dense = cost.dense_us(topology.geometry, itemsize)
    predicted = {"dense": dense, cost.sparse_backend: sparse}
    if sparse < cost.margin * dense:
        reason = f"predicted {dense / sparse:.1f}x faster than dense"
        return LayerPlan(topology, tiles, width, cost.sparse_backend, reason, predicted)
    reason = f"{cost.sparse_backend} is predicted at {dense / sparse:.2f}x of dense's speed"
    return LayerPlan(topology, tiles, width, "dense", reason, predicted)


def plan_topologies(
    topologies: Iterable[LayerTopology],
    cost: CostModel,
    *,
    backend: str = "auto",
    dtype: str = "float32",
    skipped: Iterable[tuple[str, str]] = (),
    dense: Iterable[LayerTopology] = (),
    others: Iterable[OtherWork] = (),
    known: Iterable[LayerPlan] = (),
) -> Plan:
    """Plan every layer of a network from its topologies; see :func:`plan_layer`.

    Args:
        topologies: of the layers to plan.
        cost: see :func:`plan_layer`.
        backend: see :func:`plan_layer`.
        dtype: see :func:`plan_layer`.
        skipped: (name, reason) of the network's other convolutions.
        dense: those of the skipped that have no zeros. With backend "auto" a sparse backend that also excels
            with every weight live takes the ones that it is predicted to run faster.
        others: what else the network computes; they are priced here.
        known: layers that were planned before with the same settings; those with an equal topology are taken.
    """
    check_backend(backend)
    plans = {layer.topology: layer for layer in known}

    def planned_layer(topology: LayerTopology) -> LayerPlan:
        return plans.get(topology) or plan_layer(topology, cost, backend=backend, dtype=dtype)

    layers = [planned_layer(topology) for topology in topologies]
    if backend == "auto" and cost.takes_dense:
        full = [planned_layer(topology) for topology in dense]
        layers += [layer for layer in full if layer.backend != "dense"]
    planned = {layer.name for layer in layers}
    left = tuple(pair for pair in skipped if pair[0] not in planned)
    itemsize = itemsize_of(dtype)
    priced = tuple(replace(work, predicted_us=cost.other_us(work, itemsize)) for work in others)
    return Plan(tuple(layers), left, cost.device, dtype, priced)


def plan(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    backend: BackendName = "auto",
    cost: CostModel | None = None,
    dense: bool = False,
    whole: bool = True,
) -> Plan:
    """Plan a network: which filters of each convolution run together, on which backend, and why.

    Args:
        model: any module; its LHCConv2d layers and its nn.Conv2d layers with structured zeros are planned.
            It is run once on ``example_input`` in eval mode without gradients, and left as it was.
        example_input: a tensor [N, C, H, W], or a tuple of the positional arguments of ``model``.
        backend: "auto", or the one backend that every layer shall use.
        cost: prices the choices; by default the model of ``backend`` on the example input's device
            kind.
        dense: plan layers without zeros, too, where backend "auto" would run them faster than torch does, as
            ``lhc.accelerate`` asks for.
        whole: predict the rest of the network as well (convolutions that stay dense, pooling, additions,
            changes of the memory format, matrix products), for the totals.

    Raises:
        ValueError: for an unknown backend, dtype or device kind, a model without a convolution or with NaN in
            the weight of one, or an example input that the model does not take.
        TypeError: if ``model`` or ``example_input`` has another type.
    """
    from .extract import read_model  # torch is needed here, and only here

    check_backend(backend)
    return plan_reading(read_model(model, example_input, cost, backend, whole), backend, dense)


def plan_reading(
    reading: Reading, backend: BackendName = "auto", dense: bool = False, known: Iterable[LayerPlan] = ()
) -> Plan:
    """Plan what was read of a network; see :func:`plan` and :func:`plan_topologies`."""
    return plan_topologies(
        reading.topologies,
        reading.cost,
        backend=backend,
        dtype=reading.dtype,
        skipped=reading.skipped,
        dense=reading.dense if dense else (),
        others=reading.others,
        known=known,
    )
