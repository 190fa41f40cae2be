"""VGG networks (Simonyan, Zisserman 2014, arXiv 1409.1556) with batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Widths = Sequence[int | Literal["M"]]
Images = Literal["imagenet", "cifar"]
CLASSES = {"imagenet": 1000, "cifar": 10}
SMALL_WIDTHS: tuple[int | Literal["M"], ...] = (32, 64, "M", 128, 128, "M", 256, 256)
# Configurations D and E of the paper.
VGG16_WIDTHS: Widths = (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M")
VGG19_WIDTHS: Widths = (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M")
HIDDEN = 4096  # features of the ImageNet classifier's two hidden layers
POOLED = 7  # side of the image it reads


class VGG(nn.Module):
    """3x3 convolutions with batch norm and ReLU, max pooling, then a classifier.

    For CIFAR that is a global mean and one linear layer; for ImageNet the paper's three linear layers on
    7x7 pixels, with convolution biases, so that names and sizes are those of torchvision's vgg16_bn.

    Args:
        widths: filters of each convolution; "M" is a 2x2 max pooling.
        in_channels: channels of the images.
        num_classes: outputs.
        images: "cifar" or "imagenet": which classifier.

    Raises:
        ValueError: ``widths`` does not begin with a number, an argument is not positive, or ``images`` is
            another one.
        TypeError: a width is neither an integer nor "M".
    """

    def __init__(
        self, widths: Widths, in_channels: int = 1, num_classes: int = 10, images: Images = "cifar"
    ) -> None:
        super().__init__()
        _check(widths, in_channels, num_classes)
        check_images(images)
        imagenet = images == "imagenet"
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            # A bias before batch norm changes nothing; ImageNet weights in circulation hold one.
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=imagenet)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(POOLED if imagenet else 1)
        self.classifier: nn.Module = (
            nn.Sequential(
                nn.Linear(channels * POOLED**2, HIDDEN),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(HIDDEN, HIDDEN),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(HIDDEN, num_classes),
            )
            if imagenet
            else nn.Linear(channels, num_classes)
        )
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to scores [N, num_classes]."""
        scores: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return scores


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


def vgg16(images: Images = "imagenet", num_classes: int | None = None, in_channels: int = 3) -> VGG:
    """VGG16 with batch norm: 15.47 G MACs on 224x224 images, 313.2 M on 32x32 ones.

    Args:
        images: "imagenet" (138.4 M parameters; torchvision's vgg16_bn weights load) or "cifar".
        num_classes: outputs; by default 1000 or 10.
        in_channels: channels of the images.

    Raises:
        ValueError: as VGG.
    """
    return VGG(VGG16_WIDTHS, in_channels, classes(images, num_classes), images)


def vgg19(images: Images = "imagenet", num_classes: int | None = None, in_channels: int = 3) -> VGG:
    """VGG19 with batch norm: 19.63 G MACs on 224x224 images, 398.1 M on 32x32 ones.

    Args:
        images: "imagenet" (143.7 M parameters; torchvision's vgg19_bn weights load) or "cifar".
        num_classes: outputs; by default 1000 or 10.
        in_channels: channels of the images.

    Raises:
        ValueError: as VGG.
    """
    return VGG(VGG19_WIDTHS, in_channels, classes(images, num_classes), images)


def check_images(images: str) -> None:
    """Raise ValueError unless ``images`` names a kind of images that the networks come for."""
    if images not in get_args(Images):
        raise ValueError(f"images={images!r} is not supported; use one of {', '.join(get_args(Images))}")


def classes(images: Images, num_classes: int | None) -> int:
    """Return ``num_classes``, by default those of the data set; ValueError for other images."""
    check_images(images)
    return CLASSES[images] if num_classes is None else num_classes


def init_convolutions(model: nn.Module) -> None:
    """Draw every convolution's weights He-normal by fan-out, with zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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
