import copy

import numpy as np
import pytest
import torch
from planning_cases import CUDA
from torch import nn
from torch.nn.utils import parametrizations, prune

from lhc_triton import LHCConfig, LHCConv2d
from lhc_triton.planning import CostModel, plan
from lhc_triton.planning.extract import call_geometries, read_model, reread_model
from lhc_triton.watching import Watch


def lhc_layer(in_channels, out_channels, seed=0, config=None, **options):
    torch.manual_seed(seed)
    conv = LHCConv2d(
        in_channels, out_channels, 3, config=config or LHCConfig(in_block=8, out_block=8), **options
    )
    conv.set_topology(torch.rand(conv.topology.shape) < 0.2)
    return conv


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        lhc_layer(16, 32, stride=2, padding=1),
        nn.Dropout(0.5),
        nn.Conv2d(32, 32, 1, groups=4),
        lhc_layer(32, 24, seed=1, padding=(0, 2), dilation=(1, 2)),
    )


X = torch.randn(2, 3, 20, 18, generator=torch.Generator().manual_seed(0))


def one(conv, x):
    """The topology of a lone convolution, or the reason why it has none."""
    reading = read_model(nn.Sequential(conv), x)
    return reading.topologies[0] if reading.topologies else reading.skipped[0][1]


def test_a_network_is_read_in_calling_order_with_its_geometry():
    model = small_network()
    reading = read_model(model, X)
    assert [topology.name for topology in reading.topologies] == ["3", "6"]
    assert reading.skipped == (("0", "no zeros"), ("5", "groups=4; only groups=1 is planned"))
    assert (reading.dtype, reading.cost) == ("float32", CostModel.for_device("cpu"))
    for topology in reading.topologies:
        conv = model[int(topology.name)]
        geometry = topology.geometry
        y = conv(torch.randn(geometry.batch, geometry.in_channels, geometry.height, geometry.width))
        assert (geometry.out_channels, geometry.out_height, geometry.out_width) == tuple(y.shape[1:])
        np.testing.assert_array_equal(topology.block_mask(), conv.block_mask().bool().numpy())


def test_geometries_are_of_all_called_convolutions_that_mix_all_channels():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), lhc_layer(16, 32, stride=2), nn.Flatten()
    )
    model.add_module("idle", nn.Identity())
    model[4].conv = nn.Conv2d(8, 8, 1)  # never called
    x = torch.randn(2, 3, 19, 17)
    every = call_geometries(model, x)
    assert list(every) == ["0", "1", "2"]
    assert read_model(model, x).geometries == {name: every[name] for name in ("0", "2")}


def test_a_network_that_lost_channels_is_read_again_without_a_run():
    model = small_network()
    model.append(nn.ConvTranspose2d(24, 8, 2)).append(nn.Conv2d(8, 8, 1))
    earlier = read_model(model, X)

    fewer = copy.deepcopy(model)
    fewer[0] = nn.Conv2d(3, 8, 3, padding=1)
    fewer[1] = nn.BatchNorm2d(8)
    fewer[3] = lhc_layer(8, 32, seed=5, stride=2, padding=1)
    expected = read_model(fewer, X)
    fewer.forward = None  # it cannot be
    again = reread_model(fewer, earlier)
    assert again == expected
    assert [topology.geometry.in_channels for topology in again.topologies] == [8, 32]
    assert again.topologies[1] is earlier.topologies[1]
    assert again.shapes["0"] == (2, 3, 20, 18)


def test_what_runs_in_a_models_place_and_who_watches_are_asked():
    class Lookout(Watch):
        def __init__(self):
            super().__init__()
            self.seen = {True: [], False: []}
            self.told = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen[self.inside > 0].append(func._schema.name)
            return func(*args, **(kwargs or {}))

        def convolved(self, name, conv, given, output):
            self.told.append((name, tuple(given.shape), tuple(output.shape)))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    watch, runs = Lookout(), []
    found = call_geometries(model, X, watch, lambda *inputs: runs.append(model(*inputs).shape))
    assert found == call_geometries(model, X)
    assert runs == [(2, 4, 18, 16)]
    assert watch.told == [("0", (2, 3, 20, 18), (2, 8, 18, 16)), ("2", (2, 8, 18, 16), (2, 4, 18, 16))]
    assert sum("convolution" in name for name in watch.seen[True]) == 2
    assert [name for name in watch.seen[False] if name.startswith("aten::relu")] == ["aten::relu"]


def test_the_model_is_left_as_it_was():
    model = small_network()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    read_model(model, X)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fails_is_left_as_it_was():
    model = small_network()
    with pytest.raises(ValueError, match=r"Sequential does not run on inputs of shape \(2, 4, 20, 18\): "):
        plan(model, X.new_zeros(2, 4, 20, 18))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_unfrozen_layers_bring_the_mask_of_their_effects():
    torch.manual_seed(0)
    conv = LHCConv2d(16, 16, 3, config=LHCConfig(in_block=8, out_block=8))
    topology = one(conv, torch.randn(1, 16, 8, 8))
    np.testing.assert_array_equal(topology.block_mask(), (conv.effects > 0).numpy())


