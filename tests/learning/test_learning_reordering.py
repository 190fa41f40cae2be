"""Filters that change places: the function stays, and consolidation loses no more than without."""

import copy
import itertools

import numpy as np
import pytest
import torch
from channel_networks import NETWORKS, deaden, example, same
from torch import nn
from zoo.networks import conv

import lhc_triton as lhc
from lhc_triton.channels.exchanging import exchange_channels, find_exchanges
from lhc_triton.channels.tracing import channels_of
from lhc_triton.conversion import lhc_layers


def pruned(name, seed=0, in_block=4, out_block=4, budget=0.5):
    torch.manual_seed(seed)
    model, x = deaden(NETWORKS[name](), seed, share=0.05), example(name)
    return lhc.prune(model, x, lhc.LHCConfig(in_block=in_block, out_block=out_block), budget=budget), x


def shuffled(exchanges, count, generator):
    """An order of atoms in which everything that may change places does."""
    order = np.arange(count)
    for unit in exchanges.units:
        order[unit] = order[generator.permutation(unit)]
    for units in exchanges.wholes:
        order[units] = order[units[generator.permutation(len(units))]]
    return order


@pytest.mark.parametrize("in_block", [3, 4, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_exchanged_channels_leave_the_function_and_the_input_blocks(name, in_block):
    model, x = pruned(name, in_block=in_block)
    graph = channels_of(model, (x,))
    blocked = [
        (layer.inputs, in_block)
        for layer in graph.layers
        if isinstance(model.get_submodule(layer.name), lhc.LHCConv2d)
    ]
    exchanges = find_exchanges(graph, blocked)
    order = shuffled(exchanges, len(graph.pinned), np.random.default_rng(in_block))
    assert (order != np.arange(len(order))).sum() > 20
    other = copy.deepcopy(model)
    blocks = exchange_channels(other, graph, order)
    same(model, other, x)
    for name, taken in blocks.items():
        before, after = model.get_submodule(name), other.get_submodule(name)
        # Filters of several groups may have met in one: it has whatever one of them had, block for block.
        assert after.topology.any(0).sum() == before.topology[:, taken].any(0).sum()
        assert torch.equal(after.topology.any(0), before.topology[:, taken].any(0))


def test_units_that_may_not_move_are_seen():
    model, x = pruned("resnet34")
    graph = channels_of(model, (x,))
    order = np.arange(len(graph.pinned))
    first = next(layer for layer in graph.layers if layer.name == "conv1")
    order[first.outputs[[0, 5]]] = order[first.outputs[[5, 0]]]  # of two input blocks of layer1
    other = copy.deepcopy(model)
    exchange_channels(other, graph, order)
    before, after = model.layer1[0].conv1, other.layer1[0].conv1
    assert after.live_weights() > before.live_weights()


@pytest.mark.parametrize("out_block", [2, 4])
@pytest.mark.parametrize("name", ["vgg", "resnet34", "resnet50", "densenet", "unet", "inverted"])
def test_consolidation_loses_no_more_where_filters_move(name, out_block):
    model, x = pruned(name, out_block=out_block, budget=0.3)
    other = copy.deepcopy(model)
    before = lhc.consolidate(model, share=8)
    after = lhc.consolidate(other, x, share=8, permute=True)
    assert after.lost <= before.lost + 1e-9
    assert after.lost_in_place == pytest.approx(before.lost, abs=1e-6)
    for one, two in zip(before.layers, after.layers, strict=True):
        assert two.live_weights <= one.live_weights
        assert two.patterns <= one.patterns
        assert two.live_before == one.live_before
    assert all(one.frozen for one in lhc_layers(other).values())


def test_a_randomly_pruned_network_keeps_more():
    """128 filters of one layer, read by a dense one, in random masks: the gain is small, and it is there."""
    gains = []
    for seed in range(4):
        torch.manual_seed(seed)
        layer = lhc.LHCConv2d(64, 128, 3, padding=1, config=lhc.LHCConfig(in_block=4, out_block=4))
        layer.set_topology(torch.rand(layer.topology.shape) < 0.3, allow_dead=True)
        model = nn.Sequential(
            conv(3, 64), nn.ReLU(), layer, nn.BatchNorm2d(128), nn.ReLU(), conv(128, 4)
        ).eval()
        other = copy.deepcopy(model)
        before = lhc.consolidate(model, share=32)
        after = lhc.consolidate(other, torch.randn(1, 3, 8, 8), share=32, permute=True)
        assert after.layers[0].moved > 0
        assert after.layers[0].live_weights == before.layers[0].live_weights
        gains.append(before.lost - after.lost)
    assert min(gains) > 0


def test_filters_that_use_one_thing_gather():
    """In each of four groups two filters use what all groups have, and two what only theirs has."""
    torch.manual_seed(0)
    layer = lhc.LHCConv2d(6, 16, 1, config=lhc.LHCConfig(in_block=1, out_block=4))
    mask = torch.zeros_like(layer.topology)
    with torch.no_grad():
        layer.weight.uniform_(0.9, 1.1)
        for group in range(4):
            mask[group, [0, 1, 2 + group]] = True
            layer.weight[4 * group : 4 * group + 2, 2:] = 0
            layer.weight[4 * group + 2 : 4 * group + 4, :2] = 0
    layer.set_topology(mask)
    model = nn.Sequential(conv(3, 6), layer, nn.ReLU(), nn.BatchNorm2d(16), conv(16, 4)).eval()
    other = copy.deepcopy(model)
    before = lhc.consolidate(model, share=8)
    after = lhc.consolidate(other, torch.randn(2, 3, 8, 8), share=8, permute=True)
    # Two clusters of three entries each: in place, each loses one of its two own ones; gathered, one is lost.
    assert after.lost < 0.6 * before.lost
    assert after.layers[0].live_weights == before.layers[0].live_weights


def test_small_layers_come_near_the_best_order():
    generator = np.random.default_rng(1)
    ratios = []
    for seed in range(8):
        torch.manual_seed(seed)
        layer = lhc.LHCConv2d(12, 8, 1, config=lhc.LHCConfig(in_block=2, out_block=2))
        masks = generator.random((4, 6)) < 0.5
        masks[:, 0] = True
        layer.set_topology(torch.from_numpy(masks)[:, :, None, None])
        squares = layer.masked_weight().detach().double().square().view(8, 6, 2).sum(2).numpy()
        model = nn.Sequential(conv(3, 12), layer, nn.ReLU(), conv(8, 4)).eval()
        report = lhc.consolidate(model, torch.randn(1, 3, 6, 6), share=4, permute=True)
        counts = sorted(int(row.sum()) for row in np.unique(layer.topology.flatten(1).numpy(), axis=0))
        counts = counts * (2 // len(counts))
        best = max(
            sum(
                np.sort(squares[list(part)].sum(0))[::-1][:count].sum()
                for part, count in zip((some, set(range(8)) - set(some)), order, strict=True)
            )
            for some in itertools.combinations(range(8), 4)
            for order in (counts, counts[::-1])
        )
        ratios.append((1 - report.lost) * squares.sum() / best)
    assert min(ratios) > 0.93
    assert max(ratios) <= 1 + 1e-6


def test_layers_that_are_left_out_keep_their_patterns():
    model, x = pruned("vgg", in_block=8, out_block=2)
    layers = lhc_layers(model)
    last = list(layers)[-1]
    live = {name: float(layer.live_weights()) for name, layer in layers.items()}
    report = lhc.consolidate(model, x, share=8, permute=True, filter_fn=lambda name, layer: name != last)
    assert last not in {row.layer for row in report.layers}
    assert float(layers[last].live_weights()) == live[last]


def test_the_report_says_what_moved():
    model, x = pruned("vgg", in_block=8, out_block=2, budget=0.3)
    report = lhc.consolidate(model, x, share=8, permute=True)
    lines = str(report).splitlines()
    assert lines[0].split()[-1] == "moved"
    assert lines[-1].endswith(f"{report.lost_in_place:.4f} with every filter in its place")
    assert max(map(len, lines)) <= 80
    assert report.to_dict()["layers"][0]["moved"] == report.layers[0].moved


def test_a_time_is_reached_with_filters_moved():
    model, x = pruned("vgg", in_block=8, out_block=4, budget=0.3)
    slow = lhc.plan(model, x).totals.planned_us
    report = lhc.consolidate(model, x, target_us=2 * slow, permute=True)
    assert report.planned_us == pytest.approx(lhc.plan(model, x).totals.planned_us)
    assert report.lost_in_place is not None


class Untraceable(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize(
    ("kind", "example_input", "message"),
    [
        (nn.Sequential, None, "permute needs an example_input"),
        (nn.Sequential, "image", "example_input is a str"),
        (Untraceable, torch.zeros(1, 3, 8, 8), r"torch\.fx cannot trace Untraceable"),
    ],
)
def test_a_wrong_argument_changes_nothing(kind, example_input, message):
    torch.manual_seed(0)
    model = lhc.prune(
        kind(conv(3, 8), conv(8, 16), conv(16, 4)).eval(),
        torch.zeros(1, 3, 8, 8),
        lhc.LHCConfig(in_block=4, out_block=2),
        budget=0.3,
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=message) as error:
        lhc.consolidate(model, example_input, share=8, permute=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
