import json

import pytest
import torch
from planning_cases import CPU
from torch import nn
from torch.nn import functional as F

import lhc_triton as lhc
from lhc_triton.planning import Plan
from lhc_triton.planning.extract import read_model

SIDE = 8
IMAGE = 4 * 64 * SIDE * SIDE  # bytes of a feature map of 64 channels


def image(batch=1, channels=64):
    return torch.randn(batch, channels, SIDE, SIDE)


def conv(kernel=3, **options):
    return nn.Conv2d(64, 64, kernel, padding=kernel // 2, **options)


def works(model, x):
    """Calls, MACs and bytes by kind, without the change of the input's format."""
    found = {w.kind: (w.calls, w.macs, w.moved_bytes) for w in read_model(model, x, whole=True).others}
    calls, macs, moved = found.pop("format changes")
    rest = (calls - 1, macs, moved - 2 * x.numel() * 4)
    return found | ({"format changes": rest} if rest[0] else {})


@pytest.fixture
def sparse(monkeypatch):
    """Every convolution has structured zeros: all are planned, so that only the rest is left."""

    def make(*modules):
        model = nn.Sequential(*modules)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight[:, :32].data)
        return model

    return make


class Residual(nn.Module):
    def __init__(self, after_relu):
        super().__init__()
        self.a, self.after_relu = conv(), after_relu
        nn.init.zeros_(self.a.weight[:, :32].data)

    def forward(self, x):
        y = self.a(x)
        return F.relu(y) + x if self.after_relu else F.relu(y + x)


def test_what_an_epilogue_takes_in_costs_nothing(sparse):
    model = sparse(conv(), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(), nn.SiLU())
    assert works(model, image()) == {}


def test_an_addition_in_an_epilogue_reads_its_other_operand():
    assert works(Residual(False), image()) == {"additions": (1, 0, IMAGE)}
    assert works(Residual(True), image()) == {"additions": (1, 0, 3 * IMAGE)}


@pytest.mark.parametrize(
    ("pool", "pixels"),
    [
        (nn.MaxPool2d(3, 2, 1), 16),
        (nn.AvgPool2d(2), 16),
        (nn.AdaptiveAvgPool2d(1), 1),
        (nn.MaxPool2d(2, 1), 49),
    ],
)
def test_other_poolings_read_and_write(sparse, pool, pixels):
    moved = IMAGE + 4 * 64 * pixels
    assert works(sparse(conv(), nn.ReLU(), pool), image()) == {"pooling": (1, 0, moved)}


def test_an_activation_without_a_convolution_before_it_moves_its_values(sparse):
    assert works(sparse(nn.ReLU(), conv()), image()) == {"activations": (1, 0, 2 * IMAGE)}


def test_a_classifier_changes_the_format_and_reads_its_weights(sparse):
    model = sparse(conv(), nn.Flatten(), nn.Linear(64 * SIDE * SIDE, 10))
    values = 64 * SIDE * SIDE
    moved = 4 * (2 * values + 10 * values + 10 + 2 * 10)
    assert works(model, image(2)) == {
        "format changes": (1, 0, 2 * 2 * IMAGE),
        "matrix products": (1, 2 * 10 * values, moved),
    }


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv()
        nn.init.zeros_(self.a.weight[:, :32].data)
        self.weight = nn.Parameter(torch.randn(16, 64, 3, 3))

    def forward(self, x):
        return F.conv2d(self.a(x), self.weight, padding=1)


def test_convolutions_that_are_not_planned_count_in_full(sparse):
    model = sparse(conv(), conv(groups=4))
    model[1].weight.data.normal_()
    (calls, macs, moved) = works(model, image())["convolutions left dense"]
    assert (calls, macs) == (1, 64 * 16 * 9 * SIDE * SIDE)
    assert moved == 2 * IMAGE + 4 * 64 * 16 * 9
    (calls, macs, _) = works(Functional(), image())["matrix products"]
    assert (calls, macs) == (1, 16 * 64 * 9 * SIDE * SIDE)


def test_a_transposed_convolution_counts_its_inputs(sparse):
    model = sparse(conv(), nn.ConvTranspose2d(64, 16, 2, 2))
    assert works(model, image())["convolutions left dense"][:2] == (1, 64 * 16 * 4 * SIDE * SIDE)


def test_what_a_layer_computes_to_get_its_weight_is_left_out():
    model = lhc.convert(nn.Sequential(conv(), conv()), lhc.LHCConfig(density=0.3))
    assert isinstance(model[1], lhc.LHCConv2d)
    assert set(works(model, image())) == {"convolutions left dense"}  # the first


def test_the_plan_prices_the_rest_and_keeps_it_in_its_file(sparse):
    model = sparse(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    made = lhc.plan(model, image(), cost=CPU)
    for work in made.others:
        assert work.predicted_us == max(work.macs / 190e3, work.moved_bytes / 10e3)
    totals = made.totals
    assert totals.others_us == pytest.approx(sum(work.predicted_us for work in made.others))
    assert totals.network_us == totals.planned_us + totals.others_us
    assert totals.dense_network_us == totals.dense_us + totals.others_us
    assert Plan.from_json(made.to_json()) == made
    alone = lhc.plan(model, image(), cost=CPU, whole=False)
    assert (alone.others, alone.totals.network_us, alone.totals.dense_network_us) == ((), None, None)
    assert alone.layers == made.layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 3}, "other work: kind must be a text"),
        ({"calls": -1}, "other work: calls is -1"),
        ({"macs": 2**61}, "other work: macs is"),
        ({"moved_bytes": 1.5}, "other work: moved_bytes is 1.5"),
        ({"predicted_us": "long"}, "other work: predicted_us is 'long'"),
    ],
)
def test_damaged_other_work_is_named(sparse, change, message):
    document = json.loads(lhc.plan(sparse(conv(), nn.AvgPool2d(2)), image()).to_json())
    document["others"][0] |= change
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(document))


def test_looking_on_changes_nothing(sparse):
    model = sparse(conv(), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = image()
    kept = x.clone()
    assert lhc.plan(model, x).layers == lhc.plan(model, x, whole=False).layers
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(x, kept)
    assert model.training