def test_wide_blocks_are_split():
    conv = lhc_layer(512, 256, config=LHCConfig(in_block=256, out_block=256))
    topology = one(conv, torch.randn(1, 512, 4, 4))
    assert (topology.in_block, topology.out_block) == (128, 128)
    assert topology.live_weights == int(conv.live_weights())


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "expected"),
    [
        ("valid", (3, 3), 1, (0, 0, 0, 0)),
        ("same", (3, 3), 1, (1, 1, 1, 1)),
        ("same", (4, 2), (1, 3), (1, 2, 1, 2)),
        ((2, 1), (5, 3), 1, (2, 2, 1, 1)),
        (1, (3, 3), 1, (1, 1, 1, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_of_every_kind_is_read(padding, kernel, dilation, expected):
    conv = nn.Conv2d(16, 16, kernel, padding=padding, dilation=dilation)
    with torch.no_grad():
        conv.weight[:, :8] = 0
    x = torch.randn(1, 16, 12, 10)
    geometry = one(conv, x).geometry
    assert geometry.padding == expected
    assert (geometry.out_height, geometry.out_width) == tuple(conv(x).shape[2:])


def test_an_image_without_batch_is_a_batch_of_one():
    topology = one(lhc_layer(16, 16), torch.randn(16, 9, 7))
    assert (topology.geometry.batch, topology.geometry.height, topology.geometry.width) == (1, 9, 7)


def test_a_masked_dense_model_is_planned_like_its_lhc_twin():
    twin = lhc_layer(64, 64, config=LHCConfig(in_block=16, out_block=16))
    plain = nn.Conv2d(64, 64, 3)
    with torch.no_grad():
        plain.weight.copy_(twin.masked_weight())
    x = torch.randn(1, 64, 12, 12)
    assert one(plain, x) == one(twin, x)


@pytest.mark.parametrize("permanent", [False, True])
def test_filters_pruned_by_torch_are_skipped(permanent):
    torch.manual_seed(0)
    conv = prune.ln_structured(nn.Conv2d(64, 64, 3), "weight", amount=0.5, n=2, dim=0)
    if permanent:
        prune.remove(conv, "weight")
    topology = one(conv, torch.randn(1, 64, 8, 8))
    assert topology.out_block == 1
    assert topology.density == pytest.approx(0.5)


def test_zeros_without_structure_are_skipped_with_the_reason():
    torch.manual_seed(0)
    conv = prune.random_unstructured(nn.Conv2d(64, 64, 3), "weight", amount=0.8)
    assert one(conv, torch.randn(1, 64, 8, 8)).startswith("80% zeros, too scattered for blocks (single")


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = lhc_layer(16, 16, padding=1)
        self.unused = nn.Conv2d(16, 16, 3)
        self.alias = self.used

    def forward(self, x, scale):
        return self.alias(self.used(input=x)) * scale


def test_layers_may_be_called_by_keyword_twice_or_never():
    reading = read_model(Keyword(), (torch.randn(1, 16, 8, 8), 2.0))
    assert [topology.name for topology in reading.topologies] == ["used"]
    assert reading.skipped == (("unused", "not called on the example input"),)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (Doubled(16, 16, 3), "is a Doubled, with behaviour of its own"),
        (nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'; only 'zeros'"),
        (nn.Conv2d(16, 16, 3, groups=16), "groups=16; only groups=1 is planned"),
        (nn.ConvTranspose2d(16, 16, 3), "is a ConvTranspose2d; only nn.Conv2d is planned"),
        (parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), "no zeros"),
        (nn.Conv2d(16, 16, 3), "no zeros"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_not_planned_says_why(conv, reason):
    model = nn.Sequential(lhc_layer(16, 16), conv)
    made = plan(model, torch.randn(1, 16, 8, 8))
    assert [layer.name for layer in made.layers] == ["0"]
    ((name, why),) = made.skipped
    assert name == "1"
    assert why.startswith(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_plan_is_for_the_type_of_the_weights(dtype):
    model = nn.Sequential(lhc_layer(16, 16).to(dtype))
    assert plan(model, torch.randn(1, 16, 8, 8, dtype=dtype)).dtype == str(dtype).removeprefix("torch.")


def test_the_cost_model_and_the_backend_may_be_given():
    model = small_network()
    made = plan(model, X, backend="reference", cost=CUDA)
    assert made.device == "cuda"
    assert {layer.backend for layer in made.layers} == {"reference"}
    assert set(made.layers[0].predicted_us) == {"dense", "triton"}


def test_the_plan_of_a_network_is_the_same_each_time():
    assert plan(small_network(), X) == plan(small_network(), X)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"model is a str: give a torch\.nn\.Module"):
        plan("model", X)
    with pytest.raises(TypeError, match="example_input is a NoneType: give a tensor or a tuple of them"):
        plan(small_network(), None)
    with pytest.raises(ValueError, match="backend 'fast' is not known"):
        plan(small_network(), X, backend="fast")
    with pytest.raises(ValueError, match="example_input is empty: give at least one image"):
        plan(small_network(), X[:0])
    with pytest.raises(ValueError, match=r"Linear has no nn\.Conv2d: there is nothing to plan"):
        plan(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(ValueError, match="no cost model for device 'meta'; supported: cpu, cuda"):
        plan(nn.Conv2d(3, 8, 3, device="meta"), torch.randn(1, 3, 8, 8, device="meta"))


def test_nan_weights_are_refused_by_the_layers_name():
    model = small_network()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '3' has NaN in its weight; repair the model first"):
        plan(model, X)


def test_a_model_that_raises_anything_gives_one_line():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            raise KeyError("features\nmore")

    with pytest.raises(ValueError, match=r"Odd does not run on inputs of shape \(2, 3, 20, 18\): ") as caught:
        plan(Odd(), X)
    assert "\n" not in str(caught.value)
