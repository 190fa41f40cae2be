"""LHCConv2d against a float64 dense oracle and gradients by hand; its life as a module."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from lhc_triton.layers import LHCConv2d
from lhc_triton.topology import LHCConfig, rigid_shapes

FREE = LHCConfig(density=0.1, in_block=3, out_block=4)
RIGID = LHCConfig(density=0.1, in_block=3, out_block=4, shapes="rigid")
both = pytest.mark.parametrize("config", [FREE, RIGID], ids=["free", "rigid"])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randomised(layer, seed):
    """Give the layer's parameters reproducible values whose effects reach beyond the linear range."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def layer_of(config, seed=0, in_channels=7, out_channels=10, kernel=3, **arguments):
    arguments = {"padding": 1, "dtype": torch.float64} | arguments
    return randomised(LHCConv2d(in_channels, out_channels, kernel, config=config, **arguments), seed)


def mask_by_loops(layer):
    """The learned mask [O, I, kh, kw], from the effects and the method's words alone."""
    effects, config = layer.effects.detach(), layer.config
    groups, blocks = effects.shape[:2]
    kh, kw = layer.kernel_size
    mask = torch.zeros(groups, blocks, kh, kw, dtype=torch.float64)
    if config.shapes == "free":
        for g in range(groups):
            mask[g] = (effects[g] > 0).double()
            if mask[g].sum() == 0:
                mask[g].view(-1)[int(effects[g].reshape(-1).argmax())] = 1
    else:
        shapes = rigid_shapes((kh, kw)).double()
        for g in range(groups):
            for b in range(blocks):
                mask[g, b] = shapes[max(range(len(shapes)), key=lambda s: effects[g, b, s].item())]
            if mask[g].sum() == 0:
                candidates = [(b, s) for b in range(blocks) for s in range(1, len(shapes))]
                b, s = max(candidates, key=lambda bs: effects[g, bs[0], bs[1]].item())
                mask[g, b] = shapes[s]
    weights = torch.zeros_like(layer.weight, dtype=torch.float64)
    for o in range(layer.out_channels):
        for i in range(layer.in_channels):
            weights[o, i] = mask[o // config.out_block, i // config.in_block]
    return weights


def oracle(layer, x, mask):
    """Dense float64 convolution with the weight times the mask."""
    return F.conv2d(
        x.double(),
        layer.weight.detach().double() * mask,
        None if layer.bias is None else layer.bias.detach().double(),
        layer.stride,
        layer.padding,
        layer.dilation,
    )


@st.composite
def convolutions(draw):
    """Arguments of an LHCConv2d and an input size that gives at least one output pixel."""
    shapes = draw(st.sampled_from(["free", "rigid"]))
    tap = st.sampled_from([1, 3, 5] if shapes == "rigid" else [1, 2, 3, 4])
    pair = st.tuples(st.integers(1, 3), st.integers(1, 2))
    kernel, dilation = (draw(tap), draw(tap)), draw(pair)
    padding = draw(st.sampled_from(["valid", "same", "pair", "int"]))
    stride = (1, 1) if padding == "same" else draw(pair)
    if padding in ("pair", "int"):
        padding = (
            draw(st.integers(0, 3))
            if padding == "int"
            else (draw(st.integers(0, 2)), draw(st.integers(0, 3)))
        )
    config = LHCConfig(0.1, draw(st.integers(1, 9)), draw(st.integers(1, 9)), shapes)
    arguments = {
        "in_channels": draw(st.integers(1, 9)),
        "out_channels": draw(st.integers(1, 9)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "bias": draw(st.booleans()),
        "config": config,
    }
    size = tuple(dilation[a] * (kernel[a] - 1) + 1 + draw(st.integers(0, 5)) for a in (0, 1))
    return arguments, size, draw(st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_forward_is_the_dense_convolution_with_the_masked_weight(case):
    arguments, size, seed = case
    layer = randomised(LHCConv2d(**arguments, dtype=torch.float64), seed)
    x = torch.randn(2, layer.in_channels, *size, generator=seeded(seed), dtype=torch.float64)
    mask = mask_by_loops(layer)
    assert torch.equal(layer.mask(), mask)
    assert torch.equal(layer.masked_weight(), layer.weight * mask)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        expected = oracle(layer, x, mask)
        torch.testing.assert_close(layer(x), expected)
        layer.freeze()
        torch.testing.assert_close(layer(x), expected)
    assert layer.density == pytest.approx(mask.mean().item(), rel=1e-15)


@both
def test_forward_takes_one_image_without_a_batch(config):
    layer = layer_of(config)
    x = torch.randn(7, 6, 5, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(layer(x), oracle(layer, x[None], mask_by_loops(layer))[0])


@both
@pytest.mark.parametrize("channels", [(7, 10), (6, 8)], ids=["cropped blocks", "whole blocks"])
@pytest.mark.parametrize("how", ["written", "loaded", "assigned", "copied"])
def test_what_becomes_of_the_mixture_rules_the_next_call(config, channels, how):
    layer = layer_of(config, in_channels=channels[0], out_channels=channels[1])
    x = torch.randn(2, channels[0], 6, 5, generator=seeded(1), dtype=torch.float64)
    full = layer(x)
    mixed = copy.deepcopy(layer)
    mixed.masked_filters[1::2] = False
    expected = mixed(x)
    assert not torch.equal(full, expected)
    if how == "written":
        layer.masked_filters[1::2] = False
    elif how == "copied":
        layer = copy.deepcopy(mixed)
    else:
        layer.load_state_dict(mixed.state_dict(), assign=how == "assigned")
    assert torch.equal(layer(x), expected)
    layer.masked_filters.fill_(True)
    torch.testing.assert_close(layer(x), full)
    assert torch.equal(layer(x), layer.train(False)(x))


@both
def test_filters_outside_the_mixture_run_dense(config):
    layer = layer_of(config)
    layer.masked_filters.copy_(torch.arange(10) % 3 == 0)
    x = torch.randn(2, 7, 6, 5, generator=seeded(1), dtype=torch.float64)
    mask = mask_by_loops(layer)
    mask[torch.arange(10) % 3 != 0] = 1
    torch.testing.assert_close(layer(x), oracle(layer, x, mask))
    assert torch.equal(layer.mask(), mask_by_loops(layer)), "mask() tells the learned mask, not the mixture"


@both
@pytest.mark.parametrize("mixture", [False, True], ids=["all masked", "mixture"])
@pytest.mark.parametrize("channels", [(7, 10), (6, 12)], ids=["cropped blocks", "whole blocks"])
def test_gradients_are_those_of_the_method(config, mixture, channels):
    inputs, filters = channels
    sizes = {"in_channels": inputs, "out_channels": filters}
    layer = layer_of(config, seed=5, **sizes, stride=(2, 1), dilation=(1, 2), padding=(1, 2))
    if mixture:
        layer.masked_filters.copy_(torch.arange(filters) % 2 == 0)
    x = torch.randn(3, inputs, 9, 8, generator=seeded(6), dtype=torch.float64)
    y = layer(x)
    coefficients = torch.randn(y.shape, generator=seeded(7), dtype=torch.float64)
    (y * coefficients).sum().backward()

    # By hand: the gradient of the weight that convolves is the correlation of patches and coefficients.
    patches = F.unfold(x, (3, 3), dilation=(1, 2), padding=(1, 2), stride=(2, 1))
    g_used = torch.einsum("nop,nkp->ok", coefficients.flatten(2), patches).view(filters, inputs, 3, 3)
    mask, weight, effects = mask_by_loops(layer), layer.weight.detach(), layer.effects.detach()
    used = layer.masked_filters.view(-1, 1, 1, 1)
    torch.testing.assert_close(layer.weight.grad, torch.where(used, g_used * mask, g_used))
    assert (layer.weight.grad[(mask == 0) & used.expand_as(mask)] == 0).all(), "dead weights get none"
    torch.testing.assert_close(layer.bias.grad, coefficients.sum((0, 2, 3)))

    g_mask = torch.where(used, g_used * weight, 0.0)
    expected = torch.zeros_like(effects)
    for o in range(effects.shape[0]):
        for i in range(effects.shape[1]):
            g = g_mask[o * 4 : (o + 1) * 4, i * 3 : (i + 1) * 3].sum(dim=(0, 1))
            for index in torch.cartesian_prod(*map(torch.arange, effects.shape[2:])).view(
                -1, effects.dim() - 2
            ):
                at = (o, i, *index.tolist())
                if config.shapes == "free":
                    distance, gradient = abs(effects[at].item()), g[at[2:]]
                else:
                    distance = abs((effects[at] - effects[o, i].mean()).item())
                    gradient = g[rigid_shapes(3)[at[2]]].sum()
                expected[at] = gradient * (1.0 if distance < 1 else 0.1)
    torch.testing.assert_close(layer.effects.grad, expected)


@both
def test_the_penaltys_gradient_reaches_every_effect_even_of_filters_that_run_dense(config):
    layer = layer_of(config, in_channels=6, out_channels=8)
    layer.masked_filters.fill_(False)
    layer.live_weights().backward()
    damped = 0.1 * 12
    if config.shapes == "free":
        near = layer.effects.detach().abs() < 1
        expected = torch.where(near, 12.0, damped).double()
    else:
        sizes = rigid_shapes(3).flatten(1).sum(1).double()
        centred = layer.effects.detach() - layer.effects.detach().mean(-1, keepdim=True)
        expected = torch.where(centred.abs() < 1, 12.0, damped) * sizes
    torch.testing.assert_close(layer.effects.grad, expected)


@pytest.mark.parametrize(
    ("config", "kernel", "fan_in"),
    [
        (LHCConfig(0.1, 4, 2), (3, 3), 9 * 32),
        (LHCConfig(0.1, 5, 2), (5, 2), 10 * 26),
        (LHCConfig(0.1, 4, 2, "rigid"), (3, 3), 15 * 32),
        (LHCConfig(0.1, 4, 2, "rigid"), (1, 1), 2 * 32),
    ],
)
def test_effects_start_he_normal_with_the_methods_fan_in(config, kernel, fan_in):
    torch.manual_seed(0)
    layer = LHCConv2d(128, 128, kernel, config=config)
    effects = layer.effects.detach().double()
    assert effects.shape[0] == 64
    assert effects[0].numel() == fan_in
    error = 5 / math.sqrt(2 * effects.numel())
    assert effects.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=error)
    assert abs(effects.mean().item()) < 5 * math.sqrt(2 / fan_in / effects.numel())
    if config.shapes == "free":
        assert 0.45 < layer.density < 0.55
    assert layer.rescued == 0


@both
def test_rescued_groups_are_counted_and_keep_running(config):
    layer = layer_of(config)
    with torch.no_grad():
        layer.effects[1] = -1.0
        if config.shapes == "rigid":
            layer.effects[1, :, 0] = 1.0
    assert layer.rescued == 1
    assert layer.mask().flatten(1).any(1).all()
    layer.freeze()
    assert layer.rescued == 1
    assert layer.topology.flatten(1).any(1).all()


def test_a_pointwise_layer_of_two_blocks_cannot_go_below_half():
    layer = layer_of(LHCConfig(0.1, 4, 4), in_channels=8, out_channels=8, kernel=1, padding=0)
    with torch.no_grad():
        layer.effects.fill_(-3.0)
    assert layer.density == 0.5


def test_reset_parameters_draws_the_effects_again_and_ends_a_freeze():
    layer = layer_of(FREE)
    before = layer.effects.detach().clone()
    layer.freeze()
    layer.reset_parameters()
    assert not layer.frozen
    assert layer.effects.requires_grad
    assert not torch.equal(layer.effects, before)
    assert torch.equal(layer.topology, layer.block_mask().bool())


@both
def test_frozen_effects_get_no_gradient_and_do_not_move_under_an_optimiser(config):
    layer = layer_of(config, dtype=torch.float32)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(2, 7, 5, 5, generator=seeded(1))

    def step():
        optimiser.zero_grad()
        layer(x).square().mean().backward()
        optimiser.step()

    step()
    layer(x).sum().backward()
    layer.freeze()
    assert layer.effects.grad is None
    effects, weight, mask = layer.effects.detach().clone(), layer.weight.detach().clone(), layer.mask()
    step()
    step()
    assert torch.equal(layer.effects, effects)
    assert layer.effects.grad is None
    assert torch.equal(layer.mask(), mask)
    assert not torch.equal(layer.weight, weight)


def test_a_frozen_layer_uses_the_topology_buffer_for_every_filter():
    layer = layer_of(FREE)
    layer.masked_filters.fill_(False)
    layer.freeze()
    with torch.no_grad():
        layer.effects.neg_()
        layer.topology.logical_not_()
    x = torch.randn(1, 7, 5, 5, generator=seeded(1), dtype=torch.float64)
    mask = layer.topology.double().repeat_interleave(4, 0).repeat_interleave(3, 1)[:10, :7]
    torch.testing.assert_close(layer(x), oracle(layer, x, mask))
    assert layer.masked_filters.all()


def test_freezing_twice_keeps_the_topology():
    layer = layer_of(FREE)
    layer.freeze()
    topology = layer.topology.clone()
    with torch.no_grad():
        layer.effects.neg_()
    layer.freeze()
    assert torch.equal(layer.topology, topology)


def test_freeze_refuses_effects_that_are_not_finite():
    layer = layer_of(FREE)
    with torch.no_grad():
        layer.effects[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the effects have NaN or infinity"):
        layer.freeze()
    assert not layer.frozen


@both
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_set_topology_replaces_the_mask_and_freezes_dead_groups_by_choice_only(config, dtype):
    layer = layer_of(config)
    mask = torch.rand(3, 3, 3, 3, generator=seeded(2)) < 0.3
    mask[1] = False
    with pytest.raises(ValueError, match="leaves 1 of 3 filter groups without an entry"):
        layer.set_topology(mask.to(dtype))
    assert not layer.frozen
    layer.set_topology(mask.to(dtype), allow_dead=True)
    assert layer.frozen
    assert torch.equal(layer.block_mask(), mask.double())
    assert layer.rescued == 0
    x = torch.randn(1, 7, 5, 5, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:, 4:8], layer.bias[4:8].view(1, 4, 1, 1).expand(1, 4, 5, 5))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 3, 3), r"block_mask has shape \(3, 3, 3\): this layer needs \(3, 3, 3, 3\)"),
        (torch.ones(10, 7, 3, 3), "block_mask has shape"),
        (torch.full((3, 3, 3, 3), 0.5), "values other than 0 and 1"),
        (torch.full((3, 3, 3, 3), math.nan), "values other than 0 and 1"),
    ],
)
def test_set_topology_refuses(mask, message):
    layer = layer_of(FREE)
    with pytest.raises(ValueError, match=message):
        layer.set_topology(mask)
    assert not layer.frozen


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 2}, ValueError, "groups=2 is not supported by LHCConv2d: use groups=1"),
        ({"padding_mode": "reflect"}, ValueError, "padding_mode='reflect' is not supported by LHCConv2d"),
        ({"kernel_size": 2, "config": RIGID}, ValueError, r"kernel_size=\(2, 2\) has no rigid shapes"),
        ({"config": 0.1}, TypeError, "config=0.1 is not supported: give an LHCConfig"),
        ({"padding": "same", "stride": 2}, ValueError, "padding='same' is not supported for strided"),
    ],
)
def test_layer_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        LHCConv2d(**({"in_channels": 4, "out_channels": 4, "kernel_size": 3} | arguments))


