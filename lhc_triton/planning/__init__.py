"""Plans: which filters run together, on which backend, and why. Pure Python and numpy.

The names below are the interface; import them from here. (The function ``plan`` hides the submodule of
the same name as an attribute; ``from lhc_triton.planning.schema import ...`` works all the same.)
"""

from .cost import COST_MODELS, CostModel
from .planner import plan, plan_layer, plan_topologies
from .schema import ConvGeometry, LayerPlan, LayerTopology, Plan, Tile

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
