"""The networks of a run: built for its images, started from given weights, converted to its topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

from torch import nn

from lhc_triton.conversion import convert
from lhc_triton.models.architecture import Architecture
from lhc_triton.models.resnet import WIDTHS
from lhc_triton.models.vgg import VGG16_WIDTHS, VGG19_WIDTHS, Images
from lhc_triton.training.config import TrainConfig

ModelT = TypeVar("ModelT", bound=nn.Module)

SMALL_IMAGE = 64
"""Images of fewer pixels than this have a network's CIFAR stem and head."""

_NAMES = {
    "small-vgg": "small VGG",
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "resnet34": "ResNet34",
    "resnet50": "ResNet50",
}


class ImageFormat(Protocol):
    """What a network needs to know of the images."""

    channels: int
    size: int
    classes: Sequence[str]


def architecture_of(config: TrainConfig, format: ImageFormat) -> Architecture:
    """The network of a run in its sizes.

    Raises:
        ValueError: the images are too small for it.
    """
    stem: Images = "cifar" if format.size < SMALL_IMAGE else "imagenet"
    if config.network == "small-vgg":
        stem = "cifar"
    elif config.stem != "auto":
        stem = config.stem
    widths = {"small-vgg": config.widths, "vgg16": VGG16_WIDTHS, "vgg19": VGG19_WIDTHS}.get(
        config.network, WIDTHS
    )
    scaled = tuple(_scaled(width, config.width) for width in widths)
    return Architecture(config.network, scaled, stem, format.channels, len(format.classes), format.size)


def _scaled(width: int | Literal["M"], factor: float) -> int | Literal["M"]:
    return width if width == "M" else max(1, round(factor * width))


def network_name(config: TrainConfig) -> str:
    """The network's name for people: one of other widths says so, as in "VGG16 x 0.5"."""
    name = _NAMES[config.network]
    return name if config.width == 1 else f"{name} x {config.width:g}"


def build_network(config: TrainConfig, format: ImageFormat) -> nn.Module:
    """The dense network of a run at its start; random weights come from torch's global generator.

    Args:
        config: the run.
        format: of its images: channels, size and classes.

    Raises:
        ValueError: the images are too small for the network.
    """
    return architecture_of(config, format).build()


def apply_topology(model: ModelT, config: TrainConfig) -> ModelT:
    """Give a dense network the run's topology, in place: learned (to be trained) or made by hand (frozen).

    Args:
        model: what build_network gave.
        config: the run.

    Raises:
        ValueError: no convolution can take it.
    """
    pointwise = config.pointwise_layers
    return convert(model, config.lhc, lambda name, conv: pointwise or conv.kernel_size != (1, 1))
