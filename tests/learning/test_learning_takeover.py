"""What a converted layer takes over from its convolution: hooks, pruned weights, additions."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lhc_triton as lhc
from lhc_triton.conversion import convert, freeze, lhc_layers, summary
from lhc_triton.layers import LHCConv2d
from lhc_triton.topology import LHCConfig

CONFIG = LHCConfig(density=0.1, in_block=8, out_block=4)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1))


def image(seed=1):
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def all_live(model):
    """The converted model under full masks, where it computes what the dense one did."""
    for layer in lhc_layers(model).values():
        layer.set_topology(torch.ones_like(layer.topology))
    return model


def test_forward_hooks_that_change_values_go_over_in_their_order():
    model = network().eval()
    conv = model[2]
    conv.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    conv.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] - 1,), kwargs), with_kwargs=True)
    conv.register_forward_hook(lambda module, args, output: output.clamp(min=0.25))
    conv.register_forward_hook(lambda module, args, kwargs, output: output.square(), with_kwargs=True)
    conv.register_forward_hook(lambda module, args, output: output + 0.5, prepend=True)
    expected = model(image())
    converted = all_live(convert(model, CONFIG))
    assert type(converted[2]) is LHCConv2d
    torch.testing.assert_close(converted(image()), expected)
    torch.testing.assert_close(copy.deepcopy(converted)(image()), expected)


def test_a_hook_sees_the_new_layer_and_what_the_forward_gave():
    model, seen = network(), {}
    model[2].register_forward_hook(lambda module, args, output: seen.update(module=module, output=output))
    convert(model, CONFIG)
    output = model(image())
    assert seen["module"] is model[2]
    assert seen["output"] is output


def test_hooks_for_failed_calls_run_on_the_new_layer():
    model, calls = network(), []
    model[2].register_forward_hook(lambda module, args, output: calls.append(output), always_call=True)
    convert(model, CONFIG)
    with pytest.raises(RuntimeError):
        model[2](torch.randn(1, 5, 9, 9))
    assert calls == [None]


@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_change_the_gradients_of_the_new_layer(name):
    gradients = {}
    for factor in (1, 2):
        model = network()

        def scale(module, *grads, factor=factor):
            return tuple(g if g is None else factor * g for g in grads[0])

        getattr(model[2], name)(scale)
        all_live(convert(model, CONFIG))(image()).sum().backward()
        gradients[factor] = model[0].weight.grad
    torch.testing.assert_close(gradients[2], 2 * gradients[1])
    assert gradients[1].abs().sum() > 0


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "state_dict_pre"])
def test_handles_remove_the_hooks_of_the_new_layer(kind):
    model, calls = network(), []
    handle = getattr(model[2], f"register_{kind}_hook")(lambda *args: calls.append(kind))

    def use():
        model(image().requires_grad_()).sum().backward()
        model.state_dict()

    convert(model, CONFIG)
    use()
    assert calls == [kind]
    handle.remove()
    use()
    assert calls == [kind]


def test_a_handle_removes_what_belongs_to_a_hook_too():
    model, calls = network(), []
    handle = model[2].register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs), with_kwargs=True, always_call=True
    )
    convert(model, CONFIG)
    handle.remove()
    other = model[2].register_forward_hook(lambda module, args, output: calls.append("other"))
    model(image())
    assert calls == ["other"]
    other.remove()


def test_the_old_convolution_keeps_its_hooks_where_it_is_used_elsewhere():
    model, calls = network(), []
    conv = model[2]
    conv.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    convert(model, CONFIG)
    model[2].register_forward_pre_hook(lambda module, args: calls.append("new"))
    conv(torch.randn(1, 16, 9, 9))
    assert calls == [nn.Conv2d]
    model(image())
    assert calls == [nn.Conv2d, "new", LHCConv2d]


def test_state_dict_hooks_go_over_with_their_module():
    model, seen = network(), []
    model[2].register_state_dict_post_hook(lambda module, state, prefix, meta: state.update(note=prefix))
    model[2].register_load_state_dict_pre_hook(lambda module, state, *rest: seen.append(module))
    model[2].register_load_state_dict_post_hook(lambda module, keys: seen.append(module))
    convert(model, CONFIG)
    state = model.state_dict()
    assert state.pop("note") == "2."
    model.load_state_dict(state)
    assert seen == [model[2], model[2]]


def test_what_was_added_to_a_convolution_is_there_for_its_hooks():
    model = network().eval()
    conv = model[2]
    conv.gain = nn.Parameter(torch.tensor(1.5))
    conv.register_buffer("shift", torch.tensor(0.25), persistent=False)
    conv.after = nn.Softplus()
    conv.tag = {"stage": 3}
    conv.register_forward_hook(lambda m, args, y: m.after(y * m.gain + m.shift) * m.tag["stage"])
    expected, gain = model(image()), conv.gain
    converted = all_live(convert(model, CONFIG))
    torch.testing.assert_close(converted(image()), expected)
    assert converted[2].gain is gain
    assert "2.gain" in converted.state_dict()
    assert "2.shift" not in converted.state_dict()


@pytest.mark.parametrize("pruned_before", ["weight", "bias"])
def test_pruned_convolutions_become_layers_of_what_the_mask_left(pruned_before):
    model = network().eval()
    prune.random_unstructured(model[2], pruned_before, amount=0.6)
    original = model[2].get_parameter(f"{pruned_before}_orig")
    expected = model(image())
    all_live(convert(model, CONFIG))
    layer = model[2]
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "effects"}
    assert set(dict(layer.named_buffers())) == {"topology", "masked_filters"}
    assert layer.get_parameter(pruned_before) is original  # an optimiser made before has it
    assert not layer._forward_pre_hooks
    torch.testing.assert_close(model(image()), expected)


def test_a_prune_mask_that_no_forward_has_seen_yet_counts():
    model = network()
    prune.identity(model[2], "weight")
    model(image())
    mask = torch.rand(12, 16, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    model[2].weight_mask.copy_(mask)
    with torch.no_grad():
        model[2].weight_orig.fill_(2.0)
    convert(model, CONFIG)
    assert torch.equal(model[2].weight, 2.0 * mask)


def test_what_was_pruned_in_several_rounds_stays_pruned():
    model = network()
    prune.ln_structured(model[2], "weight", amount=0.5, n=2, dim=0)
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    kept = model[2].weight_mask.bool()
    convert(model, CONFIG)
    assert torch.equal(model[2].weight != 0, kept)


def test_pruned_weights_are_no_part_of_the_topology_and_may_grow():
    model = network()
    prune.ln_structured(model[2], "weight", amount=0.5, n=2, dim=1)
    dead = ~model[2].weight_mask.bool()
    all_live(convert(model, CONFIG))
    assert summary(model, (3, 9, 9)).converted.density == 1.0
    model(image()).sum().backward()
    assert model[2].weight.grad[dead].abs().sum() > 0


def test_other_hooks_of_a_pruned_convolution_go_over():
    model = network().eval()
    model[2].register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    prune.random_unstructured(model[2], "weight", amount=0.3)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    expected = model(image())
    torch.testing.assert_close(all_live(convert(model, CONFIG))(image()), expected)


def test_pruned_weights_that_are_not_finite_are_refused_and_nothing_is_changed():
    model = network()
    prune.random_unstructured(model[2], "weight", amount=0.3)
    with torch.no_grad():
        model[2].weight_orig[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '2' has NaN or infinity in its weight"):
        convert(model, CONFIG)
    assert prune.is_pruned(model[2])


class FirstChannels(nn.Module):
    def forward(self, weight):
        return weight * (torch.arange(weight.shape[1]) < 8).view(1, -1, 1, 1)


def computing(kind):
    model = network()
    if kind == "weight_norm":
        parametrizations.weight_norm(model[2])
    elif kind == "spectral_norm":
        parametrizations.spectral_norm(model[2])
    elif kind == "bias":
        parametrize.register_parametrization(model[2], "bias", nn.Tanh())
    elif kind == "mask":
        parametrize.register_parametrization(model[2], "weight", FirstChannels())
    elif kind == "old_weight_norm":
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(model[2])
    else:
        torch.nn.utils.spectral_norm(model[2])
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("old_weight_norm", r"layer '2' computes its weight in a hook \(WeightNorm\): .*remove_weight_norm"),
        ("old_spectral_norm", r"layer '2' computes its weight in a hook \(SpectralNorm\)"),
    ],
)
def test_computed_weights_are_refused_unless_left_out(kind, message):
    model = computing(kind)
    model.append(nn.Conv2d(12, 8, 1))
    with pytest.raises(ValueError, match=message) as caught:
        convert(model, CONFIG)
    assert "\n" not in str(caught.value)
    assert not lhc_layers(model)
    with pytest.raises(ValueError, match="the convolution computes its"):
        LHCConv2d.from_conv(model[2], CONFIG)
    assert list(lhc_layers(convert(model, CONFIG, lambda name, conv: name != "2"))) == ["3"]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "bias", "mask"])
def test_parametrised_layers_are_taken_as_they_are(kind):
    model = computing(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trial = copy.deepcopy(model).eval()
    expected = trial(image())
    with pytest.warns(UserWarning, match=r"a convolution's (weight|bias) was computed \(\w+\)"):
        all_live(convert(trial, CONFIG))
    torch.testing.assert_close(trial(image()), expected)
    assert set(dict(trial[2].named_parameters())) == {"weight", "bias", "effects"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_pruning_reads_a_parametrised_mask():
    model = computing("mask").eval()
    expected = model(image())
    with pytest.warns(UserWarning, match="was computed"):
        lhc.prune(model, image(), CONFIG, budget=1.0)
    assert model[2].topology[:, 0].any()
    assert not model[2].topology[:, 1].any()
    torch.testing.assert_close(model(image()), expected)


def test_a_converted_layer_can_be_parametrised_as_the_message_says():
    model = computing("weight_norm")
    parametrize.remove_parametrizations(model[2], "weight")
    parametrizations.weight_norm(convert(model, CONFIG)[2])
    model(image()).sum().backward()
    assert model[2].effects.grad.abs().sum() > 0
    assert model[2].parametrizations.weight.original1.grad.abs().sum() > 0
    assert freeze(model)[2].frozen


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda conv: setattr(conv, "topology", "ring"),
            "attribute 'topology', a name of the new layer's own",
        ),
        (lambda conv: conv.register_buffer("mask", torch.ones(3)), "attribute 'mask'"),
        (lambda conv: setattr(conv, "effects", nn.Parameter(torch.ones(3))), "attribute 'effects'"),
        (lambda conv: setattr(conv, "config", {}), "attribute 'config'"),
        (lambda conv: conv.register_forward_hook(conv.extra_repr), "its own method 'extra_repr' as a hook"),
        (lambda conv: conv.compile(), "was compiled in place: compile the new layer"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_and_changes_nothing(spoil, message):
    model = network()
    prune.random_unstructured(model[2], "weight", amount=0.3)
    model.append(nn.Conv2d(12, 8, 1))
    spoil(model[3])
    with pytest.raises(ValueError, match=f"layer '3' .*{message}") as caught:
        convert(model, CONFIG)
    assert "\n" not in str(caught.value)
    assert not lhc_layers(model)
    assert prune.is_pruned(model[2])


def test_a_forward_replaced_on_the_instance_stays_dense():
    model = network().append(nn.Conv2d(12, 8, 1))
    plain = model[2].forward
    model[2].forward = lambda x: plain(x).sigmoid()
    x = image()
    convert(model, CONFIG)
    assert list(lhc_layers(model)) == ["3"]
    assert float(model[:3](x).detach().min()) > 0
    with pytest.raises(ValueError, match="the convolution has a forward of its own"):
        LHCConv2d.from_conv(model[2], CONFIG)


def test_converting_a_copy_leaves_the_original_s_parametrisation_alone():
    """Torch keeps the computed weight as a property of a class that copies share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    with pytest.warns(UserWarning, match="a convolution's weight was computed"):
        convert(copy.deepcopy(model), LHCConfig(in_block=4, out_block=4))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
