"""The networks of a run: their sizes from config and images, the weights they start from, their topology."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lhc_triton.conversion import lhc_layers, summary
from lhc_triton.handcrafted import HANDCRAFTED, impose
from lhc_triton.models.resnet import ResNet
from lhc_triton.training import ImageFormat, TrainConfig
from lhc_triton.training.networks import apply_topology, architecture_of, build_network, network_name


def images(channels: int = 3, size: int = 32, classes: int = 10) -> ImageFormat:
    names = tuple(str(label) for label in range(classes))
    return ImageFormat(channels, size, names, (0.5,) * channels, (0.2,) * channels)


def on_paper(config: TrainConfig, format: ImageFormat) -> nn.Module:
    with torch.device("meta"):
        return build_network(config, format)


@pytest.mark.parametrize(
    ("network", "format", "parameters", "macs"),
    [
        ("vgg16", images(), 14_724_042, 313.2e6),
        ("resnet34", images(), 21_282_122, 1.159e9),
        ("resnet50", images(3, 224, 1000), 25_557_032, 4.09e9),
        ("vgg19", images(3, 224, 1000), 143_678_248, 19.63e9),
    ],
)
def test_a_network_of_full_width_has_the_published_size(network, format, parameters, macs):
    model = on_paper(TrainConfig(network=network), format)
    assert sum(p.numel() for p in model.parameters()) == parameters
    size = (format.channels, format.size, format.size)
    assert summary(model, size).total.macs == pytest.approx(macs, rel=2e-3)


@pytest.mark.parametrize("network", ["small-vgg", "vgg16", "vgg19", "resnet34", "resnet50"])
def test_channels_classes_and_width_are_those_asked_for(network):
    config = TrainConfig(network=network, width=0.25)
    model = on_paper(config, images(1, 32, 7))
    assert model(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 7)
    full = on_paper(dataclasses.replace(config, width=1.0), images(1, 32, 7))
    for slim, wide in zip(model.modules(), full.modules(), strict=True):
        if isinstance(slim, nn.Conv2d):
            assert slim.out_channels == wide.out_channels / 4


def test_a_network_of_another_width_is_named_as_such():
    assert network_name(TrainConfig(network="vgg16", width=0.5)) == "VGG16 x 0.5"
    assert network_name(TrainConfig(network="resnet50")) == "ResNet50"


@pytest.mark.parametrize(
    ("stem", "size", "chosen"),
    [
        ("auto", 63, "cifar"),
        ("auto", 64, "imagenet"),
        ("cifar", 224, "cifar"),
        ("imagenet", 32, "imagenet"),
    ],
)
def test_the_stem_follows_the_size_of_the_images_unless_told(stem, size, chosen):
    for network in ("resnet34", "vgg16"):
        config = TrainConfig(network=network, stem=stem, width=0.1)
        assert architecture_of(config, images(size=size)).images == chosen
    if stem != "imagenet":  # which small-vgg does not have
        assert architecture_of(TrainConfig(stem=stem), images(size=size)).images == "cifar"


def test_images_too_small_for_the_poolings_are_refused_with_the_size_that_is_needed():
    with pytest.raises(
        ValueError, match="vgg16 pools 5 times, too often for images of 28 pixels; it needs 32"
    ):
        build_network(TrainConfig(network="vgg16"), images(1, 28))
    build_network(TrainConfig(network="vgg16", width=0.05), images(1, 32))


def test_a_run_starts_from_given_weights_and_says_what_was_left_out(tmp_path):
    config = TrainConfig(network="resnet34", width=1 / 16)
    given = build_network(config, images(classes=100))
    save_file(given.state_dict(), tmp_path / "w")
    said: list[str] = []
    config = dataclasses.replace(config, pretrained=str(tmp_path / "w"))
    model = build_network(config, images(classes=10), said.append)
    assert isinstance(model, ResNet)
    assert torch.equal(model.layer4[2].conv2.weight, given.layer4[2].conv2.weight)
    assert said == [f"{tmp_path / 'w'}: of another classifier; fc.weight, fc.bias start at random"]
    build_network(config, images(classes=100), said.append)
    assert len(said) == 1


@pytest.mark.parametrize(("pointwise", "layers"), [(True, 52), (False, 16)])
@pytest.mark.parametrize("topology", ["learned", "standard"])
def test_pointwise_layers_take_part_by_choice(pointwise, layers, topology):
    config = TrainConfig(network="resnet50", width=1 / 16, topology=topology, pointwise_layers=pointwise)
    found = lhc_layers(apply_topology(build_network(config, images()), config))
    assert len(found) == layers
    assert {layer.frozen for layer in found.values()} == {topology != "learned"}


def test_blocks_are_fixed_or_follow_the_width_of_a_layer():
    config = TrainConfig(network="vgg16", in_block=8, out_block=8, shapes="rigid", density=0.2)
    fixed = lhc_layers(apply_topology(on_paper(config, images()), config))
    assert {layer.config for layer in fixed.values()} == {config.lhc}
    config = dataclasses.replace(config, block_rule="width")
    found = lhc_layers(apply_topology(on_paper(config, images()), config))
    blocks = {layer.out_channels: layer.config.out_block for layer in found.values()}
    assert blocks == {64: 8, 128: 16, 256: 32, 512: 64}
    assert {(layer.config.shapes, layer.config.density) for layer in found.values()} == {("rigid", 0.2)}


@pytest.mark.parametrize("topology", HANDCRAFTED)
def test_a_handcrafted_topology_is_the_published_one_and_frozen(topology):
    config = TrainConfig(widths=(16, 16, 16), topology=topology)
    model = build_network(config, images())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = lhc_layers(apply_topology(model, config))
    other = build_network(config, images())
    other.load_state_dict(state)
    expected = lhc_layers(impose(other, topology))
    assert found.keys() == expected.keys() == {"features.3", "features.6"}
    for name, layer in found.items():
        assert layer.frozen
        assert torch.equal(layer.masked_weight(), expected[name].masked_weight())


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_say_how_much_a_handcrafted_topology_keeps(parts):
    config = TrainConfig(widths=(16, 16, 16), topology="groupwise", parts=parts)
    found = lhc_layers(apply_topology(build_network(config, images()), config))
    assert {layer.density for layer in found.values()} == {1 / parts}


def test_the_same_seed_gives_the_twins_the_same_weights():
    config = TrainConfig(widths=(8, 16))
    torch.manual_seed(3)
    dense = build_network(config, images())
    torch.manual_seed(3)
    learning = apply_topology(build_network(config, images()), config)
    weights = learning.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dense.state_dict().items())
