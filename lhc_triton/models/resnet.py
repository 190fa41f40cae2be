"""ResNet34 and ResNet50 (He et al. 2015, arXiv 1512.03385); names and sizes are torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lhc_triton.models.vgg import Images, check_images, classes, init_convolutions

WIDTHS = (64, 128, 256, 512)
DEPTHS = (3, 4, 6, 3)  # of ResNet34 and ResNet50 alike


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        channels: of the input.
        width: filters of both convolutions, channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, channels, H, W] to [N, width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + shortcut)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the 3x3 one takes the stride, as in torchvision.

    Args:
        channels: of the input.
        width: filters of the first two convolutions; the output has four times as many channels.
        stride: of the 3x3 convolution and of the shortcut.
    """

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, channels, H, W] to [N, 4 * width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + shortcut)
        return out


def _shortcut(channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """A strided 1x1 convolution where input and output differ in size; None where they do not."""
    if stride == 1 and channels == out_channels:
        return None
    convolution = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    """Blocks of one width; the first takes the stride."""
    out_channels = width * block.expansion
    rest = [block(out_channels, width) for _ in range(depth - 1)]
    return nn.Sequential(block(channels, width, stride), *rest)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, a global mean and a linear layer.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of the four stages.
        images: "imagenet": a 7x7 stem of stride 2 and a max pooling; "cifar": a 3x3 stem at full size.
        num_classes: outputs; by default 1000 or 10.
        in_channels: channels of the images.
        widths: filters of the four stages' 3x3 convolutions; the stem has the first one's.

    Raises:
        ValueError: ``images`` is another one, there are not four depths and widths, or a number is not
            positive.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        images: Images = "imagenet",
        num_classes: int | None = None,
        in_channels: int = 3,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        super().__init__()
        check_images(images)
        outputs = classes(images, num_classes)
        if len(depths) != 4 or len(widths) != 4 or min(*depths, *widths, outputs, in_channels) < 1:
            raise ValueError(
                f"depths {tuple(depths)}, widths {tuple(widths)}, num_classes {outputs}, in_channels "
                f"{in_channels}: expected four depths, four widths, and positive numbers"
            )
        imagenet = images == "imagenet"
        size, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, widths[0], size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if imagenet else nn.Identity()
        one, two, three, four = (width * block.expansion for width in widths)
        self.layer1 = _stage(block, widths[0], widths[0], depths[0], stride=1)
        self.layer2 = _stage(block, one, widths[1], depths[1], stride=2)
        self.layer3 = _stage(block, two, widths[2], depths[2], stride=2)
        self.layer4 = _stage(block, three, widths[3], depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(four, outputs)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to scores [N, num_classes]."""
        y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            y = stage(y)
        scores: Tensor = self.fc(torch.flatten(self.avgpool(y), 1))
        return scores


def resnet34(images: Images = "imagenet", num_classes: int | None = None, in_channels: int = 3) -> ResNet:
    """ResNet34: 3.66 G MACs on 224x224 images, 1.16 G on 32x32 ones.

    Args:
        images: "imagenet" (21.8 M parameters; torchvision's resnet34 weights load) or "cifar".
        num_classes: outputs; by default 1000 or 10.
        in_channels: channels of the images.

    Raises:
        ValueError: as ResNet.
    """
    return ResNet(BasicBlock, DEPTHS, images, num_classes, in_channels)


def resnet50(images: Images = "imagenet", num_classes: int | None = None, in_channels: int = 3) -> ResNet:
    """ResNet50: 4.09 G MACs on 224x224 images, 1.30 G on 32x32 ones.

    Args:
        images: "imagenet" (25.6 M parameters; torchvision's resnet50 weights load) or "cifar".
        num_classes: outputs; by default 1000 or 10.
        in_channels: channels of the images.

    Raises:
        ValueError: as ResNet.
    """
    return ResNet(Bottleneck, DEPTHS, images, num_classes, in_channels)
