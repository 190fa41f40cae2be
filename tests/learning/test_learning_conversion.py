"""convert, freeze, summary: what they take over, what they leave, what they refuse."""

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn

from lhc_triton.conversion import blocks_by_width, convert, freeze, lhc_layers, output_pixels, summary
from lhc_triton.layers import LHCConv2d
from lhc_triton.topology import LHCConfig

CONFIG = LHCConfig(density=0.1, in_block=8, out_block=4)


class Residual(nn.Module):
    """Stem, a block that is called twice, a strided convolution, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.block = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.ReLU())
        self.again = self.block
        self.down = nn.Conv2d(12, 20, (1, 5), stride=2, padding="valid")
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(20, 10)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = self.again(x + self.block(x))
        return self.head(self.drop(self.down(x)).mean((2, 3)))


def network(seed=0):
    torch.manual_seed(seed)
    return Residual()


def test_convert_replaces_all_but_the_first_convolution_in_place():
    model = network()
    assert convert(model, CONFIG) is model
    assert list(lhc_layers(model)) == ["block.0", "down"]
    assert type(model.stem) is nn.Conv2d
    assert model.down.config is CONFIG


def test_convert_defaults_to_the_methods_settings():
    model = convert(network())
    assert model.down.config == LHCConfig(density=0.1, in_block=32, out_block=16, shapes="free")


def test_convert_keeps_parameters_and_flags():
    model = network().double()
    model.down.eval()
    model.down.weight.requires_grad_(False)
    kept = dict(model.named_parameters())
    rest = [m for m in model.modules() if not isinstance(m, nn.Conv2d)]
    convert(model, CONFIG)
    new = dict(model.named_parameters())
    assert all(new[name] is parameter for name, parameter in kept.items())
    assert set(new) - set(kept) == {"block.0.effects", "down.effects"}
    assert not model.down.training
    assert model.block[0].training
    assert not model.down.weight.requires_grad
    assert model.down.bias.requires_grad
    assert model.down.effects.requires_grad
    assert model.block[0].bias is None
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert [m for m in model.modules() if not isinstance(m, nn.Conv2d)] == rest


def test_convert_keeps_the_device():
    model = convert(Residual().to("meta"), CONFIG)
    assert all(t.is_meta for t in (*model.down.parameters(), *model.down.buffers()))


def test_converted_network_with_full_masks_computes_the_same():
    model = network().eval()
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    for layer in lhc_layers(convert(model, CONFIG)).values():
        layer.set_topology(torch.ones_like(layer.topology))
    torch.testing.assert_close(model(x), expected)


def test_a_module_used_twice_stays_shared():
    model = network()
    shared = nn.Sequential(model.stem, model.down, nn.ModuleDict({"other": model.down}))
    convert(shared, CONFIG)
    assert shared[1] is shared[2]["other"]
    assert isinstance(shared[1], LHCConv2d)
    model = convert(network(), CONFIG)
    assert model.block is model.again


def test_convert_draws_the_same_effects_from_the_same_seed():
    models = []
    for _ in range(2):
        model = network()
        torch.manual_seed(7)
        models.append(convert(model, CONFIG))
    assert torch.equal(models[0].down.effects, models[1].down.effects)


def test_filter_fn_chooses_by_name_and_module_and_never_sees_the_first_convolution():
    seen = []

    def choose(name, module):
        seen.append((name, module.kernel_size))
        return name == "down"

    assert list(lhc_layers(convert(network(), CONFIG, choose))) == ["down"]
    assert seen == [("block.0", (3, 3)), ("down", (1, 5))]


def test_convert_twice_converts_what_was_left():
    model = convert(network(), CONFIG, lambda name, _: name == "down")
    down = model.down
    convert(model, CONFIG)
    assert list(lhc_layers(model)) == ["block.0", "down"]
    assert model.down is down


def test_what_cannot_be_converted_stays_dense():
    class Special(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        Special(4, 4, 3),
        nn.LazyConv2d(4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, 3),
    )
    before = list(model)
    convert(model, LHCConfig(0.1, 2, 2, "rigid"))
    assert list(lhc_layers(model)) == ["7"]
    assert list(model)[:7] == before[:7]
    convert(model, LHCConfig(0.1, 2, 2))
    assert list(lhc_layers(model)) == ["6", "7"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), ValueError, "Linear has no nn.Conv2d: there is nothing to convert"),
        (lambda: nn.Sequential(), ValueError, "Sequential has no nn.Conv2d"),
        (lambda: nn.Conv2d(3, 3, 3), ValueError, "the model itself is the first convolution"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)),
            ValueError,
            r"no convolution of Sequential can be converted: 0 is .*; 1 has groups=4 \(supported: 1\)",
        ),
        (
            lambda: nn.Sequential(*(nn.Conv2d(4, 4, 3, groups=4) for _ in range(6))),
            ValueError,
            "groups=4.*, and 3 more",
        ),
        (lambda: convert(network(), CONFIG), ValueError, "block.0 is an LHCConv2d already"),
        (lambda: "model", TypeError, "model is a str: give a torch.nn.Module"),
    ],
)
def test_convert_refuses_models_without_anything_to_convert(make, error, message):
    with pytest.raises(error, match=message) as caught:
        convert(make(), CONFIG)
    assert "\n" not in str(caught.value)


def test_convert_refuses_when_the_filter_leaves_nothing():
    with pytest.raises(ValueError, match=r"block\.0 was left out by filter_fn"):
        convert(network(), CONFIG, lambda name, module: False)


def test_convert_refuses_a_config_of_another_type():
    with pytest.raises(TypeError, match=r"config=0\.1 is not supported"):
        convert(network(), 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_convert_refuses_weights_that_are_not_finite_and_changes_nothing(value):
    model = network()
    with torch.no_grad():
        model.down.weight[3, 2, 0, 1] = value
    with pytest.raises(ValueError, match="layer 'down' has NaN or infinity in its weight"):
        convert(model, CONFIG)
    assert not lhc_layers(model)


def test_freeze_freezes_every_layer_and_keeps_the_output():
    model = convert(network(), CONFIG).eval()
    x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    assert freeze(model) is model
    assert all(layer.frozen for layer in lhc_layers(model).values())
    assert torch.equal(model(x), expected)


def with_density(model, *densities):
    """Set each layer's effects so that this share of each filter group's entries lives."""
    for layer, density in zip(lhc_layers(model).values(), densities, strict=True):
        with torch.no_grad():
            effects = layer.effects.flatten(1)
            effects.fill_(-1.0)
            effects[:, : round(density * effects.shape[1])] = 1.0
    return model


def wide(density=0.1, **arguments):
    """Two layers of equal size in blocks that divide them, so that a share of entries is one of weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 5), nn.Conv2d(32, 32, 5))
    return convert(model, LHCConfig(density, in_block=1, out_block=4, **arguments))


