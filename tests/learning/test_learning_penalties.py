"""The penalty's additions: entry costs, the aim for fewer patterns; and that without them nothing changes."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

from lhc_triton.conversion import blocks_by_width, convert, lhc_layers, summary
from lhc_triton.schedule import TopologySchedule
from lhc_triton.topology import LHCConfig

EXAMPLE = torch.zeros(2, 3, 8, 8)
PIXELS = {"1": 2 * 64, "2": 2 * 16, "3": 2 * 16}


def network(density=0.1, out_block=4):
    """Three LHC layers with blocks of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.Conv2d(12, 40, 3, padding=1),
        nn.Conv2d(40, 64, 3, stride=2, padding=1),
        nn.Conv2d(64, 30, 1),
    )
    return convert(model, blocks_by_width(LHCConfig(density, 8, out_block), groups=4, blocks=4))


def started(model, **arguments):
    schedule = TopologySchedule(model, EXAMPLE, **arguments)
    schedule.start_epoch(0)
    schedule.end_epoch(task_loss=2.0)
    schedule.start_epoch(7)
    return schedule


def live_by_hand(model):
    return {name: int(layer.mask().detach().sum()) for name, layer in lhc_layers(model).items()}


def weights_of(model):
    return {name: layer.weight.numel() for name, layer in lhc_layers(model).items()}


def share(live, weights, costs):
    return sum(live[n] * costs[n] for n in live) / sum(weights[n] * costs[n] for n in live)


def factor(target):
    return 2.0 / (0.01 + 0.99 * max(target, 1 - target)) * (4.0 * (7 / 20))


@pytest.mark.parametrize("target", [0.1, 0.37, 0.9, 1.0])
def test_without_additions_the_penalty_is_the_methods_to_the_last_bit(target):
    model = network(target)
    live, weights = live_by_hand(model), weights_of(model)
    macs = float(sum(live[n] * PIXELS[n] for n in live)) / sum(weights[n] * PIXELS[n] for n in live)
    regulariser = 0.01 * macs + 0.99 * abs(target - sum(live.values()) / sum(weights.values()))
    penalty = started(model).penalty()
    assert penalty.item() == torch.tensor(factor(target) * regulariser, dtype=torch.float32).item()


def test_without_additions_the_gradient_is_the_methods_to_the_last_bit():
    model, other = network(), network()
    started(model).penalty().backward()
    scale = factor(0.1)
    weights = weights_of(other)
    live = {name: layer.live_weights() for name, layer in lhc_layers(other).items()}
    macs = sum(live[n] * PIXELS[n] for n in live) / sum(weights[n] * PIXELS[n] for n in live)
    total = torch.stack(list(live.values())).sum() / sum(weights.values())
    (scale * (0.01 * macs + 0.99 * (0.1 - total).abs())).to(torch.float32).backward()
    for name, layer in lhc_layers(model).items():
        assert torch.equal(layer.effects.grad, lhc_layers(other)[name].effects.grad)


def test_layers_of_mixed_blocks_are_counted_one_by_one():
    model = network()
    blocks = {n: (x.config.in_block, x.config.out_block) for n, x in lhc_layers(model).items()}
    assert blocks == {"1": (8, 8), "2": (8, 16), "3": (16, 4)}
    live, weights = live_by_hand(model), weights_of(model)
    schedule = TopologySchedule(model, EXAMPLE)
    assert schedule.density == sum(live.values()) / sum(weights.values())
    assert summary(model, (3, 8, 8)).converted.live_weights == sum(live.values())


COSTS = {"1": 3.5, "2": 0.0, "3": 11.0}


def test_entry_costs_steer_the_cost_share_and_leave_the_rest():
    model = network()
    live, weights = live_by_hand(model), weights_of(model)
    schedule = started(model, entry_costs=dict(reversed(COSTS.items())))
    expected = 0.01 * share(live, weights, PIXELS) + 0.99 * abs(0.1 - share(live, weights, COSTS))
    assert schedule.penalty().item() == pytest.approx(factor(0.1) * expected, rel=1e-6)
    assert schedule.steered_density == pytest.approx(share(live, weights, COSTS), rel=1e-14)
    assert schedule.density == sum(live.values()) / sum(weights.values())


def test_equal_costs_steer_the_weights():
    model = network()
    plain, equal = started(model), started(model, entry_costs=dict.fromkeys(COSTS, 7.0))
    assert plain.steered_density == plain.density
    assert equal.steered_density == pytest.approx(plain.density, rel=1e-14)
    assert equal.penalty().item() == pytest.approx(plain.penalty().item(), rel=1e-6)


