"""shrink: what does nothing is gone, the function stays, and what is refused."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from channel_networks import NETWORKS, deaden, example, resnet, same
from torch import nn
from torch.nn.utils import prune
from zoo.networks import ZOO, build, conv

import lhc_triton as lhc
from lhc_triton.layers import LHCConv2d
from lhc_triton.models.resnet import BasicBlock, Bottleneck

BIASED = (nn.Conv2d, nn.ConvTranspose2d)


def shrunk(model, *inputs):
    reports = []
    small = lhc.shrink(copy.deepcopy(model), inputs, report=reports.append)
    same(model, small, *inputs)
    return small, reports[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_with_less(name, seed):
    torch.manual_seed(seed)
    model = deaden(NETWORKS[name](), seed)
    before = sum(p.numel() for p in model.parameters())
    small, report = shrunk(model, example(name))
    assert sum(p.numel() for p in small.parameters()) < before
    assert report.filters == sum(m.out_channels for m in small.modules() if isinstance(m, BIASED))
    assert report.filters_before == sum(m.out_channels for m in model.modules() if isinstance(m, BIASED))
    _, second = shrunk(small, example(name))
    assert second.layers == ()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_keeps_its_outputs(name, seed):
    model, inputs = build(name)
    shrunk(deaden(model, seed), *inputs)


def chain(*between, padding=1, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.Conv2d(8, 5, 3, padding=padding, bias=bias)).eval()


@torch.no_grad()
def dead_filters(layer, filters=(1, 4, 5), bias=0.0):
    layer.weight[list(filters)] = 0
    layer.bias[list(filters)] = bias


IMAGE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bias", [0.0, 0.7, -0.7])
def test_a_constant_goes_where_no_border_shows_it(bias, padding):
    model = chain(nn.ReLU(inplace=True), padding=padding)
    dead_filters(model[0], bias=bias)
    small, _ = shrunk(model, IMAGE)
    gone = 0 if bias > 0 and padding else 3  # ReLU makes a negative constant 0
    assert small[0].out_channels == small[2].in_channels == 8 - gone
    assert small[2].weight.shape == (5, 8 - gone, 3, 3)


def test_a_constant_makes_a_bias_where_there_was_none():
    model = chain(nn.Sigmoid(), padding=0, bias=False)  # sigmoid(0) is no zero
    dead_filters(model[0])
    small, _ = shrunk(model, IMAGE)
    assert small[0].out_channels == 5
    assert small[2].bias.shape == (5,)


def test_a_filter_that_reads_constants_alone_is_one():
    model = nn.Sequential(chain(nn.ReLU(), padding=0), nn.ReLU(), nn.Conv2d(5, 4, 1)).eval()
    dead_filters(model[0][0], (0, 1), bias=2.0)
    with torch.no_grad():
        model[0][2].weight[3, 2:] = 0
    small, _ = shrunk(model, IMAGE)
    assert small[0][2].out_channels == 4


def test_average_pooling_over_a_border_shows_a_constant():
    for pool, left in ((nn.AvgPool2d(3, 2, 1), 8), (nn.AvgPool2d(2), 5), (nn.MaxPool2d(3, 2, 1), 5)):
        model = chain(pool, padding=0)
        dead_filters(model[0], bias=0.5)
        assert shrunk(model, IMAGE)[0][0].out_channels == left


def test_what_a_layer_does_not_read_goes_from_its_writer():
    model = chain(nn.BatchNorm2d(8), nn.PReLU(8))
    with torch.no_grad():
        model[3].weight[:, 2] = 0
    small, report = shrunk(model, IMAGE)
    assert [small[0].out_channels, small[1].num_features, small[2].num_parameters] == [7, 7, 7]
    assert [(row.layer, row.filters, row.channels) for row in report.layers] == [("0", 7, 3), ("3", 5, 7)]
    assert report.headline == "removed 1 of 13 filters: zero, or read by nothing"


def test_a_norm_without_parameters_loses_its_statistics():
    model = chain(nn.BatchNorm2d(8, affine=False), nn.ReLU())
    dead_filters(model[0])
    model[1].running_mean.uniform_(0.1, 1)  # ReLU makes the constants 0
    small, _ = shrunk(model, IMAGE)
    assert small[1].running_mean.shape == (5,)


def test_an_activation_may_be_called_twice():
    act = nn.PReLU()
    model = nn.Sequential(chain(act), act, conv(5, 4)).eval()
    dead_filters(model[0][0])
    dead_filters(model[0][2], (3,))
    small, _ = shrunk(model, IMAGE)
    assert (small[0][0].out_channels, small[0][2].out_channels) == (5, 4)


def test_a_parameter_that_a_block_reads_itself_keeps_its_channels():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = conv(3, 8), nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x):
            return self.conv(x) * self.scale

    torch.manual_seed(0)
    model = nn.Sequential(Scaled(), conv(8, 6), nn.ReLU(), conv(6, 4)).eval()
    dead_filters(model[0].conv)
    dead_filters(model[1], (2,))
    small, _ = shrunk(model, IMAGE)
    assert (small[0].conv.out_channels, small[1].out_channels) == (8, 5)


def test_a_filter_stays_in_both_arms_of_an_addition_unless_both_are_dead():
    torch.manual_seed(0)

    class Arms(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.tail = conv(3, 8), conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.tail(self.one(x) + self.two(x))

    model = Arms().eval()
    dead_filters(model.one, (0, 1, 2))
    dead_filters(model.two, (2, 3))
    small, _ = shrunk(model, IMAGE)
    assert small.one.out_channels == small.two.out_channels == small.tail.in_channels == 7


def test_everything_dead_leaves_a_filter():
    model = chain(nn.ReLU())
    dead_filters(model[0], range(8))
    small, _ = shrunk(model, IMAGE)
    assert small[0].out_channels == 1


def test_outputs_of_the_network_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    dead_filters(model[0])
    small, report = shrunk(model, IMAGE)
    assert small[0].out_channels == 8
    assert str(report).startswith("nothing to remove")


class Twisted(nn.Module):
    """A dead filter in front of something that is not understood."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = conv(3, 8), conv(8, 4), function

    def forward(self, x):
        return self.second(self.function(self, self.first(x)))


