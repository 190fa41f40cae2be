"""Sums over the planned layers of a network, and what else it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .schema import LayerPlan, OtherWork


@dataclass(frozen=True)
class Totals:
    """Sums over the planned layers of a network.

    Attributes:
        layers, sparse_layers: how many are planned, and how many of them do not run dense.
        weights, live_weights: of the dense layers, and of their topologies.
        macs, live_macs, planned_macs: multiply-accumulates of the dense layers, of their topologies, and of
            the tiles (a layer that runs dense counts in full).
        dense_us, planned_us: predicted time all dense, and with the planned backends; a backend that the cost
            model does not price (a forced one) makes ``planned_us`` None.
        others_us: predicted time of what else the network computes; None where that was not looked at.
    """

    layers: int
    sparse_layers: int
    weights: int
    live_weights: int
    macs: int
    live_macs: int
    planned_macs: int
    dense_us: float
    planned_us: float | None
    others_us: float | None = None

    @property
    def dense_network_us(self) -> float | None:
        """Predicted time of the whole network, all dense; None where the rest was not looked at."""
        return None if self.others_us is None else self.dense_us + self.others_us

    @property
    def network_us(self) -> float | None:
        """Predicted time of the whole network as planned; None where a part of it is not known."""
        if self.others_us is None or self.planned_us is None:
            return None
        return self.planned_us + self.others_us


def totals_of(layers: Sequence[LayerPlan], others: Sequence[OtherWork] = ()) -> Totals:
    """Return the sums over planned layers, and over the rest of the network."""
    topologies = [layer.topology for layer in layers]
    sparse = [layer.backend != "dense" for layer in layers]
    macs = [topology.geometry.macs for topology in topologies]
    times = [layer.predicted_us.get(layer.backend) for layer in layers]
    priced = [us for us in times if us is not None]
    return Totals(
        layers=len(layers),
        sparse_layers=sum(sparse),
        weights=sum(topology.geometry.weights for topology in topologies),
        live_weights=sum(topology.live_weights for topology in topologies),
        macs=sum(macs),
        live_macs=sum(topology.live_macs for topology in topologies),
        planned_macs=sum(
            layer.planned_macs if is_sparse else dense
            for layer, is_sparse, dense in zip(layers, sparse, macs, strict=True)
        ),
        dense_us=sum(layer.predicted_us.get("dense", 0.0) for layer in layers),
        planned_us=sum(priced) if len(priced) == len(times) else None,
        others_us=sum(work.predicted_us for work in others) if others else None,
    )
