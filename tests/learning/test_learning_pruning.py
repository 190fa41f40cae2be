"""prune and to_dense: which blocks stay, what a budget means, what is refused, and the way back."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import lhc_triton as lhc
from lhc_triton.conversion import convert, lhc_layers
from lhc_triton.layers import LHCConv2d
from lhc_triton.planning import plan
from lhc_triton.topology import LHCConfig, rigid_shapes

SMALL = LHCConfig(in_block=8, out_block=4)


class Residual(nn.Module):
    """A stem, a block with a 1x1 shortcut, a depthwise convolution, and a layer that is not called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 28, 3, stride=2, padding=1, bias=False)
        self.shortcut = nn.Conv2d(16, 28, 1, stride=2)
        self.depthwise = nn.Conv2d(28, 28, 3, padding=1, groups=28)
        self.spare = nn.Conv2d(16, 16, 3)
        self.last = nn.Conv2d(28, 20, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.last(self.depthwise((self.body(x) + self.shortcut(x)).relu()))


def network(seed=0):
    torch.manual_seed(seed)
    return Residual().eval()


def image(seed=1):
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def live_share(model):
    layers = lhc_layers(model).values()
    return sum(float(x.live_weights()) for x in layers) / sum(x.weight.numel() for x in layers)


def block_squares(layer, weight):
    """Mean squared weight of each block, by a plain loop."""
    b, g = layer.config.in_block, layer.config.out_block
    means = torch.empty(layer.topology.shape, dtype=torch.float64)
    for o in range(means.shape[0]):
        for i in range(means.shape[1]):
            means[o, i] = weight[o * g : o * g + g, i * b : i * b + b].double().square().mean((0, 1))
    return means


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.77])
def test_the_best_blocks_of_the_network_stay_and_no_better_one_goes(budget):
    model = network()
    weights = {
        name: conv.weight.detach().clone() for name, conv in model.named_modules() if hasattr(conv, "weight")
    }
    assert lhc.prune(model, image(), SMALL, budget=budget) is model
    layers = lhc_layers(model)
    assert set(layers) == {"body", "shortcut", "spare", "last"}
    assert all(layer.frozen and not layer.effects.requires_grad for layer in layers.values())
    chosen, rest = [], []
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight.detach(), weights[name], rtol=0, atol=0)
        scores = block_squares(layer, weights[name])
        chosen_first = layer.topology.flatten(1).sum(dim=1) > 1
        chosen.append(scores[chosen_first][layer.topology[chosen_first]])
        rest.append(scores[~layer.topology])
        best = scores.flatten(1).argmax(dim=1)
        assert bool(layer.topology.flatten(1).gather(1, best[:, None]).all())
    assert float(torch.cat(chosen).min()) >= float(torch.cat(rest).max())
    largest_block = max(layer.config.in_block * layer.config.out_block for layer in layers.values())
    total = sum(layer.weight.numel() for layer in layers.values())
    assert budget - largest_block / total <= live_share(model) <= budget


def test_each_layer_keeps_its_share_where_the_scope_is_the_layer():
    model = lhc.prune(network(), image(), SMALL, budget=0.3, scope="layer")
    assert model.shortcut.topology.flatten(1).sum(dim=1).tolist() == [1] * 7  # of two: the least there is
    for layer in (model.body, model.spare, model.last):
        block = layer.config.in_block * layer.config.out_block
        assert 0.3 - block / layer.weight.numel() < layer.density <= 0.3


def test_the_budget_is_the_configs_density_by_default():
    assert 0.2 < live_share(lhc.prune(network(), image(), LHCConfig(0.25, 8, 4))) <= 0.25


def test_equal_weights_fill_the_budget_in_their_order():
    model = network()
    for conv in (model.body, model.shortcut, model.spare, model.last):
        nn.init.constant_(conv.weight, 0.5)
    lhc.prune(model, image(), SMALL, budget=0.4)
    assert 0.39 < live_share(model) <= 0.4


def test_macs_count_each_weight_as_often_as_it_is_used():
    reports = []
    model = lhc.prune(network(), image(), SMALL, budget=0.3, objective="macs", report=reports.append)
    (report,) = reports
    layers = {row.layer: row for row in report.layers}
    assert layers["spare"].macs == 0
    assert layers["spare"].density == 1  # it costs nothing
    assert layers["body"].macs == 28 * 16 * 9 * 2 * 6 * 6
    live, whole = sum(r.live_macs for r in report.layers), sum(r.macs for r in report.layers)
    assert live == sum(
        int(layer.live_weights()) * layers[n].macs // layers[n].weights
        for n, layer in lhc_layers(model).items()
    )
    assert 0.29 < live / whole <= 0.3
    assert report.kept == pytest.approx(live / whole)


