"""What a live weight costs, layer by layer, against the formulas of MACs and of the planner's model."""

import pytest
import torch
from torch import nn

from lhc_triton.conversion import blocks_by_width, convert, lhc_layers, summary
from lhc_triton.planning import COST_MODELS, CostModel
from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.schedule import TopologySchedule
from lhc_triton.topology import LHCConfig
from lhc_triton.training.entry_costs import entry_costs

EXAMPLE = torch.zeros(2, 3, 16, 16)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.Conv2d(128, 40, 1),
    )
    return convert(model, blocks_by_width(LHCConfig(0.1, in_block=16), groups=4, blocks=4))


def test_weights_all_cost_alike():
    assert entry_costs(network(), EXAMPLE, "weights") is None
    assert entry_costs(network(), EXAMPLE) is None


def test_macs_are_the_output_pixels_and_steer_the_mac_density():
    model = network()
    costs = entry_costs(model, EXAMPLE, "macs")
    assert costs == {"1": 2 * 256.0, "3": 2 * 16.0, "4": 2 * 16.0}
    schedule = TopologySchedule(model, EXAMPLE, entry_costs=costs)
    assert schedule.steered_density == pytest.approx(schedule.mac_density, rel=1e-14)
    total = summary(model, (3, 16, 16)).converted
    assert schedule.steered_density == pytest.approx(total.live_macs / total.macs, rel=1e-14)


@pytest.mark.parametrize("model_name", list(COST_MODELS))
def test_latency_is_the_planners_time_of_an_entry_shared_by_its_weights(model_name):
    cost = COST_MODELS[model_name]
    model = network()
    costs = entry_costs(model, EXAMPLE, "latency", cost=cost)
    geometries = {
        "1": ConvGeometry(2, 32, 64, 16, 16),
        "3": ConvGeometry(2, 64, 128, 8, 8, stride=(2, 2)),
        "4": ConvGeometry(2, 128, 40, 4, 4, kernel=(1, 1), padding=(0, 0, 0, 0)),
    }
    assert list(costs) == list(lhc_layers(model)) == list(geometries)
    for name, layer in lhc_layers(model).items():
        in_block, out_block = layer.config.in_block, layer.config.out_block
        (us,) = cost.entry_times(geometries[name], in_block, [out_block], out_block)
        assert costs[name] == pytest.approx(us / (in_block * out_block), rel=1e-12)
    TopologySchedule(model, EXAMPLE, entry_costs=costs)


def test_latency_takes_the_fastest_backend_of_the_examples_device():
    model = network()
    expected = entry_costs(model, EXAMPLE, "latency", cost=CostModel.for_device("cpu"))
    assert entry_costs(model, EXAMPLE, "latency") == expected


def test_a_layer_that_the_example_does_not_reach_costs_nothing():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = network(), convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)))

        def forward(self, x):
            return self.used(x)

    for kind in ("macs", "latency"):
        costs = entry_costs(Partly(), EXAMPLE, kind)
        assert costs["unused.1"] == 0
        assert costs["used.1"] > 0


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (network(), "energy", "penalty 'energy' is not supported: choose 'weights', 'macs' or 'latency'"),
        (nn.Conv2d(3, 3, 3), "macs", "Conv2d has no LHCConv2d: call convert"),
    ],
)
def test_entry_costs_refuse(model, kind, message):
    with pytest.raises(ValueError, match=message):
        entry_costs(model, EXAMPLE, kind)
