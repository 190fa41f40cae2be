import math

import numpy as np
import pytest
import torch
from torch import nn

import lhc_triton as lhc
from lhc_triton.models.vgg import small_vgg
from lhc_triton.planning import Plan

CONFIG = lhc.LHCConfig(in_block=16, out_block=8)
IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def converted_vgg(density=0.2):
    """A small VGG whose layers have a random topology; the first convolution stays dense."""
    torch.manual_seed(0)
    model = lhc.convert(small_vgg(), CONFIG)
    for layer in lhc.lhc_layers(model).values():
        layer.set_topology(torch.rand(layer.topology.shape) < density)
    return model


def plain_vgg(density=0.2):
    """The same network as plain nn.Conv2d layers, with zeros where the topology has none."""
    twin, plain = converted_vgg(density), small_vgg()
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in lhc.lhc_layers(twin).items():
            modules[name].weight.copy_(layer.masked_weight())
    return plain


def expanded(topology):
    """The topology's weights as booleans [O, I, kh, kw]."""
    geometry = topology.geometry
    mask = topology.block_mask().repeat(topology.out_block, 0).repeat(topology.in_block, 1)
    return mask[: geometry.out_channels, : geometry.in_channels]


def test_a_converted_network_is_planned_layer_by_layer():
    model = converted_vgg()
    plan = lhc.plan(model, IMAGES)
    layers = lhc.lhc_layers(model)
    assert [layer.name for layer in plan.layers] == list(layers)
    assert plan.skipped == (("features.0", "no zeros"),)
    assert (plan.device, plan.dtype) == ("cpu", "float32")
    for name, conv in layers.items():
        topology = plan[name].topology
        np.testing.assert_array_equal(topology.block_mask(), conv.block_mask().bool().numpy())
        assert topology.geometry.batch == 4
        assert (topology.geometry.in_channels, topology.geometry.out_channels) == conv.weight.shape[1::-1]
        assert topology.live_weights == int(conv.live_weights())
    sizes = [layer.topology.geometry.out_height for layer in plan.layers]
    assert sizes == [28, 14, 14, 7, 7]


def test_a_plain_network_with_structured_zeros_is_planned_without_losing_a_weight():
    model = plain_vgg()
    plan = lhc.plan(model, IMAGES)
    modules = dict(model.named_modules())
    assert [layer.name for layer in plan.layers] == list(lhc.lhc_layers(converted_vgg()))
    for layer in plan.layers:
        live = (modules[layer.name].weight != 0).numpy()
        assert not (live & ~expanded(layer.topology)).any()
        assert layer.topology.live_weights < 0.5 * math.prod(live.shape)


def test_freezing_does_not_change_the_plan():
    torch.manual_seed(0)
    model = lhc.convert(small_vgg(), CONFIG)
    before = lhc.plan(model, IMAGES)
    assert lhc.plan(lhc.freeze(model), IMAGES) == before


def test_saved_text_gives_the_plan_of_a_network_back():
    plan = lhc.plan(converted_vgg(), IMAGES)
    assert Plan.from_json(plan.to_json()) == plan


def test_the_explanation_names_every_layer_the_totals_and_what_is_skipped():
    plan = lhc.plan(converted_vgg(), IMAGES)
    lines = plan.explain().splitlines()
    rows = [line for line in lines[2:] if not line.startswith(" ")]
    for line, layer in zip(rows, plan.layers, strict=False):
        assert line.split()[0] == layer.name
        assert f"  {layer.backend}" in line
        assert any(below.endswith(f": {layer.reason}") for below in lines)
    assert f"{plan.totals.layers} layers planned for cpu in float32" in "\n".join(lines)
    assert f"{plan.totals.live_weights:,}" in "\n".join(lines)
    assert lines[-1] == "left as it is: features.0 (no zeros)"


@pytest.mark.parametrize("backend", ["dense", "torch", "triton"])
def test_a_forced_backend_holds_for_the_whole_network(backend):
    plan = lhc.plan(converted_vgg(), IMAGES, backend=backend)
    assert {layer.backend for layer in plan.layers} == {backend}
    assert {layer.reason for layer in plan.layers} == {"forced"}


def test_the_batch_changes_the_work_and_not_the_topology():
    model = converted_vgg()
    small, large = lhc.plan(model, IMAGES[:1]), lhc.plan(model, IMAGES)
    assert large.totals.live_macs == 4 * small.totals.live_macs
    for one, four in zip(small.layers, large.layers, strict=True):
        assert one.topology.patterns == four.topology.patterns
        assert one.topology.group_pattern == four.topology.group_pattern


@pytest.mark.parametrize("training", [True, False])
def test_planning_leaves_the_network_as_it_was(training):
    model = converted_vgg().train(training)
    model.features[1].train(not training)
    flags = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    lhc.plan(model, IMAGES)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_network_that_is_dense_throughout_has_an_empty_plan():
    model = small_vgg()
    plan = lhc.plan(model, IMAGES)
    assert plan.layers == ()
    assert {reason for _, reason in plan.skipped} == {"no zeros"}
    assert len(plan.skipped) == 6
    assert plan.explain().startswith("no layer is planned")
    assert (plan.totals.layers, plan.totals.dense_us, plan.totals.planned_us) == (0, 0, 0)
    assert Plan.from_json(plan.to_json()) == plan


def test_images_of_other_channels_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"VGG does not run on inputs of shape \(4, 3, 28, 28\): ") as caught:
        lhc.plan(converted_vgg(), IMAGES.repeat(1, 3, 1, 1))
    assert "\n" not in str(caught.value)


def test_a_network_without_convolutions_is_refused_in_one_line():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with pytest.raises(ValueError, match=r"^Sequential has no nn\.Conv2d: there is nothing to plan$"):
        lhc.plan(model, IMAGES)


@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_a_nan_in_a_learned_weight_is_refused_by_name(value):
    model = converted_vgg()
    with torch.no_grad():
        model.features[3].weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"layer 'features\.3' has NaN in its weight"):
        lhc.plan(model, IMAGES)


def test_a_nan_image_is_planned_as_any_other():
    model = converted_vgg()
    assert lhc.plan(model, torch.full_like(IMAGES, float("nan"))) == lhc.plan(model, IMAGES)
