"""consolidate: fewer patterns, what that loses, and what is refused."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import lhc_triton as lhc
from lhc_triton.conversion import lhc_layers
from lhc_triton.layers import LHCConv2d
from lhc_triton.topology import LHCConfig


def layer_of(masks, weights=None, in_block=2, out_block=2, seed=0):
    """A frozen 3x3-free layer whose groups have these entries: masks is bool [groups, blocks]."""
    torch.manual_seed(seed)
    masks = torch.as_tensor(masks, dtype=torch.bool)
    config = LHCConfig(in_block=in_block, out_block=out_block)
    layer = LHCConv2d(in_block * masks.shape[1], out_block * len(masks), 1, config=config)
    layer.set_topology(masks[:, :, None, None])
    return layer


def network(seed=0, budget=0.3):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 60, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(60, 64, 1),
    )
    return lhc.prune(model.eval(), torch.zeros(1, 3, 8, 8), LHCConfig(in_block=8, out_block=4), budget=budget)


def rows(layer):
    return {tuple(row) for row in layer.topology.flatten(1).int().tolist()}


@pytest.mark.parametrize("share", [8, 16, 24, 64, 1000])
def test_every_pattern_is_shared_by_enough_filters(share):
    model = network()
    weights = {name: layer.masked_weight().detach() for name, layer in lhc_layers(model).items()}
    before = {name: float(layer.live_weights()) for name, layer in lhc_layers(model).items()}
    report = lhc.consolidate(model, share=share)
    whole = gone = 0.0
    for row in report.layers:
        layer = lhc_layers(model)[row.layer]
        _, counts = torch.unique(layer.topology.flatten(1), dim=0, return_counts=True)
        assert int(counts.min()) * 4 >= min(share, layer.out_channels)
        assert row.patterns == len(counts)
        assert row.live_weights == int(layer.live_weights())
        assert row.live_weights <= before[row.layer] + 4 * 4 * 9  # cropped blocks count for full ones
        old, new = weights[row.layer], layer.masked_weight().detach()
        assert torch.equal(new, old * layer.mask())
        lost = 1 - new.double().square().sum() / old.double().square().sum()
        assert row.lost == pytest.approx(float(lost), abs=1e-9)
        whole, gone = whole + old.square().sum(), gone + (old - new).square().sum()
    assert report.lost == pytest.approx(float(gone / whole), abs=1e-6)


def test_the_default_is_64_filters():
    model, other = network(), network()
    assert lhc.consolidate(model) == lhc.consolidate(other, share=64)


@pytest.mark.parametrize("patterns", [1, 2, 5])
def test_no_layer_keeps_more_patterns_than_asked_for(patterns):
    model = network()
    report = lhc.consolidate(model, patterns=patterns)
    assert all(len(rows(layer)) <= patterns for layer in lhc_layers(model).values())
    assert report.lost < 0.9


def test_nothing_is_lost_where_the_patterns_are_few_already():
    masks = [[1, 0, 0], [0, 1, 1], [1, 0, 0], [0, 1, 1]]
    for aim in ({"patterns": 2}, {"share": 4}):
        layer = layer_of(masks)
        before = layer.topology.clone()
        assert lhc.consolidate(layer, **aim).lost == 0
        assert torch.equal(layer.topology, before)


def test_scattered_sharers_find_each_other():
    generator = np.random.default_rng(0)
    kinds = generator.random((4, 24)) < 0.3
    kinds[:, :1] = True
    masks = kinds[generator.permutation(np.repeat(np.arange(4), 4))]
    layer = layer_of(masks)
    assert lhc.consolidate(layer, share=8).lost == 0


def test_pairs_of_groups_keep_nearly_what_the_best_pairing_keeps():
    generator = np.random.default_rng(1)
    ratios = []
    for seed in range(10):
        masks = generator.random((6, 8)) < 0.4
        masks[:, 0] = True
        layer = layer_of(masks, seed=seed)
        squares = layer.masked_weight().detach().double().square()
        energy = squares.view(6, 2, 8, 2).sum(dim=(1, 3)).numpy()

        def kept(pair, energy=energy, masks=masks):
            count = max(1, int(masks[list(pair)].sum()) // 2)
            return np.sort(energy[list(pair)].sum(axis=0))[::-1][:count].sum()

        pairings = [
            p
            for p in itertools.combinations(itertools.combinations(range(6), 2), 3)
            if len({*p[0], *p[1], *p[2]}) == 6
        ]
        best = max(sum(map(kept, pairing)) for pairing in pairings)
        report = lhc.consolidate(layer, share=4)
        ratios.append((1 - report.lost) * energy.sum() / best)
    assert min(ratios) > 0.93
    assert max(ratios) <= 1 + 1e-6


def test_the_smallest_share_that_reaches_a_time_is_taken():
    model, x = network(), torch.zeros(2, 3, 32, 32)
    slow = lhc.plan(model, x).totals.planned_us
    fast = copy.deepcopy(model)
    lhc.consolidate(fast, share=64)
    least = lhc.plan(fast, x).totals.planned_us
    assert least < slow
    report = lhc.consolidate(model, x, target_us=(slow + least) / 2)
    assert report.planned_us == pytest.approx(lhc.plan(model, x).totals.planned_us)
    assert report.planned_us <= (slow + least) / 2
    before = model[2].topology.clone()
    with pytest.raises(ValueError, match=r"target_us=1 cannot be reached: the least is predicted at \d+ us"):
        lhc.consolidate(model, x, target_us=1)
    assert torch.equal(model[2].topology, before)


def test_new_entries_start_at_zero_and_learn():
    layer = layer_of([[1, 0], [0, 1]])
    before = layer(torch.ones(1, 4, 2, 2)).detach()
    lhc.consolidate(layer, share=4)
    dead = layer.masked_weight().detach() == 0
    assert dead.any()
    layer(torch.ones(1, 4, 2, 2)).square().sum().backward()
    live = layer.mask() != 0
    assert layer.weight.grad[live].abs().min() > 0
    assert before.shape == (1, 4, 2, 2)


def test_the_report_fits_a_terminal_and_json():
    report = lhc.consolidate(network(), filter_fn=lambda name, layer: name != "4")
    assert [row.layer for row in report.layers] == ["2"]
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["layer"] == "2"
    assert max(map(len, str(report).splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patterns": 2, "share": 64}, "patterns and share are given: give one of"),
        ({"patterns": 0}, "patterns=0 is not supported"),
        ({"share": -4}, "share=-4 is not supported"),
        ({"share": 1.5}, r"share=1\.5 is not an int"),
        ({"target_us": 5.0}, "target_us needs an example_input"),
        ({"target_us": "soon"}, "target_us='soon' is not a number"),
        ({"target_us": -1}, "target_us=-1 is not supported"),
        ({"filter_fn": lambda name, layer: False}, "there is no LHCConv2d"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    model = network()
    before = model[2].topology.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        lhc.consolidate(model, **arguments)
    assert torch.equal(model[2].topology, before)


def test_a_network_that_still_learns_is_refused():
    model = lhc.convert(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)))
    with pytest.raises(ValueError, match=r"layer '1' still learns its topology: call freeze\(\)"):
        lhc.consolidate(model)