def test_latency_is_the_planners():
    def wide():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 128, 3, padding=1),
        )

    x, reports = torch.randn(2, 3, 28, 28), []
    model = lhc.prune(wide(), x, budget=0.4, objective="latency", report=reports.append)
    totals = plan(model, x).totals
    assert totals.layers == 2
    assert totals.planned_us / totals.dense_us == pytest.approx(reports[0].kept)
    assert 0.35 < reports[0].kept <= 0.4


def test_rigid_shapes_stay_in_their_family():
    model = lhc.prune(network(), image(), LHCConfig(in_block=8, out_block=4, shapes="rigid"), budget=0.3)
    assert 0.25 < live_share(model) <= 0.3
    for layer in lhc_layers(model).values():
        shapes = {tuple(s.flatten().tolist()) for s in rigid_shapes(layer.kernel_size)}
        assert {tuple(k.flatten().tolist()) for k in layer.topology.flatten(0, 1)} <= shapes
        assert bool(layer.topology.flatten(1).any(dim=1).all())


def test_scores_of_ones_own_rule():
    model = network()
    scores = {n: torch.zeros_like(getattr(model, n).weight) for n in ("body", "shortcut", "spare", "last")}
    for score in scores.values():
        score[:, :8, 0, 0] = 1
    lhc.prune(model, image(), SMALL, budget=0.9, scores=scores)
    for layer in lhc_layers(model).values():
        expected = torch.zeros_like(layer.topology)
        expected[:, 0, 0, 0] = True
        assert torch.equal(layer.topology, expected)


def test_l1_and_l2_differ_where_few_weights_are_large():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 1), nn.Conv2d(16, 4, 1))
    nn.init.constant_(model[1].weight, 0.4)
    model[1].weight.data[:, :8] = 0
    model[1].weight.data[0, 0] = 3.0
    kept = {
        n: lhc.prune(copy.deepcopy(model), torch.ones(1, 1, 4, 4), SMALL, budget=0.5, scores=n)[1]
        for n in ("l1", "l2")
    }
    assert kept["l2"].topology.flatten().tolist() == [True, False]
    assert kept["l1"].topology.flatten().tolist() == [False, True]


def test_blocks_without_weight_go_though_the_budget_would_keep_them():
    model = network()
    model.last.weight.data[:, 8:] = 0
    lhc.prune(model, image(), SMALL, budget=1.0)
    assert not model.last.topology[:, 1:].any()
    assert model.body.density == 1


def test_torch_pruned_weights_count_as_they_run():
    model = network()
    nn.utils.prune.ln_structured(model.last, "weight", 0.5, n=2, dim=1)
    expected = model(image())
    lhc.prune(model, image(), LHCConfig(in_block=1, out_block=4), budget=1.0)
    torch.testing.assert_close(model(image()), expected)
    assert model.last.density == 0.5


def test_narrow_layers_get_narrow_blocks():
    model = lhc.prune(network(), image(), LHCConfig(in_block=32, out_block=16), budget=0.2)
    assert model.shortcut.config.in_block == 8
    assert model.body.config.in_block == 16
    rule = lhc.prune(network(), image(), lambda name, conv: LHCConfig(in_block=32, out_block=16), budget=0.9)
    assert rule.shortcut.config.in_block == 32


def test_a_second_pruning_only_takes_away():
    model = lhc.prune(network(), image(), SMALL, budget=0.6)
    before = {name: layer.topology.clone() for name, layer in lhc_layers(model).items()}
    lhc.prune(model, image(), budget=0.2)
    assert 0.19 < live_share(model) <= 0.2
    for name, layer in lhc_layers(model).items():
        assert layer.config.in_block == 8
        assert not (layer.topology & ~before[name]).any()


def test_a_pruned_network_trains_only_what_is_left():
    model = lhc.prune(network(), image(), SMALL, budget=0.3).train()
    model(image()).square().sum().backward()
    dead = model.last.mask() == 0
    assert not model.last.weight.grad[dead].any()
    assert model.last.weight.grad[~dead].any()
    assert model.last.effects.grad is None


def test_the_report_says_what_was_lost_and_what_was_left_alone(capsys):
    model, reports = network(), []
    weight = model.last.weight.detach().clone()
    lhc.prune(model, image(), SMALL, budget=0.3, report=reports.append, filter_fn=lambda n, m: n != "spare")
    (report,) = reports
    row = next(row for row in report.layers if row.layer == "last")
    gone = weight[model.last.mask() == 0].double().square().sum() / weight.double().square().sum()
    assert row.lost == pytest.approx(float(gone))
    assert row.live_weights == int(model.last.live_weights())
    assert dict(report.skipped) == {
        "stem": "is the first convolution",
        "depthwise": "has groups=28 (supported: 1)",
        "spare": "was left out by filter_fn",
    }
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["layer"] == "body"
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "left as it is: depthwise has groups=28" in text