@pytest.mark.parametrize(
    ("target", "densities"), [(0.1, (0.5, 0.5)), (0.1, (0.05, 0.05)), (0.5, (0.9, 0.8)), (0.4, (0.1, 0.2))]
)
def test_freeze_warns_where_the_density_is_far_from_its_target(target, densities):
    model = with_density(wide(target), *densities)
    mean = sum(densities) / 2
    message = rf"the density at freeze\(\) is {mean:.2f}., far from its target {target:.3f}\."
    with pytest.warns(
        UserWarning, match=f"{message} Likely causes: an optimiser made before convert"
    ) as told:
        freeze(model)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert told[0].filename == __file__
    assert all(layer.frozen for layer in lhc_layers(model).values())


@pytest.mark.parametrize(
    ("target", "densities"),
    [
        (0.1, (0.11, 0.1)),
        (0.1, (0.18, 0.02)),
        (0.02, (0.035, 0.03)),
        (0.5, (0.6, 0.55)),
        (1.0, (0.9, 1.0)),
        (None, (0.5, 0.9)),
    ],
)
def test_freeze_is_silent_near_the_target_or_without_one(target, densities):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze(with_density(wide(target), *densities))


def test_freeze_is_silent_about_layers_that_are_frozen_already():
    model = wide()
    first, second = lhc_layers(model).values()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.set_topology(torch.ones_like(first.topology))
        with_density(model, 1.0, 0.01)  # what learned makes up for it
        freeze(model)
        freeze(model)
    second.reset_effects()
    with pytest.warns(UserWarning, match="the density at freeze"):
        freeze(model)