def test_entry_costs_press_dear_layers_more():
    model = network()
    started(model, entry_costs={"1": 10.0, "2": 1.0, "3": 1.0}).penalty().backward()
    first, second = (layer.effects.grad.abs().max() for layer in list(lhc_layers(model).values())[:2])
    plain = network()
    started(plain).penalty().backward()
    before, after = (layer.effects.grad.abs().max() for layer in list(lhc_layers(plain).values())[:2])
    assert first / second > 5 * before / after


@pytest.mark.parametrize(
    ("costs", "error", "message"),
    [
        ({"1": 1.0, "2": 1.0}, ValueError, r"lacks the layers \['3'\] and has unknown ones \[\]"),
        ({**COSTS, "0": 1.0}, ValueError, r"lacks the layers \[\] and has unknown ones \['0'\]"),
        ({**COSTS, "1": -1.0}, ValueError, r"entry_costs\['1'\]=-1.0 is not supported"),
        ({**COSTS, "1": math.inf}, ValueError, r"entry_costs\['1'\]=inf"),
        ({**COSTS, "1": "1"}, TypeError, r"entry_costs\['1'\]='1' is not a number"),
        (dict.fromkeys(COSTS, 0), ValueError, "entry_costs are all 0"),
    ],
)
def test_entry_costs_refused(costs, error, message):
    with pytest.raises(error, match=message):
        TopologySchedule(network(), EXAMPLE, entry_costs=costs)


def nearest_differences(layer):
    """Mean share of entries in which a group differs from those that together with it have 64 filters."""
    rows = (layer.block_mask() != 0).flatten(1)
    others = min(-(-64 // layer.config.out_block), len(rows)) - 1
    if others == 0:
        return 0.0
    near = torch.cdist(rows.double(), rows.double(), p=1).fill_diagonal_(math.inf).sort(dim=1).values
    return near[:, :others].mean().item() / rows.shape[1]


@pytest.mark.parametrize("mac_share", [0.0, 0.2, 0.75])
def test_mac_share_weighs_the_two_terms(mac_share):
    model = network()
    live, weights = live_by_hand(model), weights_of(model)
    density = sum(live.values()) / sum(weights.values())
    regulariser = mac_share * share(live, weights, PIXELS) + (1 - mac_share) * abs(0.1 - density)
    scale = 2.0 / (mac_share + (1 - mac_share) * 0.9) * (4.0 * (7 / 20))
    assert started(model, mac_share=mac_share).penalty().item() == pytest.approx(
        scale * regulariser, rel=1e-6
    )


def test_training_on_the_penalty_with_a_larger_mac_share_leaves_fewer_macs_at_the_same_density():
    def densities(mac_share):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 64, 3, stride=4, padding=1)
        )
        convert(model, LHCConfig(0.2, in_block=8, out_block=4))
        schedule = started(model, mac_share=mac_share)
        optimiser = torch.optim.SGD([layer.effects for layer in lhc_layers(model).values()], lr=1.0)
        for step in range(300):
            optimiser.param_groups[0]["lr"] = 1 - step / 300
            optimiser.zero_grad()
            schedule.penalty().backward()
            optimiser.step()
        return schedule.density, schedule.mac_density

    (usual, many), (also_usual, few) = densities(0.01), densities(0.2)
    assert few < 0.8 * many
    assert abs(usual - 0.2) < 0.02
    assert abs(also_usual - 0.2) < 0.02


@pytest.mark.parametrize(
    ("mac_share", "error", "message"),
    [
        (-0.1, ValueError, "mac_share=-0.1 is not supported"),
        (1.0, ValueError, "mac_share=1.0 leaves nothing that steers the density: give less than 1"),
        (math.inf, ValueError, "mac_share=inf"),
        (True, TypeError, "mac_share=True is not a number"),
    ],
)
def test_mac_share_refused(mac_share, error, message):
    with pytest.raises(error, match=message):
        TopologySchedule(network(), EXAMPLE, mac_share=mac_share)


@pytest.mark.parametrize("budget", [0.2, 0.9])
def test_macs_cost_nothing_within_their_budget(budget):
    model = network()
    live, weights = live_by_hand(model), weights_of(model)
    density, macs = sum(live.values()) / sum(weights.values()), share(live, weights, PIXELS)
    assert 0.2 < macs < 0.9
    regulariser = 0.3 * max(macs - budget, 0) + 0.7 * abs(0.1 - density)
    scale = 2.0 / (0.3 + 0.7 * 0.9) * (4.0 * (7 / 20))
    penalty = started(model, mac_share=0.3, mac_budget=budget).penalty()
    assert penalty.item() == pytest.approx(scale * regulariser, rel=1e-6)


