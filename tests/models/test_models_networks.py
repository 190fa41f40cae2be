"""VGG and ResNet: the published sizes, torchvision's names, and the way through the package."""

import pytest
import torch
from torch import fx, nn

import lhc_triton as lhc
from lhc_triton.conversion import lhc_layers
from lhc_triton.models import resnet34, resnet50, vgg16, vgg19
from lhc_triton.models.resnet import BasicBlock, ResNet

SIDES = {"imagenet": 224, "cifar": 32}

# Parameters and multiply-accumulates of one image: torchvision's model tables; CIFAR: HetConv's and
# stripe-wise pruning's tables for VGG16, and counts by hand for the others.
PUBLISHED = [
    (vgg16, "imagenet", 138_365_992, 15.47e9),
    (vgg19, "imagenet", 143_678_248, 19.63e9),
    (resnet34, "imagenet", 21_797_672, 3.66e9),
    (resnet50, "imagenet", 25_557_032, 4.09e9),
    (vgg16, "cifar", 14_724_042, 313.2e6),
    (resnet34, "cifar", 21_282_122, 1.159e9),
    (resnet50, "cifar", 23_520_842, 1.298e9),
]


def on_paper(make, *arguments):
    with torch.device("meta"):
        return make(*arguments)


@pytest.mark.parametrize(
    ("make", "images", "parameters", "macs"), PUBLISHED, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_a_network_has_the_published_size(make, images, parameters, macs):
    model = on_paper(make, images)
    assert sum(p.numel() for p in model.parameters()) == parameters
    found = lhc.summary(model, (3, SIDES[images], SIDES[images])).total
    assert found.macs == pytest.approx(macs, rel=2e-3)


def test_vgg_names_are_torchvisions():
    state = on_paper(vgg16).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["features.0.weight"] == (64, 3, 3, 3)
    assert shapes["features.0.bias"] == (64,)
    assert shapes["features.41.running_var"] == (512,)
    assert shapes["classifier.0.weight"] == (4096, 512 * 7 * 7)
    assert shapes["classifier.6.weight"] == (1000, 4096)
    # 13 convolutions and 3 linear layers of 2 tensors, 13 batch norms of 5.
    assert len(state) == 16 * 2 + 13 * 5


def test_resnet_names_are_torchvisions():
    small, large = (on_paper(make).state_dict() for make in (resnet34, resnet50))
    assert (len(small), len(large)) == (218, 320)
    assert tuple(small["layer2.0.downsample.0.weight"].shape) == (128, 64, 1, 1)
    assert "layer1.0.downsample.0.weight" not in small
    assert tuple(large["layer1.0.downsample.0.weight"].shape) == (256, 64, 1, 1)
    assert tuple(large["layer4.2.conv2.weight"].shape) == (512, 512, 3, 3)
    assert {"conv1.weight", "bn1.running_mean", "layer4.2.bn3.bias", "fc.weight", "fc.bias"} <= large.keys()


def test_the_bottleneck_strides_in_its_3x3_convolution():
    block = on_paper(resnet50).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


@pytest.mark.parametrize("make", [vgg16, resnet34])
@pytest.mark.parametrize("images", ["imagenet", "cifar"])
def test_stems_and_heads_take_their_images(make, images):
    model = on_paper(make, images).eval()
    side = SIDES[images]
    assert model(torch.empty(2, 3, side, side, device="meta")).shape == (
        2,
        {"imagenet": 1000}.get(images, 10),
    )
    other = on_paper(make, images, 7, 1)
    assert other(torch.empty(2, 1, side, side, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(("pointwise", "layers"), [(True, 52), (False, 16)])
def test_pointwise_convolutions_are_converted_unless_left_out(pointwise, layers):
    model = resnet50("cifar")
    lhc.convert(model, filter_fn=lambda name, conv: pointwise or conv.kernel_size != (1, 1))
    found = lhc_layers(model)
    assert len(found) == layers
    assert "conv1" not in found
    assert ("layer2.0.downsample.0" in found) == pointwise


@pytest.mark.parametrize("make", [vgg16, vgg19, resnet34, resnet50])
def test_torch_fx_traces_every_network(make):
    traced = fx.symbolic_trace(on_paper(make).eval())
    convolutions = [n for n in traced.graph.nodes if n.op == "call_module" and "downsample.0" in n.target]
    assert len(convolutions) == {resnet34: 3, resnet50: 4}.get(make, 0)


@pytest.mark.parametrize("make", [vgg16, resnet34, resnet50])
def test_a_converted_network_is_accelerated_whole(make):
    torch.manual_seed(0)
    model = lhc.convert(make("cifar"), lhc.LHCConfig(density=0.1)).eval()
    x = torch.randn(1, 3, 32, 32)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 2)
    fast = lhc.accelerate(model, x, tune="off", backend="torch")
    report = fast.report()
    assert report["traced"]
    assert report["totals"]["rel_err"] < 1e-4
    assert {row["layer"] for row in report["layers"] if row["backend"] == "dense"} == {
        "conv1" if isinstance(model, ResNet) else "features.0"
    }
    epilogues = {row["epilogue"] for row in report["layers"]}
    assert ("bn+add+relu" if isinstance(model, ResNet) else "bn+relu+maxpool") in epilogues


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="images='mnist' is not supported; use one of imagenet, cifar"):
        vgg16("mnist")
    with pytest.raises(ValueError, match="images='mnist'"):
        resnet34("mnist")
    with pytest.raises(ValueError, match=r"depths \(1, 2\)"):
        ResNet(BasicBlock, (1, 2))
    with pytest.raises(ValueError, match="num_classes 0"):
        resnet50("cifar", num_classes=0)