def test_freeze_measures_the_share_that_was_steered():
    model = with_density(wide(), 0.5, 0.05)
    costs = {"1": 1.0, "2": 9.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze(copy.deepcopy(model), entry_costs=costs)
    with pytest.warns(UserWarning, match=r"is 0\.27., far from its target 0\.100"):
        freeze(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"entry_costs lacks the layers \['2'\]"):
        freeze(model, entry_costs={"1": 1.0})
    assert not any(layer.frozen for layer in lhc_layers(model).values())


def test_freeze_refuses_a_model_without_lhc_layers():
    with pytest.raises(ValueError, match="Residual has no LHCConv2d: call convert"):
        freeze(network())


def test_freeze_names_the_layer_whose_effects_diverged_and_freezes_none():
    model = convert(network(), CONFIG)
    with torch.no_grad():
        model.down.effects[0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="layer 'down' has NaN or infinity in its effects"):
        freeze(model)
    assert not model.block[0].frozen


def test_whole_model_round_trip_of_a_frozen_state():
    model = freeze(convert(network(), CONFIG)).eval()
    other = convert(network(1), CONFIG).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    assert all(layer.frozen for layer in lhc_layers(other).values())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(other)(x), model(x))


def test_output_pixels_counts_batch_and_every_call():
    model = convert(network(), CONFIG)
    pixels = output_pixels(model, torch.zeros(2, 3, 9, 9), (nn.Conv2d, nn.Linear))
    assert pixels == {"stem": 162, "block.0": 324, "down": 2 * 5 * 3, "head": 2}


def test_output_pixels_leaves_flags_random_state_buffers_and_hooks_as_they_were():
    model = convert(network(), CONFIG)
    model.norm.eval()
    flags = [m.training for m in model.modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            assert not self.training
            assert not torch.is_grad_enabled()
            return self.inner(x + torch.rand_like(x))

    output_pixels(Noisy(), torch.zeros(2, 3, 9, 9), (LHCConv2d,))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (torch.zeros(1, 4, 9, 9), ValueError, r"Residual does not run on an input of shape \(1, 4, 9, 9\): "),
        (torch.zeros(1, 3, 2, 2), ValueError, "does not run on an input of shape"),
        ([1, 3, 9, 9], TypeError, "example_input is a list: give a tensor"),
        (None, TypeError, "example_input is a NoneType"),
    ],
)
def test_output_pixels_refuses_and_restores(example, error, message):
    model = convert(network(), CONFIG)
    with pytest.raises(error, match=message) as caught:
        output_pixels(model, example, (LHCConv2d,))
    assert "\n" not in str(caught.value)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_summary_counts_weights_macs_density_and_patterns_exactly():
    model = convert(network(), CONFIG)
    mask = torch.zeros(3, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1] = mask[2, 0, 1, 1] = mask[1, 1, 0] = True
    model.block[0].set_topology(mask)
    result = summary(model, (3, 9, 9))
    rows = {row.layer: row for row in result.rows}
    assert list(rows) == ["stem", "block.0", "down", "head"]
    stem, block, down, head = rows.values()
    assert (stem.kind, stem.weights, stem.live_weights, stem.macs) == ("conv", 324, 324, 324 * 81)
    # 12 filters in groups of 4, 12 channels in blocks of 8 and 4; the block runs twice.
    live = 2 * (4 * 8) + 3 * (4 * 4)
    assert (block.kind, block.weights, block.live_weights) == ("lhc", 1296, live)
    assert (block.macs, block.live_macs) == (1296 * 162, live * 162)
    assert (block.patterns, block.rescued) == (2, 0)
    assert block.density == live / 1296
    assert down.live_weights == model.down.mask().sum().item()
    assert down.density == model.down.density
    assert (head.kind, head.weights, head.macs) == ("linear", 200, 200)
    assert result.converted.weights == block.weights + down.weights
    assert result.converted.live_macs == block.live_macs + down.live_macs
    assert result.total.macs == sum(row.macs for row in result.rows)
    assert result.total.density == result.total.live_weights / result.total.weights