def test_training_on_the_penalty_keeps_to_the_budget_of_macs_and_spends_it():
    def densities(**arguments):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 64, 3, stride=4, padding=1)
        )
        convert(model, LHCConfig(0.2, in_block=8, out_block=4))
        schedule = started(model, **arguments)
        optimiser = torch.optim.SGD([layer.effects for layer in lhc_layers(model).values()], lr=1.0)
        for step in range(300):
            optimiser.param_groups[0]["lr"] = 1 - step / 300
            optimiser.zero_grad()
            schedule.penalty().backward()
            optimiser.step()
        return schedule.density, schedule.mac_density

    (_, many), (_, few) = densities(mac_share=0.0), densities(mac_share=0.3)
    budget = (many + few) / 2
    density, macs = densities(mac_share=0.3, mac_budget=budget)
    assert abs(density - 0.2) < 0.02
    assert abs(macs - budget) < 0.02


def test_a_gradual_target_and_budget_come_down_from_1_along_a_cubic():
    model = network()
    assert TopologySchedule(model, EXAMPLE, 2, 8, gradual=True).aim == 1
    for epoch, left in ((0, 1.0), (2, 0.75**3), (6, 0.25**3), (8, 0.0), (11, 0.0)):
        schedule = started(
            model, warmup_epochs=2, penalty_epochs=8, mac_share=0.3, mac_budget=0.2, gradual=True
        )
        schedule.start_epoch(epoch)
        assert schedule.aim == pytest.approx(0.1 + 0.9 * left)
        macs = max(schedule.mac_density - (0.2 + 0.8 * left), 0)
        regulariser = 0.3 * macs + 0.7 * abs(schedule.aim - schedule.density)
        expected = 2.0 / (0.3 + 0.7 * 0.9) * 4.0 * min(epoch / 8, 1) * regulariser
        assert schedule.penalty().item() == pytest.approx(expected, rel=1e-6)


def test_without_a_target_nothing_is_gradual():
    assert TopologySchedule(network(density=None), EXAMPLE, gradual=True).aim is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mac_budget": -0.1}, ValueError, "mac_budget=-0.1 is not supported"),
        (
            {"mac_budget": 1.5},
            ValueError,
            "mac_budget=1.5 is not supported: give a share of the MACs, 0 to 1",
        ),
        ({"mac_budget": "0.2"}, TypeError, "mac_budget='0.2' is not a number"),
        ({"gradual": 1}, TypeError, "gradual=1 is not supported: give True or False"),
    ],
)
def test_budget_and_gradual_target_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        TopologySchedule(network(), EXAMPLE, **arguments)


@pytest.mark.parametrize("out_block", [4, 16, 64])
def test_pattern_weight_adds_the_distance_of_the_patterns_weighted_by_the_layers_weights(out_block):
    model = network(out_block=out_block)
    weights = weights_of(model)
    distance = sum(nearest_differences(x) * weights[n] for n, x in lhc_layers(model).items())
    distance /= sum(weights.values())
    added = started(model, pattern_weight=0.5).penalty().item() - started(model).penalty().item()
    assert added == pytest.approx(factor(0.1) * 0.5 * distance, rel=1e-5, abs=1e-6)
    assert (distance > 0) is (out_block < 64)


def test_training_on_the_penalty_with_a_pattern_weight_leaves_fewer_patterns_at_the_same_density():
    def patterns(pattern_weight):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1))
        convert(model, LHCConfig(0.1, in_block=16, out_block=8))
        schedule = started(model, pattern_weight=pattern_weight)
        layer = model[1]
        optimiser = torch.optim.SGD([layer.effects], lr=1.0)
        for step in range(300):
            optimiser.param_groups[0]["lr"] = 1 - step / 300
            optimiser.zero_grad()
            schedule.penalty().backward()
            optimiser.step()
        return len(torch.unique(layer.block_mask().flatten(1), dim=0)), schedule.density

    (many, plain), (few, shared) = patterns(0.0), patterns(1.0)
    assert few < many
    assert abs(plain - 0.1) < 0.02
    assert abs(shared - 0.1) < 0.02


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (-0.1, ValueError, "pattern_weight=-0.1 is not supported"),
        (math.nan, ValueError, "pattern_weight=nan"),
        ("1", TypeError, "pattern_weight='1' is not a number"),
    ],
)
def test_pattern_weight_refused(weight, error, message):
    with pytest.raises(error, match=message):
        TopologySchedule(network(), EXAMPLE, pattern_weight=weight)


def test_pattern_weight_needs_a_density_target():
    with pytest.raises(ValueError, match=r"pattern_weight=0.5 has no penalty to join"):
        TopologySchedule(network(density=None), EXAMPLE, pattern_weight=0.5)