@both
@pytest.mark.parametrize("frozen", [False, True], ids=["learning", "frozen"])
@pytest.mark.parametrize("into_frozen", [False, True], ids=["into learning", "into frozen"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dict_round_trip_carries_topology_mixture_and_frozen_state(config, frozen, into_frozen, assign):
    layer, other = layer_of(config, 1), layer_of(config, 2)
    if frozen:
        layer.set_topology(torch.rand(3, 3, 3, 3, generator=seeded(2)) < 0.4)
    else:
        layer.masked_filters.copy_(torch.arange(10) < 4)
    if into_frozen:
        other.freeze()
    other.load_state_dict(load(save(layer.state_dict())), assign=assign)
    assert other.frozen is frozen
    assert other.effects.requires_grad is not frozen
    x = torch.randn(2, 7, 5, 5, generator=seeded(3), dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@both
def test_a_saved_state_holds_the_topology_of_its_effects_while_learning(config):
    layer = layer_of(config)
    with torch.no_grad():
        layer.effects.neg_()
    assert torch.equal(layer.state_dict()["topology"].double(), layer.block_mask())


@both
@pytest.mark.parametrize("frozen", [False, True])
def test_a_deepcopy_is_equal_and_independent(config, frozen):
    layer = layer_of(config)
    if frozen:
        layer.freeze()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 7, 5, 5, generator=seeded(3), dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))
    assert twin.frozen is frozen
    before = layer.mask().clone()
    with torch.no_grad():
        twin.effects.neg_()
        twin.topology.logical_not_()
    assert torch.equal(layer.mask(), before)


@pytest.mark.parametrize(
    ("config", "identity"),
    [(LHCConfig(0.1, 4, 4), r"\(1, 3, 4, 0\)"), (LHCConfig(0.1, 3, 4, "rigid"), r"\(1, 3, 4, 0\)")],
)
def test_a_state_of_another_kind_of_layer_is_refused(config, identity):
    source, target = layer_of(FREE, in_channels=6), layer_of(config, in_channels=6)
    state = {k: v for k, v in source.state_dict().items() if target.state_dict()[k].shape == v.shape}
    with pytest.raises(ValueError, match=identity + ".*: use the same LHCConfig"):
        target.load_state_dict(state, strict=False)


@pytest.mark.parametrize("state", [torch.zeros(4, dtype=torch.int64), torch.zeros(5), None, "frozen"])
def test_a_damaged_extra_state_is_refused(state):
    with pytest.raises(ValueError, match="the state_dict is damaged or too new"):
        layer_of(FREE).set_extra_state(state)


def test_density_is_no_part_of_the_state():
    source, target = layer_of(LHCConfig(0.1, 3, 4)), layer_of(LHCConfig(None, 3, 4))
    target.load_state_dict(source.state_dict())
    assert target.config.density is None


@both
def test_training_under_bfloat16_autocast_matches_float32(config):
    layer = layer_of(config, dtype=torch.float32)
    x = torch.randn(4, 7, 8, 8, generator=seeded(1))
    gradients = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        y.float().square().mean().backward()
        assert layer.effects.grad.dtype == torch.float32
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for exact, rounded in zip(*gradients, strict=True):
        assert (exact - rounded).norm() <= 2e-2 * exact.norm()


@both
def test_channels_last_training_matches_contiguous_and_keeps_the_format(config):
    layer = layer_of(config, in_channels=6, out_channels=8)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 5, 5, generator=seeded(1), dtype=torch.float64)
    y, z = layer(x), twin(x.to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert twin.masked_weight().is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    z.square().sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_layer_casts_parameters_and_keeps_masks_boolean(config, dtype):
    layer = layer_of(config, dtype=torch.float32).to(dtype)
    assert layer.masked_weight().dtype == dtype
    assert layer.topology.dtype == layer.masked_filters.dtype == torch.bool
    assert layer(torch.zeros(1, 7, 4, 4, dtype=dtype)).dtype == dtype


@both
@pytest.mark.parametrize("frozen", [False, True])
def test_dynamo_captures_the_layer_in_one_graph(config, frozen):
    layer = layer_of(config)
    if frozen:
        layer.freeze()
    x = torch.randn(1, 7, 5, 5, generator=seeded(1), dtype=torch.float64)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_repr_names_blocks_shapes_and_the_freeze():
    layer = layer_of(RIGID)
    layer.freeze()
    assert "in_block=3, out_block=4, shapes='rigid', frozen" in repr(layer)


@settings(max_examples=25, deadline=None)
@given(convolutions())
def test_a_layer_takes_over_a_convolution_with_every_argument(case):
    arguments, _, _ = case
    config = arguments.pop("config")
    conv = nn.Conv2d(**arguments, dtype=torch.float64).eval()
    layer = LHCConv2d.from_conv(conv, config)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    for name in ("kernel_size", "stride", "padding", "dilation", "in_channels", "out_channels"):
        assert getattr(layer, name) == getattr(conv, name)
    assert layer.effects.dtype == torch.float64
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