def test_summary_is_the_same_for_a_batched_size_and_any_training_flag():
    model = convert(network(), CONFIG)
    assert summary(model, (3, 9, 9)) == summary(model.eval(), (16, 3, 9, 9))


def test_summary_counts_rescued_groups():
    model = convert(network(), CONFIG)
    with torch.no_grad():
        model.down.effects[1:3] = -1.0
    assert summary(model, (3, 9, 9)).converted.rescued == 2


def test_summary_serves_json_and_a_table_with_aligned_columns():
    result = summary(convert(network(), CONFIG), (3, 9, 9))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["rows"][1]["layer"] == "block.0"
    assert data["converted"]["weights"] == result.converted.weights
    lines = str(result).splitlines()
    assert " ".join(lines[0].split()) == "layer kind weights live MACs live MACs density patterns rescued"
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].startswith("all ")


def test_summary_of_a_dense_network_has_no_converted_layers():
    result = summary(network(), (3, 9, 9))
    assert result.converted.weights == 0
    assert result.converted.density == 1.0
    assert result.total.density == 1.0


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (nn.Linear(3, 3), (3, 9, 9), "Linear has no nn.Conv2d: there is nothing to summarise"),
        (Residual(), (9, 9), r"input_size=\(9, 9\) is not supported: give \(C, H, W\)"),
        (Residual(), (3, 0, 9), "input_size="),
        (Residual(), (3, 9.0, 9), "input_size="),
        (Residual(), (1, 9, 9), "Residual does not run on an input of shape"),
    ],
)
def test_summary_refuses(model, size, message):
    with pytest.raises(ValueError, match=message):
        summary(model, size)


def test_convert_takes_a_rule_that_gives_each_layer_its_blocks():
    def rule(name, conv):
        return LHCConfig(0.3, in_block=conv.in_channels // 2, out_block=4)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 12, 3), nn.Conv2d(12, 4, 1))
    convert(model, rule, lambda name, conv: conv.out_channels > 4)
    assert {n: x.config.in_block for n, x in lhc_layers(model).items()} == {"1": 4, "2": 8}
    other = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 12, 3)), rule)
    other.load_state_dict({k: v for k, v in freeze(model).state_dict().items() if not k.startswith("3.")})
    x = torch.randn(1, 3, 12, 12)
    assert torch.equal(other(x), model[:3](x))
    assert all(layer.frozen for layer in lhc_layers(other).values())


def test_convert_with_a_rule_leaves_even_kernels_dense_where_it_gives_them_rigid_shapes():
    def rule(name, conv):
        return LHCConfig(shapes="free" if name == "1" else "rigid")

    model = convert(nn.Sequential(*(nn.Conv2d(4, 4, kernel) for kernel in (3, 2, 2, 3))), rule)
    assert list(lhc_layers(model)) == ["1", "3"]


def test_convert_refuses_a_rule_that_returns_something_else_and_changes_nothing():
    model = network()
    with pytest.raises(TypeError, match=r"config function returned 16 for layer '.+': return an LHCConfig"):
        convert(model, lambda name, conv: 16)
    assert not lhc_layers(model)


@pytest.mark.parametrize(
    ("channels", "filters", "blocks"),
    [
        (64, 64, (32, 16)),
        (128, 128, (32, 16)),
        (256, 256, (32, 32)),
        (256, 512, (32, 64)),
        (512, 255, (64, 16)),
        (1024, 1024, (128, 128)),
        (2048, 2048, (128, 128)),
        (3, 5, (32, 16)),
    ],
)
def test_blocks_by_width_widens_while_enough_groups_and_blocks_remain(channels, filters, blocks):
    config = LHCConfig(0.2, shapes="rigid")
    found = blocks_by_width(config)("a", nn.Conv2d(channels, filters, 3, device="meta"))
    assert (found.in_block, found.out_block) == blocks
    assert (found.density, found.shapes) == (0.2, "rigid")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 0}, ValueError, "groups=0 is not supported: give 1 or more"),
        ({"blocks": 1.5}, TypeError, "blocks=1.5 is not an int"),
        ({"largest": 16}, ValueError, "in_block=32 is above largest=16"),
    ],
)
def test_blocks_by_width_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        blocks_by_width(LHCConfig(), **arguments)
