"""Handcrafted topologies against torch's own operations, written out from their definitions."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from lhc_triton.conversion import blocks_by_width, lhc_layers
from lhc_triton.handcrafted import HANDCRAFTED, handcrafted, impose
from lhc_triton.layers import LHCConv2d
from lhc_triton.topology import LHCConfig, expand_mask

PARTS = 4
BLOCKS = LHCConfig(in_block=2, out_block=2)
EVERY = slice(None)


def convolution(kernel=3, stride=1, dilation=1, filters=16, channels=8):
    """A convolution whose padding keeps the size, so that its lines and its centre need none or less."""
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (kh // 2 * dilation, kw // 2 * dilation)
    return nn.Conv2d(channels, filters, (kh, kw), stride, padding, dilation, dtype=torch.float64)


def imposed(name, conv, blocks=None, parts=PARTS):
    topology = handcrafted(name, conv, blocks, parts=parts)
    layer = LHCConv2d.from_conv(conv, topology.config)
    layer.set_topology(topology.block_mask)
    return layer


def mask_of(name, conv, blocks=None, parts=PARTS):
    topology, o, i = handcrafted(name, conv, blocks, parts=parts), conv.out_channels, conv.in_channels
    return expand_mask(topology.block_mask, o, i, topology.config.in_block, topology.config.out_block)


def part(conv, x, rows=EVERY, columns=EVERY, filters=EVERY, channels=EVERY):
    """Torch's convolution with a part of the kernel around its centre, for some filters and channels."""
    weight = conv.weight[filters][:, channels][..., rows, :][..., columns]
    reach = [size // 2 * dilation for size, dilation in zip(weight.shape[2:], conv.dilation, strict=True)]
    return conv2d(x[:, channels], weight, None, conv.stride, reach, conv.dilation)


def middle(conv):
    (kh, kw) = conv.kernel_size
    return slice(kh // 2, kh // 2 + 1), slice(kw // 2, kw // 2 + 1)


def standard(conv, x):
    return part(conv, x)


def pointwise(conv, x):
    return conv2d(
        x,
        conv.weight[..., conv.kernel_size[0] // 2, conv.kernel_size[1] // 2][..., None, None],
        None,
        conv.stride,
    )


def groupwise(conv, x, parts=PARTS):
    channels, filters = conv.in_channels // parts, conv.out_channels // parts
    weight = torch.cat(
        [
            conv.weight[g * filters : (g + 1) * filters, g * channels : (g + 1) * channels]
            for g in range(parts)
        ]
    )
    return conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, parts)


def depthwise(conv, x):
    return groupwise(conv, x, conv.in_channels)


def hetconv(conv, x):
    rows, columns = middle(conv)
    return torch.cat(
        [
            sum(
                part(conv, x, filters=[o], channels=[i])
                if (i - o) % PARTS == 0
                else part(conv, x, rows, columns, [o], [i])
                for i in range(conv.in_channels)
            )
            for o in range(conv.out_channels)
        ],
        dim=1,
    )


def stripe(conv, x):
    """Each filter as a sum of 1x1 convolutions of the shifted input."""
    (kh, kw), (ph, pw), (dh, dw), (sh, sw) = conv.kernel_size, conv.padding, conv.dilation, conv.stride
    kept, padded = math.ceil(kh * kw / PARTS), nn.functional.pad(x, (pw, pw, ph, ph))
    height, width = x.shape[2:]
    outputs = []
    for o in range(conv.out_channels):
        taps = [divmod((o * kept + k) % (kh * kw), kw) for k in range(kept)]
        shifted = [padded[:, :, r * dh :, s * dw :][:, :, :height:sh, :width:sw] for r, s in taps]
        weights = [conv.weight[o : o + 1, :, r, s, None, None] for r, s in taps]
        outputs.append(sum(conv2d(a, b) for a, b in zip(shifted, weights, strict=True)))
    return torch.cat(outputs, dim=1)


def one_by_n(conv, x):
    groups = range(0, conv.out_channels, 4)
    return torch.cat(
        [
            part(conv, x, filters=slice(first, first + 4), channels=slice(first // 4 % PARTS, None, PARTS))
            for first in groups
        ],
        dim=1,
    )


def asymmetric(conv, x):
    rows, columns = middle(conv)
    half = conv.out_channels // 2
    across = part(conv, x, rows=rows, filters=slice(0, half))
    return torch.cat([across, part(conv, x, columns=columns, filters=slice(half, None))], dim=1)


def cross(conv, x):
    rows, columns = middle(conv)
    return part(conv, x, rows=rows) + part(conv, x, columns=columns) - part(conv, x, rows, columns)


def dilated_cross(conv, x):
    kh, kw = conv.kernel_size
    corners = conv.weight[:, :, :: kh - 1, :: kw - 1]
    dilation = ((kh - 1) * conv.dilation[0], (kw - 1) * conv.dilation[1])
    return pointwise(conv, x) + conv2d(x, corners, None, conv.stride, conv.padding, dilation)


ORACLES = {
    "standard": standard,
    "pointwise": pointwise,
    "groupwise": groupwise,
    "depthwise": depthwise,
    "hetconv": hetconv,
    "stripe": stripe,
    "1xn": one_by_n,
    "asymmetric": asymmetric,
    "cross": cross,
    "dilated_cross": dilated_cross,
}
# Those whose definition does not name blocks: any blocks must give the same weights.
FREE_OF_BLOCKS = [name for name in ORACLES if name not in ("hetconv", "stripe", "1xn")]


def test_every_handcrafted_topology_has_an_oracle():
    assert tuple(ORACLES) == HANDCRAFTED


@pytest.mark.parametrize("name", HANDCRAFTED)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (5, 2, 1), ((3, 5), (2, 1), 2)])
def test_topology_computes_what_torchs_own_operation_does(name, kernel, stride, dilation):
    conv = convolution(kernel, stride, dilation)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    expected = ORACLES[name](conv, x) + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(imposed(name, conv)(x), expected)


@pytest.mark.parametrize("name", FREE_OF_BLOCKS)
@pytest.mark.parametrize("blocks", [BLOCKS, LHCConfig(in_block=3, out_block=5), LHCConfig()])
def test_any_blocks_give_the_same_weights_where_the_definition_names_none(name, blocks):
    conv = convolution(filters=24, channels=12)
    assert torch.equal(mask_of(name, conv, blocks), mask_of(name, conv))


@pytest.mark.parametrize("name", HANDCRAFTED)
@pytest.mark.parametrize("blocks", [None, BLOCKS, LHCConfig(in_block=3, out_block=5), LHCConfig()])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_no_filter_is_dead_whatever_the_blocks(name, blocks, parts):
    conv = convolution(filters=24, channels=12)
    assert mask_of(name, conv, blocks, parts).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_hetconv_has_one_in_parts_full_kernels_that_move_on_by_one_channel(parts):
    mask = mask_of("hetconv", convolution(), parts=parts)
    taps = mask.sum(dim=(2, 3))
    assert ((taps == 9).sum(dim=1) == 8 // parts).all()
    assert ((taps == 1).sum(dim=1) == 8 - 8 // parts).all()
    assert mask[:, :, 1, 1].all()
    assert taps[0, 0] == 9
    for o in range(15):
        assert torch.equal(mask[o + 1], mask[o].roll(1, dims=0))


def test_hetconv_in_wide_blocks_is_a_groupwise_plus_a_pointwise_convolution():
    conv = convolution()
    layer = imposed("hetconv", conv, LHCConfig(in_block=8 // PARTS, out_block=16 // PARTS))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    rest = convolution()
    with torch.no_grad():
        rest.weight.copy_(conv.weight * ~mask_of("groupwise", conv))
    torch.testing.assert_close(layer(x), groupwise(conv, x) + pointwise(rest, x) + conv.bias.view(-1, 1, 1))


def test_hetconv_in_wide_blocks_is_the_published_one_with_sorted_channels_and_filters():
    conv = convolution()
    channels = torch.arange(8).view(-1, PARTS).T.flatten()
    filters = torch.arange(16).view(-1, PARTS).T.flatten()
    wide = mask_of("hetconv", conv, LHCConfig(in_block=8 // PARTS, out_block=16 // PARTS))
    assert torch.equal(wide, mask_of("hetconv", conv)[filters][:, channels])


@pytest.mark.parametrize("name", ["hetconv", "1xn"])
def test_blocks_too_wide_for_the_share_of_channels_are_made_smaller(name):
    topology = handcrafted(name, convolution(filters=64, channels=64), LHCConfig(in_block=32, out_block=16))
    assert (topology.config.in_block, topology.config.out_block) == (16, 16)
    full = topology.block_mask.flatten(2).all(dim=2)
    assert torch.equal(full, torch.eye(4, dtype=torch.bool))


def test_stripes_go_through_all_taps_alike():
    mask = mask_of("stripe", convolution(filters=9), parts=5)
    assert (mask == mask[:, :1]).all()
    assert (mask[:, 0].sum(dim=(1, 2)) == 2).all()
    assert (mask[:, 0].sum(dim=0) == 2).all()


@pytest.mark.parametrize(
    ("name", "arguments", "parts", "error", "message"),
    [
        ("winograd", {}, 4, ValueError, "topology 'winograd' is not supported: choose one of standard"),
        ("groupwise", {}, 0, ValueError, "parts=0 is not supported"),
        ("groupwise", {}, 2.0, TypeError, "parts=2.0 is not an int"),
        ("groupwise", {}, 3, ValueError, "8 input channels and 16 filters do not fall into 3 equal groups"),
        ("depthwise", {"filters": 12}, 4, ValueError, "do not fall into 8 equal groups"),
        ("hetconv", {}, 5, ValueError, "1 in 5 of 8 input channels is no whole number"),
        ("1xn", {}, 3, ValueError, "1 in 3 of 8 input channels"),
        ("pointwise", {"kernel": 2}, 4, ValueError, r"kernel_size=\(2, 2\) has no centre"),
        ("pointwise", {"kernel": 1}, 4, ValueError, r"kernel_size=\(1, 1\) has no centre"),
        ("stripe", {"kernel": 1}, 4, ValueError, "1x1 kernel has no taps to choose from"),
        ("asymmetric", {"filters": 15}, 4, ValueError, "15 filters do not fall into two halves"),
        ("cross", {"kernel": (1, 5)}, 4, ValueError, r"kernel_size=\(1, 5\) is a line"),
    ],
)
def test_handcrafted_refuses(name, arguments, parts, error, message):
    with pytest.raises(error, match=message):
        handcrafted(name, convolution(**arguments), parts=parts)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 64, 1),
        nn.Conv2d(64, 32, 3, padding=1, bias=False),
    )


def test_impose_replaces_what_suits_and_leaves_the_rest_dense():
    model = network()
    weights = [model[i].weight for i in (1, 4)]
    assert impose(model, "hetconv") is model
    assert list(lhc_layers(model)) == ["1", "4"]
    assert all(model[i].weight is weight for i, weight in zip((1, 4), weights, strict=True))
    assert [layer.frozen for layer in lhc_layers(model).values()] == [True, True]
    assert torch.equal(model[4].mask() != 0, mask_of("hetconv", convolution(filters=32, channels=64)))
    assert list(lhc_layers(impose(network(), "groupwise"))) == ["1", "3", "4"]


def test_impose_takes_a_filter_and_blocks_by_a_rule():
    rule = blocks_by_width(LHCConfig(in_block=4, out_block=4), groups=4, blocks=4)
    model = impose(network(), "standard", rule, filter_fn=lambda name, conv: conv.kernel_size != (1, 1))
    blocks = {name: (x.config.in_block, x.config.out_block) for name, x in lhc_layers(model).items()}
    assert blocks == {"1": (4, 4), "4": (16, 8)}


def test_an_imposed_topology_stays_while_its_weights_train():
    model = impose(network(), "cross")
    before = {name: layer.mask() for name, layer in lhc_layers(model).items()}
    weight = model[1].weight.detach().clone()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        optimiser.step()
    for name, layer in lhc_layers(model).items():
        assert torch.equal(layer.mask(), before[name])
    moved = model[1].weight.detach() != weight
    assert moved.any()
    assert not moved[before["1"] == 0].any()


def test_an_imposed_network_comes_back_from_its_state():
    model, other = impose(network(), "asymmetric"), impose(network(), "asymmetric")
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="use the same LHCConfig"):
        impose(network(), "hetconv").load_state_dict(model.state_dict())


def test_impose_takes_a_network_without_storage():
    with torch.device("meta"):
        model = impose(network(), "asymmetric")
    model.to_empty(device="cpu").load_state_dict(impose(network(), "asymmetric").state_dict())
    assert torch.equal(model[1].mask() != 0, mask_of("asymmetric", convolution()))


def test_impose_refuses_a_network_that_nothing_of_suits_and_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 2))
    with pytest.raises(ValueError, match=r"no convolution of Sequential suits the topology 'cross': 1: kern"):
        impose(model, "cross")
    assert not lhc_layers(model)


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "winograd", "topology 'winograd' is not"),
        (nn.Linear(2, 2), "cross", "Linear has no nn.Conv2d"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3)),
            "cross",
            "no convolution of Sequential can be converted: 0 is the",
        ),
    ],
)
def test_impose_refuses(model, name, message):
    with pytest.raises(ValueError, match=message):
        impose(model, name)


def test_blocks_that_are_no_config_are_refused_and_change_nothing():
    model = network()
    for blocks in ((32, 16), lambda name, conv: (32, 16)):
        with pytest.raises(TypeError, match=r"blocks=\(32, 16\) is not an LHCConfig"):
            impose(model, "cross", blocks)
    assert not lhc_layers(model)


@pytest.mark.parametrize("name", ["hetconv", "1xn"])
def test_filters_in_wide_blocks_still_share_all_input_channels(name):
    conv = convolution(filters=64, channels=32)
    full = mask_of(name, conv, LHCConfig(in_block=4, out_block=64)).flatten(2).all(2)
    assert torch.equal(full.sum(0), torch.full((32,), 16))  # each channel by as many filters
    assert torch.equal(full.sum(1), torch.full((64,), 8))
