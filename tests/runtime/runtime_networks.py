"""Small networks, and structured zeros, for the tests of accelerated models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def prune_blocks(
    module: nn.Module, density: float = 0.3, in_block: int = 16, out_block: int = 16, seed: int = 0
) -> None:
    """Zero random blocks of every groups=1 convolution that has more than one block."""
    generator = torch.Generator().manual_seed(seed)
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.in_channels >= in_block:
            o, i, kh, kw = conv.weight.shape
            grid = torch.rand(-(-o // out_block), -(-i // in_block), kh, kw, generator=generator) < density
            mask = grid.repeat_interleave(out_block, 0).repeat_interleave(in_block, 1)[:o, :i]
            with torch.no_grad():
                conv.weight.mul_(mask)


def randomise_norms(module: nn.Module, seed: int = 0) -> None:
    """Give batch norms statistics worth folding."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            if norm.affine:
                with torch.no_grad():
                    norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                    norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)


def finish(model: nn.Module, seed: int = 0, density: float = 0.3) -> nn.Module:
    """Prune, randomise the norms, and switch to eval mode."""
    prune_blocks(model, density, seed=seed)
    randomise_norms(model, seed)
    return model.eval()


def vgg(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, "M", 32, 48, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        assert isinstance(width, int)
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
        channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels, 10)]
    return finish(nn.Sequential(*layers, *head), seed)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = 2 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 24, 2))
        self.layer2 = nn.Sequential(Bottleneck(24, 16, 2), Bottleneck(32, 16))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return finish(ResNet(), seed)


class Untraceable(nn.Module):
    """Its control flow depends on its data, so torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.body(self.stem(x)))
        return y.relu() if float(y.detach().sum()) > -1e30 else y


def untraceable(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return finish(Untraceable(), seed)


class SharedConv(nn.Module):
    """One convolution called three times, followed by something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.norm(self.conv(x)))
        z = self.conv(y) + x
        return self.conv(z).relu()


def shared(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return finish(SharedConv(), seed)


def image(batch: int = 2, size: int = 12, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))
