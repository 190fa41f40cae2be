"""Architecture: which of the package's networks, in which size; enough to build it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn

from lhc_triton.models.resnet import DEPTHS, BasicBlock, Bottleneck, ResNet
from lhc_triton.models.vgg import VGG, Images, check_images

NetworkName = Literal["small-vgg", "vgg16", "vgg19", "resnet34", "resnet50"]
_RESNET_BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {
    "resnet34": BasicBlock,
    "resnet50": Bottleneck,
}
MAX_LAYERS, MAX_SIZE = 64, 8192


@dataclass(frozen=True)
class Architecture:
    """A network of this package by its sizes.

    Attributes:
        network: "small-vgg", "vgg16", "vgg19", "resnet34" or "resnet50".
        widths: VGG: filters of each convolution, "M" for a 2x2 max pooling; ResNet: of its four stages.
        images: "cifar" or "imagenet": which stem and head; small-vgg has the CIFAR head only.
        in_channels: channels of the images.
        num_classes: outputs.
        image_size: side of the images in pixels.

    Raises:
        ValueError, TypeError: a size is no whole number or out of range, or the images are too small for the
            poolings.
    """

    network: NetworkName
    widths: tuple[int | Literal["M"], ...]
    images: Images
    in_channels: int
    num_classes: int
    image_size: int

    def __post_init__(self) -> None:
        if self.network not in get_args(NetworkName):
            raise ValueError(f"network {self.network!r} is not one of {', '.join(get_args(NetworkName))}")
        check_images(self.images)
        if not isinstance(self.widths, list | tuple) or not 1 <= len(self.widths) <= MAX_LAYERS:
            raise ValueError(f"widths {self.widths!r} are no list of 1 to {MAX_LAYERS} entries")
        object.__setattr__(self, "widths", tuple(self.widths))
        sizes = [width for width in self.widths if width != "M"]
        for size in (*sizes, self.in_channels, self.num_classes, self.image_size):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"size {size!r} is not a whole number")
            if not 1 <= size <= MAX_SIZE:
                raise ValueError(f"size {size} is outside [1, {MAX_SIZE}]")
        if self.network not in _RESNET_BLOCKS and self.image_size >> self.widths.count("M") == 0:
            raise ValueError(
                f"{self.network} pools {self.widths.count('M')} times, too often for images of "
                f"{self.image_size} pixels; it needs {1 << self.widths.count('M')}"
            )

    def build(self) -> nn.Module:
        """The network with random weights, from torch's global generator, on the default device.

        Raises:
            ValueError: the widths are not those of such a network.
        """
        block = _RESNET_BLOCKS.get(self.network)
        if block is None:
            return VGG(self.widths, self.in_channels, self.num_classes, self.images)
        if "M" in self.widths:
            raise ValueError(f"widths {self.widths} of {self.network}: a ResNet has no pooling between them")
        widths = [int(width) for width in self.widths]
        return ResNet(block, DEPTHS, self.images, self.num_classes, self.in_channels, widths)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {**asdict(self), "widths": list(self.widths)}


@dataclass(frozen=True)
class OwnArchitecture:
    """A network that only its maker builds: what a file says of it.

    Attributes:
        network: package.module:factory, or a name for people.
        in_channels: channels of the images.
        num_classes: outputs.
        image_size: side of the images in pixels.
    """

    network: str
    in_channels: int
    num_classes: int
    image_size: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, with a mark."""
        return {**asdict(self), "own": True}
