"""Plans: which filters run together, on which backend, and why. Pure Python and numpy."""

from .cost import COST_MODELS, CostModel
from .network_plan import Plan
from .planner import plan, plan_layer, plan_topologies
from .schema import ConvGeometry, LayerPlan, LayerTopology, Tile

__all__ = [
    "COST_MODELS",
    "ConvGeometry",
    "CostModel",
    "LayerPlan",
    "LayerTopology",
    "Plan",
    "Tile",
    "plan",
    "plan_layer",
    "plan_topologies",
]
