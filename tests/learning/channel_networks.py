"""Networks whose channels run through additions, concatenations, depthwise convolutions and linear layers."""

import torch
import torch.nn.functional as F
from torch import nn
from zoo.networks import Unet, conv

from lhc_triton.models.resnet import BasicBlock, Bottleneck, ResNet
from lhc_triton.models.vgg import VGG


def deaden(model, seed=0, share=0.3):
    """Kill filters in every way there is: weights, norms, readers; some leave constants behind."""
    generator = torch.Generator().manual_seed(seed)

    def some(count, share=share):
        return torch.rand(count, generator=generator) < share

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 2, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                dead = some(len(module.weight))
                module.weight[dead] = 0
                module.bias[dead & some(len(dead), 0.7)] = 0
            if isinstance(module, nn.Conv2d):
                dead = some(module.out_channels)
                module.weight[dead] = 0
                if module.bias is not None:
                    module.bias[dead & some(len(dead), 0.7)] = 0
                if module.groups == 1 and module.in_channels > 3:
                    module.weight[:, some(module.in_channels)] = 0
            if isinstance(module, nn.Linear):
                module.weight[:, some(module.in_features, 0.1)] = 0
    return model.eval()


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for item in (output.values() if isinstance(output, dict) else output) for t in tensors(item)]


def same(model, other, *inputs):
    """Whether two networks agree to 1e-5 on these inputs, on other values, and on another batch."""
    for values in (inputs, [torch.randn_like(x) for x in inputs], [x[:1] * 2 for x in inputs]):
        expected, found = tensors(model(*values)), tensors(other(*values))
        for one, two in zip(expected, found, strict=True):
            assert one.shape == two.shape
            assert (one - two).norm() <= 1e-5 * one.norm() + 1e-12


class DenseNet(nn.Module):
    """Concatenation, norm first."""

    def __init__(self, width=12, growth=8):
        super().__init__()
        self.stem = conv(3, width)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width + i * growth) for i in range(4)])
        self.convs = nn.ModuleList([conv(width + i * growth, growth, bias=False) for i in range(3)])
        self.head = nn.Linear(width + 3 * growth, 5)

    def forward(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        x = F.relu(self.norms[3](x), inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class Inverted(nn.Module):
    """Depthwise convolutions and squeeze-and-excite beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.n0 = conv(3, 16, bias=False), nn.BatchNorm2d(16)
        self.expand, self.n1 = conv(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depth, self.n2 = conv(32, 32, groups=32, bias=False), nn.BatchNorm2d(32)
        self.squeeze, self.excite = conv(32, 8, 1), conv(8, 32, 1)
        self.project, self.n3 = conv(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.act = nn.Hardswish(inplace=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.act(self.n0(self.stem(x)))
        y = self.act(self.n1(self.expand(x)))
        y = self.act(self.n2(self.depth(y)))
        gate = F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))
        y = y * torch.sigmoid(self.excite(gate))
        y = self.n3(self.project(y))
        y += x
        return self.head(y.mean([-2, -1]))


def resnet(block):
    return ResNet(block, (3, 4, 6, 3), "cifar", 7, widths=(8, 12, 16, 20))


NETWORKS = {
    "vgg": lambda: VGG((8, 16, "M", 16, 24), 3),
    "vgg of imagenet": lambda: VGG((8, 12, "M", 6), 3, 4, "imagenet"),
    "resnet34": lambda: resnet(BasicBlock),
    "resnet50": lambda: resnet(Bottleneck),
    "densenet": DenseNet,
    "unet": Unet,
    "inverted": Inverted,
}


def example(name):
    """Images for one of NETWORKS."""
    size = {"vgg of imagenet": 28}.get(name, 16)
    return torch.randn(2, 3, size, size)
