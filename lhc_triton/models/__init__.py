"""Networks to convert and train."""

from lhc_triton.models.architecture import Architecture
from lhc_triton.models.pretrained import SavedNetwork, load_network, load_pretrained, save_network
from lhc_triton.models.resnet import ResNet, resnet34, resnet50
from lhc_triton.models.vgg import VGG, small_vgg, vgg16, vgg19

__all__ = [
    "VGG",
    "Architecture",
    "ResNet",
    "SavedNetwork",
    "load_network",
    "load_pretrained",
    "resnet34",
    "resnet50",
    "save_network",
    "small_vgg",
    "vgg16",
    "vgg19",
]