def shuffled(m, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


PINNING = {
    "shuffle": shuffled,
    "flip": lambda m, x: x.flip(1),
    "slice": lambda m, x: torch.cat([x[:, :4], x[:, 4:]], 1),
    "chunk": lambda m, x: torch.cat(x.chunk(2, 1), 1),
    "softmax": lambda m, x: x.softmax(1),
    "count": lambda m, x: x / x.shape[1],
    "mean": lambda m, x: x - x.mean(1, keepdim=True),
    "weight read": lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), m.second.weight[:, :8].repeat(2, 1, 1, 1)),
    "twice": lambda m, x: x + m.first(x[:, :3]),
    "written": lambda m, x: x.index_fill(1, torch.tensor([1]), 3.0),
}


@pytest.mark.parametrize("name", PINNING)
def test_what_is_not_understood_keeps_its_channels(name):
    model = Twisted(PINNING[name]).eval()
    dead_filters(model.first)
    small, _ = shrunk(model, IMAGE)
    assert small.first.out_channels == 8


UNDERSTOOD = {
    "sizes": lambda m, x: F.interpolate(x, size=x.shape[-2:]).clone(),
    "arithmetic": lambda m, x: x * 2 - x / 4,
    "clamped": lambda m, x: torch.clamp(x, -1, 1).contiguous(),
    "dropout": lambda m, x: F.dropout(x, 0.5, training=m.training),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_is_understood_lets_channels_go(name):
    model = Twisted(UNDERSTOOD[name]).eval()
    dead_filters(model.first)
    small, _ = shrunk(model, IMAGE)
    assert small.first.out_channels == 5


class Overwritten(nn.Module):
    """The first convolution's output is read after somebody wrote to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = conv(3, 8), nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.first(x)
        y = x
        y += 1
        return self.second(x) + self.third(torch.relu_(y))


def test_what_is_overwritten_keeps_its_channels():
    model = Overwritten().eval()
    dead_filters(model.first, bias=-2.0)
    small, _ = shrunk(model, IMAGE)
    assert small.first.out_channels == 8


def test_masks_beside_weights_are_settled():
    model = chain(nn.ReLU())
    mask = torch.ones(8, 3, 3, 3)
    mask[3] = 0
    prune.custom_from_mask(model[0], "weight", mask)
    with torch.no_grad():
        model[0].bias[3] = 0
    expected = model(IMAGE)
    lhc.shrink(model, IMAGE)
    assert model[0].out_channels == 7
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.allclose(model(IMAGE), expected, atol=1e-6)


def lhc_chain(width=24, in_block=8, out_block=4):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
    ).eval()
    config = lhc.LHCConfig(density=0.4, in_block=in_block, out_block=out_block)
    return lhc.prune(model, IMAGE, config)


def test_a_topology_loses_whole_groups_and_blocks():
    model = lhc_chain()
    with torch.no_grad():
        model[1].weight[3:18] = model[1].bias[3:18] = 0  # the block 8..15 and parts of two others
        model[4].weight[2:9] = model[4].bias[2:9] = 0  # the group 4..7 and parts; block 0..7 has 0, 1
    small, _ = shrunk(model, IMAGE)
    assert small[0].out_channels == small[3].in_channels == 16
    assert isinstance(small[3], LHCConv2d)
    assert small[3].topology.shape == (4, 2, 3, 3)
    assert small[3].frozen
    state = small.state_dict()
    copy.deepcopy(small).load_state_dict(state)
    fast = lhc.accelerate(small, IMAGE, tune="off")
    same(small, fast, IMAGE)


def test_to_dense_frees_the_rest():
    model = lhc_chain()
    with torch.no_grad():
        model[1].weight[3:18] = model[1].bias[3:18] = 0
    small, _ = shrunk(lhc.to_dense(model), IMAGE)
    assert small[0].out_channels == 9


def test_it_works_in_place_on_the_same_parameters_and_goes_on_learning():
    model = chain(nn.BatchNorm2d(8), nn.ReLU())
    with torch.no_grad():
        model[1].weight[2] = model[1].bias[2] = 0
    parameters = list(model.parameters())
    model.train()
    assert lhc.shrink(model, IMAGE) is model
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert model.training
    model(IMAGE).square().sum().backward()
    assert model[0].weight.grad.shape == (7, 3, 3, 3)


def test_nan_in_a_channel_that_went_reaches_nobody():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.second(self.first(x) * 1e30)

    torch.manual_seed(0)
    model = Scaled().eval()
    with torch.no_grad():
        model.second.weight[:, 0] = 0
        model.first.weight[0] = 1e30
    small = copy.deepcopy(model)
    lhc.shrink(small, IMAGE * 1e-30)
    assert model(IMAGE).isnan().any()
    assert small(IMAGE).isfinite().all()


def test_a_slimmed_network_needs_fewer_macs():
    torch.manual_seed(0)
    model = resnet(BasicBlock).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[::2] = module.bias[::2] = 0
    before = lhc.summary(model, (3, 16, 16)).total.macs
    small, _ = shrunk(model, torch.randn(2, 3, 16, 16))
    assert lhc.summary(small, (3, 16, 16)).total.macs < 0.3 * before


def test_the_report_fits_a_terminal_and_json():
    model = deaden(resnet(Bottleneck))
    _, report = shrunk(model, torch.randn(2, 3, 16, 16))
    assert json.loads(json.dumps(report.to_dict()))["filters"] == report.filters
    assert max(map(len, str(report).splitlines())) <= 80


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = conv(3, 8), conv(8, 4), conv(8, 4)

    def forward(self, x):
        x = self.body(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(3, 8), conv(8, 8)

    def forward(self, x):
        x = self.one(x)
        return self.two(x) + (1 if self.one.out_channels == 8 else 0)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Untraceable(), IMAGE, r"torch\.fx cannot trace Untraceable"),
        (Auxiliary(), IMAGE, "module 'aux' is not called in eval mode"),
        (chain(), torch.zeros(1, 5, 9, 9), "does not run"),
        (chain(), "image", "example_input is a str"),
        ("network", IMAGE, "model is a str"),
    ],
)
def test_a_wrong_argument_is_one_line(model, example, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        lhc.shrink(model, example)
    assert "\n" not in str(error.value)


def test_a_network_whose_code_counts_channels_is_left_as_it_was():
    model = Counting().eval()
    dead_filters(model.one)
    with pytest.raises(ValueError, match="Counting would compute something else on the example"):
        lhc.shrink(model, IMAGE)
    assert model.one.weight.shape == (8, 3, 3, 3)
