"""VGG networks (Simonyan, Zisserman 2014, arXiv 1409.1556) with batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Widths = Sequence[int | Literal["M"]]
SMALL_WIDTHS: tuple[int | Literal["M"], ...] = (32, 64, "M", 128, 128, "M", 256, 256)


class VGG(nn.Module):
    """3x3 convolutions with batch norm and ReLU, max pooling, then a global mean and one linear layer.

    Args:
        widths: filters of each convolution; "M" is a 2x2 max pooling.
        in_channels: channels of the images.
        num_classes: outputs.

    Raises:
        ValueError: ``widths`` does not begin with a number, or an argument is not positive.
        TypeError: a width is neither an integer nor "M".
    """

    def __init__(self, widths: Widths, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        _check(widths, in_channels, num_classes)
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            # No bias: the batch norm that follows would take it out again.
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to scores [N, num_classes]."""
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def small_vgg(widths: Widths = SMALL_WIDTHS, in_channels: int = 1, num_classes: int = 10) -> VGG:
    """A VGG for 28x28 images: by default six convolutions, about 1.1 million weights and 101 million MACs.

    Args:
        widths: filters of each convolution; "M" is a 2x2 max pooling.
        in_channels: channels of the images.
        num_classes: outputs.

    Raises:
        ValueError, TypeError: as VGG.
    """
    return VGG(widths, in_channels, num_classes)


def _check(widths: Widths, in_channels: int, num_classes: int) -> None:
    if len(widths) == 0 or widths[0] == "M":
        raise ValueError(f"widths {tuple(widths)} must begin with a number of filters")
    for width in widths:
        if width == "M":
            continue
        if isinstance(width, bool) or not isinstance(width, int):
            raise TypeError(f'width {width!r} is neither a number of filters nor "M"')
        if width < 1:
            raise ValueError(f"width {width} is not positive")
    if in_channels < 1 or num_classes < 1:
        raise ValueError(f"in_channels {in_channels} and num_classes {num_classes} must be positive")
