"""Filters that do nothing are removed from the copy that is accelerated; the given model is left alone."""

import copy

import pytest
import torch
from oracle import norm_error
from runtime_networks import image, randomise_norms
from torch import nn

import lhc_triton as lhc


def slimmed(*tail, width=64, untraced=False):
    """A chain of which every second filter is dead behind its norm."""

    class Chain(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if not untraced or float(x.sum()) > -1e30 else x

    torch.manual_seed(0)
    layers = []
    for inputs in (3, width, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    model = Chain(*layers, nn.Conv2d(width, 8, 3), *tail)
    randomise_norms(model)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight[::2] = norm.bias[::2] = 0
    return model.eval()


def notes(fast):
    return [line for line in fast.explain().splitlines() if "removed" in line]


@torch.no_grad()
def error(fast, model, x):
    return norm_error(fast(x), model(x))


def test_dead_filters_are_removed_and_noted_and_the_model_is_left_as_it_was(tmp_path):
    model, x = slimmed(nn.ReLU()), image(size=24)
    before = copy.deepcopy(model.state_dict())
    fast = lhc.accelerate(model, x, tune="off")
    (note,) = notes(fast)
    assert note.startswith("note: removed 96 of 200 filters: zero, or read by nothing (most weights in '3'")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    full = lhc.summary(model, (3, 24, 24)).total.macs * len(x)
    assert sum(row["macs"] for row in fast.report()["layers"]) < 0.4 * full
    other = image(batch=3, size=17, seed=4)
    for values in (x, other):
        assert error(fast, model, values) < 1e-5
    lhc.save(fast, tmp_path / "net.safetensors")
    again = lhc.load(tmp_path / "net.safetensors")
    assert torch.equal(again(other), fast(other))


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.rfft2(x).abs()


@pytest.mark.filterwarnings("ignore:the graph cannot be stored")
def test_what_is_saved_without_its_graph_fits_the_model(tmp_path):
    model, x = slimmed(Spectrum()), image(size=24)
    fast = lhc.accelerate(model, x, tune="off")
    assert notes(fast) == []
    lhc.save(fast, tmp_path / "net.safetensors")
    again = lhc.load(tmp_path / "net.safetensors", model=slimmed(Spectrum()))
    assert error(again, model, x) < 1e-5


def test_a_topology_goes_along():
    model, x = lhc.prune(slimmed(), image(size=24), lhc.LHCConfig(in_block=16, out_block=8)), image(size=24)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight[:32] = norm.bias[:32] = 0
    fast = lhc.accelerate(model, x, tune="off")
    assert len(notes(fast)) == 1
    assert error(fast, model, x) < 1e-5


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_a_forced_backend_runs_the_layers_as_they_are(backend):
    fast = lhc.accelerate(slimmed(), image(size=24), tune="off", backend=backend)
    assert notes(fast) == []


def test_a_plan_is_for_the_layers_that_it_was_made_for():
    model, x = slimmed(), image(size=24)
    fast = lhc.accelerate(model, x, plan=lhc.plan(model, x), tune="off")
    assert notes(fast) == []
    assert error(fast, model, x) < 1e-5


def test_what_cannot_be_traced_goes_on_without():
    model, x = slimmed(untraced=True), image(size=24)
    fast = lhc.accelerate(model, x, tune="off")
    assert notes(fast) == []
    assert error(fast, model, x) < 1e-5


def test_a_network_that_counts_its_channels_goes_on_without():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = slimmed()

        def forward(self, x):
            return self.body(x) + self.body[0].out_channels

    torch.manual_seed(0)
    model, x = Counting().eval(), image(size=24)
    fast = lhc.accelerate(model, x, tune="off")
    assert notes(fast) == []
    assert error(fast, model, x) < 1e-5