def test_a_budget_out_of_reach_names_the_least_and_changes_nothing():
    model = network()
    before = str(model)
    with pytest.raises(
        ValueError, match=r"budget=0\.01 cannot be reached.*takes 0\.0[0-9]+ of the weights"
    ) as caught:
        lhc.prune(model, image(), SMALL, budget=0.01)
    assert str(model) == before
    least = float(str(caught.value).split("takes ")[1].split()[0])
    lhc.prune(model, image(), SMALL, budget=least)
    assert live_share(model) <= least


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, r"budget=0 is out of range"),
        ({"budget": 1.5}, r"budget=1\.5 is out of range"),
        ({"budget": "all"}, r"budget='all' is not a number"),
        ({"budget": math.nan}, r"budget=nan is out of range"),
        ({"budget": 0.5, "objective": "flops"}, r"objective='flops' is not supported: choose 'weights' or"),
        ({"budget": 0.5, "scope": "global"}, r"scope='global' is not supported: choose 'network' or 'layer'"),
        ({"budget": 0.5, "scores": "l3"}, r"scores='l3' is not supported"),
        ({"budget": 0.5, "scores": {}}, r"scores of layer 'body': none given, \(28, 16, 3, 3\) needed"),
        ({"budget": 0.5, "scores": 3}, r"scores is a int"),
        ({"config": lambda n, m: SMALL}, r"budget is not given: with a config function"),
        ({"config": LHCConfig(density=None)}, r"budget=None is not a number"),
        ({"budget": 0.5, "filter_fn": lambda n, m: False}, r"no convolution of Residual can be converted"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(arguments, message):
    model = network()
    with pytest.raises((ValueError, TypeError), match=message):
        lhc.prune(model, image(), **arguments)
    assert not lhc_layers(model)


def test_a_wrong_input_size_is_one_line():
    with pytest.raises(ValueError, match=r"Residual does not run on an input of shape \(1, 4, 8, 8\)"):
        lhc.prune(network(), torch.zeros(1, 4, 8, 8), budget=0.5)


def test_scores_that_are_not_finite_are_refused():
    model = network()
    scores = {n: torch.ones_like(getattr(model, n).weight) for n in ("body", "shortcut", "spare", "last")}
    scores["last"][0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="scores of layer 'last' are not all finite"):
        lhc.prune(model, image(), SMALL, budget=0.5, scores=scores)


@pytest.mark.parametrize("shapes", ["free", "rigid"])
def test_magnitude_effects_start_from_the_larger_half(shapes):
    config = LHCConfig(in_block=8, out_block=4, shapes=shapes)
    model = convert(network(), config, effects="magnitude")
    layer = model.body
    assert not layer.frozen
    assert layer.effects.requires_grad
    scores = block_squares(layer, layer.weight.detach())
    deviation = math.sqrt(2 / layer.effects[0].numel())
    assert float(layer.effects.detach().std()) == pytest.approx(deviation, rel=0.1)
    if shapes == "free":
        assert torch.equal(layer.effects.flatten().argsort(), scores.flatten().argsort())
        assert 0.45 < layer.topology.float().mean() < 0.55
    else:
        live, dead = scores[layer.topology], scores[~layer.topology]
        assert live.mean() > dead.mean()


def test_effects_that_are_unknown_are_refused():
    with pytest.raises(ValueError, match="effects='zeros' is not supported: choose 'random' or 'magnitude'"):
        convert(network(), SMALL, effects="zeros")


def test_to_dense_gives_back_plain_convolutions_with_zeros():
    model = lhc.prune(network(), image(), SMALL, budget=0.3)
    seen = []
    model.last.register_forward_hook(lambda module, args, output: seen.append(module))
    model.last.note = "kept"
    expected, kept = model(image()), (model.last.weight, model.last.bias, model.last.mask())
    assert lhc.to_dense(model) is model
    assert type(model.last) is nn.Conv2d
    torch.testing.assert_close(model(image()), expected)
    assert seen[-1] is model.last
    assert model.last.note == "kept"
    assert (model.last.weight, model.last.bias) == kept[:2] or model.last.weight is kept[0]
    assert torch.equal(model.last.weight != 0, kept[2] != 0)
    assert set(model.state_dict()) == set(Residual().state_dict())
    Residual().load_state_dict(model.state_dict())
    assert repr(copy.deepcopy(model).last) == repr(Residual().last)
    assert lhc.plan(model, image()).layers  # the zeros are found again


def test_to_dense_of_a_network_that_still_learns_keeps_the_masks_in_force():
    model = convert(network(), SMALL)
    expected = model(image())
    torch.testing.assert_close(lhc.to_dense(model)(image()), expected)


def test_to_dense_refuses_what_has_nothing_to_give_back():
    with pytest.raises(ValueError, match="Residual has no LHCConv2d: it is dense already"):
        lhc.to_dense(network())
    with pytest.raises(ValueError, match=r"take its to_conv\(\)"):
        lhc.to_dense(LHCConv2d(8, 8, 3))
    with pytest.raises(TypeError, match="model is a str"):
        lhc.to_dense("model")