def test_a_state_goes_back_into_a_schedule_of_the_same_additions_only():
    model = network()
    costs = {"1": 1 / 3, "2": 0.1, "3": 7.0}
    state = json.loads(json.dumps(started(model, entry_costs=costs, pattern_weight=0.25).state_dict()))
    same = TopologySchedule(model, EXAMPLE, entry_costs=costs, pattern_weight=0.25)
    same.load_state_dict(state)
    assert same.epoch == 7
    for other in ({}, {"entry_costs": costs}, {"entry_costs": COSTS, "pattern_weight": 0.25}):
        with pytest.raises(ValueError, match="make the schedule with the same arguments"):
            TopologySchedule(model, EXAMPLE, **other).load_state_dict(state)


@pytest.mark.parametrize("out_block", [4, 16])
@pytest.mark.parametrize(("momentum", "steps", "mac_share"), [(0.0, 7, 0.01), (0.9, 30, 0.3)])
def test_at_the_effects_rate_the_penalty_moves_them_by_three_spreads_while_its_ramp_rises(
    out_block, momentum, steps, mac_share
):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 96, 3), nn.Conv2d(96, 128, 3))
    convert(model, LHCConfig(0.001, 8, out_block))
    schedule = TopologySchedule(model, torch.zeros(1, 3, 9, 9), 0, 20, mac_share=mac_share, mac_budget=1.0)
    layers = list(lhc_layers(model).values())
    rate = schedule.effect_rate(steps, task_loss=2.0, momentum=momentum)
    optimiser = torch.optim.SGD([layer.effects for layer in layers], lr=rate, momentum=momentum)
    start = [layer.effects.detach().clone() for layer in layers]
    for epoch in range(20):
        schedule.start_epoch(epoch)
        for _ in range(steps if epoch else 0):
            optimiser.zero_grad()
            schedule.penalty().backward()
            optimiser.step()
        schedule.end_epoch(task_loss=2.0)
    moved = [float((b - layer.effects.detach()).mean()) for b, layer in zip(start, layers, strict=True)]
    spreads = [math.sqrt(2 / layer.effects[0].numel()) for layer in layers]
    entries = [layer.effects.numel() for layer in layers]
    mean = [
        sum(n * x for n, x in zip(entries, values, strict=True)) / sum(entries) for values in (moved, spreads)
    ]
    assert mean[0] / mean[1] == pytest.approx(3.0, rel=0.12)


def test_a_rate_of_effects_needs_steps_a_loss_and_a_momentum():
    schedule = TopologySchedule(network(), EXAMPLE)
    usual = schedule.effect_rate(10, 2.0)
    assert schedule.effect_rate(20, 2.0) == pytest.approx(usual / 2)
    assert schedule.effect_rate(10, 2.0, 0.75) == pytest.approx(usual / 4)
    assert TopologySchedule(network(None), EXAMPLE).effect_rate(10, 2.0) > 0
    for arguments in ((0, 2.0), (10, 0.0), (10, math.nan), (10, 2.0, 1.0), (10, 2.0, -0.1)):
        with pytest.raises(ValueError, match="give"):
            schedule.effect_rate(*arguments)
    for arguments in ((1.5, 2.0), (10, "2"), (10, 2.0, None)):
        with pytest.raises(TypeError):
            schedule.effect_rate(*arguments)


def test_a_target_that_the_blocks_do_not_allow_is_told_before_anything_is_trained():
    def chain(target, **blocks):
        model = nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 64, 1), nn.Conv2d(64, 64, 3))
        return convert(model, LHCConfig(target, **blocks))

    def least(model):
        """The live share with one entry in each filter group, the last block's where that is smaller."""
        for layer in lhc_layers(model).values():
            mask = torch.zeros_like(layer.topology)
            mask[:, -1, 0, 0] = True
            layer.set_topology(mask)
        return sum(live_by_hand(model).values()) / sum(weights_of(model).values())

    example = torch.zeros(1, 3, 8, 8)
    with pytest.warns(
        UserWarning, match=r"the density target 0\.02 is out of reach: .* that is 0\.0"
    ) as caught:
        TopologySchedule(chain(0.02, in_block=32, out_block=16), example)
    found = float(str(caught[0].message).split(" that is ")[1].split()[0])
    assert found > 0.05
    assert found == pytest.approx(least(chain(0.02, in_block=32, out_block=16)), abs=6e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopologySchedule(chain(0.02, in_block=4, out_block=4), example)
        TopologySchedule(chain(None, in_block=64, out_block=64), example)
        frozen = chain(0.02, in_block=32, out_block=16)
        least(frozen)
        TopologySchedule(frozen, example)
