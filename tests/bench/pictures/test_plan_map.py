"""The picture of a plan."""

import numpy as np
import pytest

from lhc_bench.pictures.plan_map import draw_plan, plan_matrix
from lhc_triton.planning.network_plan import Plan
from lhc_triton.planning.schema import ConvGeometry, LayerPlan, LayerTopology, Tile


def layer():
    mask = np.zeros((3, 2, 1, 1), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[2, 1] = True
    geometry = ConvGeometry(1, 4, 5, 4, 4, (1, 1), (1, 1), (0, 0, 0, 0))
    topology = LayerTopology.from_mask("conv", geometry, 2, 2, mask)
    return LayerPlan(topology, (Tile((0, 2), (0, 1)), Tile((1,), (1,))), 16, "native", "why")


def test_the_matrix_shows_filters_by_tile_and_what_a_union_wastes():
    expected = [[1, 2], [1, 2], [2, 1], [0, 1], [0, 1]]  # groups 0, 2 (one filter) and 1
    assert plan_matrix(layer()).tolist() == expected
    assert (plan_matrix(layer()) == 1).sum() * 2 == layer().topology.live_weights


def test_a_picture_is_written(tmp_path):
    plan = Plan((layer(),) * 4, (), "cpu", "float32")
    assert draw_plan(plan, tmp_path / "plan.png", "Plan").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no layer to draw"):
        draw_plan(Plan((), (), "cpu", "float32"), tmp_path / "none.png", "Plan")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]
